"""Prometheus metrics of one application, in a collector registry of its own."""

from collections.abc import Iterable
from dataclasses import fields
from typing import ClassVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_stats import FETCH_SECONDS
from lorasb_runtime.engines.base import Engine

MAX_ADAPTER_LABELS = 100  # each distinct label costs the scraper a time series
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters that the routes keep, and gauges read from the engine when asked for."""

    def __init__(self, engine: Engine, loader: AdapterLoader | None) -> None:
        self._collectors = CollectorRegistry()
        self._labels: set[str] = set()
        self._adapters = Counter(
            "lorasb_adapter_requests",
            f"Requests by adapter, the first {MAX_ADAPTER_LABELS} of them by name",
            ["adapter"],
            registry=self._collectors,
        )
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
        if loader is not None:
            self._collectors.register(_LoaderCounts(loader))

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
        for name, text, value in (
            ("lorasb_slot_hits", "Admissions that found their adapter resident", stats.slot_hits),
            ("lorasb_slot_fills", "Adapter versions copied into a slot", stats.slot_fills),
            ("lorasb_slot_evictions", "Adapter versions that lost theirs", stats.slot_evictions),
        ):
            yield CounterMetricFamily(name, text, value=float(value))


class _LoaderCounts:
    """The loader's statistics, each field under its own name."""

    GAUGES: ClassVar = ("cached", "cached_bytes")
    HISTOGRAM: ClassVar = ("fetch_counts", "fetch_seconds")

    def __init__(self, loader: AdapterLoader) -> None:
        self._loader = loader

    def collect(self) -> Iterable[Metric]:
        stats = self._loader.stats()
        for field in fields(stats):
            if field.name in self.HISTOGRAM:
                continue
            name, text = f"lorasb_loader_{field.name}", f"The adapter loader's {field.name}"
            value = float(getattr(stats, field.name))
            if field.name in self.GAUGES:
                yield GaugeMetricFamily(name, text, value=value)
            else:
                yield CounterMetricFamily(name, text, value=value)
        bounds = [str(bound) for bound in FETCH_SECONDS] + ["+Inf"]
        buckets = list(zip(bounds, map(float, stats.fetch_counts), strict=True))
        yield HistogramMetricFamily(
            "lorasb_loader_fetch_seconds",
            "What a fetch from the store took",
            buckets=buckets,
            sum_value=stats.fetch_seconds,
        )
