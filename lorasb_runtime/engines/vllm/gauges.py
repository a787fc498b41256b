"""What vLLM's scheduler and workers report, kept for whoever asks for the engine's statistics."""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from lorasb_runtime.engines.base import EngineStats


@dataclass(frozen=True)
class SlotReport:
    """One worker's slots: resident versions, and counts since the start as in EngineStats."""

    used: int
    hits: int
    fills: int
    evictions: int


@dataclass
class Gauges:
    """scheduler: the last statistics of each data-parallel engine."""

    slots: int = 0
    kv_tokens: int = 0
    scheduler: dict[int, Any] = field(default_factory=dict)
    steps: int = 0
    report: SlotReport = field(default_factory=lambda: SlotReport(0, 0, 0, 0))

    def stats(self) -> EngineStats:
        engines = list(self.scheduler.values())
        usage = sum(s.kv_cache_usage for s in engines) / max(1, len(engines))
        return EngineStats(
            running=sum(s.num_running_reqs for s in engines),
            waiting=sum(s.num_waiting_reqs + s.num_skipped_waiting_reqs for s in engines),
            slots_used=self.report.used,
            slots=self.slots,
            kv_tokens_used=round(usage * self.kv_tokens),
            kv_tokens=self.kv_tokens,
            steps=self.steps,
            slot_hits=self.report.hits,
            slot_fills=self.report.fills,
            slot_evictions=self.report.evictions,
        )


class GaugeLogger(StatLoggerBase):
    """vLLM makes one for each data-parallel engine and hands it every step's statistics."""

    def __init__(self, gauges: Gauges, engine_index: int) -> None:
        self._gauges = gauges
        self._engine = engine_index

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._gauges.scheduler[self._engine] = scheduler_stats
            self._gauges.steps += 1

    def log_engine_initialized(self) -> None:
        pass
