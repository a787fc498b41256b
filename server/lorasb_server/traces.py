"""Spans of requests, sent by OTLP over HTTP. Imported only where an endpoint is configured.

Names are those of OpenTelemetry's conventions for HTTP (stable) and for generative AI (still in
development there): https://opentelemetry.io/docs/specs/semconv/
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from lorasb_server.exchange import Exchange

FLUSH_SECONDS = 3
# Which of an exchange's facts go into its span, and under which name.
FACTS = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "adapter": "lorasb.adapter",
}
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


class Traces:
    """A tracer of its own: nothing is registered for the process."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: the collector's base URL; spans go to its /v1/traces.

        Headers, certificates, batching and sampling are the SDK's to read (OTEL_...).
        """
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lorasb_server")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, exchange: Exchange, scope: Scope) -> Iterator[None]:
        """One span around the answer, child of the client's `traceparent` if there is one."""
        parent = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER)
        exchange.facts["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        try:
            yield
        finally:
            _describe(span, exchange, scope)
            span.end()

    def close(self) -> None:
        """Send what is left, if the collector takes it at once."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)


def _resource() -> Resource:
    """`lorasb`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES name the service."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: "lorasb"}))
    return found


def _describe(span: Span, exchange: Exchange, scope: Scope) -> None:
    route = getattr(scope.get("route"), "path", None)
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.response.status_code": exchange.status,
        "lorasb.request_id": exchange.id,
        "lorasb.outcome": exchange.outcome,
    }
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        attributes["http.route"] = route
    if route in OPERATIONS:
        attributes |= {
            "gen_ai.operation.name": OPERATIONS[route],
            "gen_ai.provider.name": "lorasb",
        }
        attributes |= {FACTS[fact]: v for fact, v in exchange.facts.items() if fact in FACTS}
    if exchange.outcome in ("error", "timeout", "shutdown"):
        attributes["error.type"] = exchange.outcome
        span.set_status(StatusCode.ERROR)
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
