"""Prometheus metrics of one application, in a collector registry of its own.

Where vLLM has a metric of the same meaning, the name is vLLM's with our prefix.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.engines.base import Engine
from lorasb_server.gauges import EngineGauges, LoaderCounts

MAX_ADAPTER_LABELS = 100  # each distinct label costs the scraper a time series
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """Counters that the routes keep, and gauges read from the engine when asked for."""

    def __init__(self, engine: Engine, loader: AdapterLoader | None) -> None:
        self._collectors = CollectorRegistry()
        self._labels: set[str] = set()
        self._adapters = self._counter(
            "adapter_requests",
            f"Requests by adapter, the first {MAX_ADAPTER_LABELS} of them by name",
            "adapter",
        )
        self.requests = self._counter(
            "requests", "Requests by path, status and outcome", "path", "status", "outcome"
        )
        self.finished = self._counter(
            "sequences_finished", "Completions by how they ended", "finished_reason"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked for in the prefix cache"
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache"
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", SECONDS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds",
            "From one token of a completion to its next",
            TOKEN_SECONDS,
        )
        self.per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a completion's tokens after its first",
            TOKEN_SECONDS,
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "A sequence's wait for its first step", SECONDS
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token", SECONDS
        )
        self._collectors.register(EngineGauges(engine))
        if loader is not None:
            self._collectors.register(LoaderCounts(loader))
        ProcessCollector(registry=self._collectors)

    def count_adapter(self, name: str) -> None:
        """Count a request for an adapter: under its name, or `other` where there are many."""
        if name not in self._labels:
            if len(self._labels) >= MAX_ADAPTER_LABELS:
                name = "other"
            else:
                self._labels.add(name)
        self._adapters.labels(adapter=name).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self._collectors)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lorasb_{name}", text, labels, registry=self._collectors)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lorasb_{name}", text, buckets=buckets, registry=self._collectors)
