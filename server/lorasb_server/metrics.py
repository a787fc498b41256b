"""Prometheus metrics of one application, in a collector registry of its own."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from lorasb_runtime.engines.base import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters that the routes keep, and gauges read from the engine when asked for."""

    def __init__(self, engine: Engine) -> None:
        self._collectors = CollectorRegistry()
        self.requests = Counter(
            "lorasb_requests", "Requests by path and status", ["path", "status"],
            registry=self._collectors,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "lorasb_prompt_tokens", "Prompt tokens taken in", registry=self._collectors
        )
        self.generation_tokens = Counter(
            "lorasb_generation_tokens", "Tokens generated", registry=self._collectors
        )
        self.first_token = Histogram(
            "lorasb_time_to_first_token_seconds",
            "From the engine taking a request to its first token",
            buckets=SECONDS,
            registry=self._collectors,
        )
        self._collectors.register(_EngineGauges(engine))

    def render(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self._collectors)


class _EngineGauges:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("lorasb_sequences_running", "Sequences in the batch", stats.running),
            ("lorasb_sequences_waiting", "Sequences waiting to run", stats.waiting),
            ("lorasb_slots_used", "Adapter versions resident", stats.slots_used),
            ("lorasb_slots", "Adapter versions that can be resident", stats.slots),
            ("lorasb_kv_tokens_used", "KV cache given to sequences, tokens", stats.kv_tokens_used),
            ("lorasb_kv_tokens", "KV cache in all, tokens", stats.kv_tokens),
            ("lorasb_steps", "Steps the engine has run", stats.steps),
        ):
            yield GaugeMetricFamily(name, text, value=float(value))
