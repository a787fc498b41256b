"""Metrics that are read from engine and loader when they are asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import ClassVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from lorasb_runtime.adapters.loader import AdapterLoader
from lorasb_runtime.adapters.loader_stats import FETCH_SECONDS
from lorasb_runtime.engines.base import BATCH_SIZES, Engine


class EngineGauges:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        usage = stats.kv_tokens_used / stats.kv_tokens if stats.kv_tokens else 0.0
        for name, text, value in (
            ("lorasb_sequences_running", "Sequences in the batch", stats.running),
            ("lorasb_sequences_waiting", "Sequences waiting to run", stats.waiting),
            ("lorasb_slots_used", "Adapter versions resident", stats.slots_used),
            ("lorasb_slots", "Adapter versions that can be resident", stats.slots),
            ("lorasb_kv_tokens_used", "KV cache given to sequences, tokens", stats.kv_tokens_used),
            ("lorasb_kv_tokens", "KV cache in all, tokens", stats.kv_tokens),
            ("lorasb_kv_cache_usage_perc", "Part of the KV cache in use; 1 is all of it", usage),
            ("lorasb_steps", "Steps the engine has run", stats.steps),
        ):
            yield GaugeMetricFamily(name, text, value=float(value))
        for name, text, value in (
            ("lorasb_slot_hits", "Admissions that found their adapter resident", stats.slot_hits),
            ("lorasb_slot_fills", "Adapter versions copied into a slot", stats.slot_fills),
            ("lorasb_slot_evictions", "Adapter versions that lost theirs", stats.slot_evictions),
            ("lorasb_num_preemptions", "Sequences sent back to the queue", stats.preemptions),
        ):
            yield CounterMetricFamily(name, text, value=float(value))
        if stats.batch_counts:
            name, text = "lorasb_batch_size", "Sequences in a step"
            yield _histogram(name, text, BATCH_SIZES, stats.batch_counts, stats.batch_sequences)


class LoaderCounts:
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
        name, text = "lorasb_loader_fetch_seconds", "What a fetch from the store took"
        yield _histogram(name, text, FETCH_SECONDS, stats.fetch_counts, stats.fetch_seconds)


def _histogram(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> Metric:
    """counts[i]: how many were at most bounds[i], the last one all of them."""
    shown = [*map(str, bounds), "+Inf"]
    buckets = list(zip(shown, map(float, counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
