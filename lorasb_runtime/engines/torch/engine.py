"""The embedded engine: one thread that schedules, runs and samples; asyncio on the outside."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.base import (
    Chunk,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    check_request,
)
from lorasb_runtime.engines.torch.job import Event, Job, send_all
from lorasb_runtime.engines.torch.kv_regions import KVRegions
from lorasb_runtime.engines.torch.output import SequenceOutput
from lorasb_runtime.engines.torch.prefix_cache import PrefixCache
from lorasb_runtime.engines.torch.runner import ModelRunner
from lorasb_runtime.engines.torch.sampler import Sampler
from lorasb_runtime.engines.torch.scheduler import Scheduler
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.engines.torch.step_counts import StepCounts
from lorasb_runtime.engines.torch.structured import GrammarCompiler
from lorasb_runtime.errors import EngineError, LorasbError
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.ops.threads import use_all_cores

logger = logging.getLogger(__name__)


class TorchEngine:
    """Satisfies `engines.base.Engine`. Requests enter by an inbox; only the thread touches state.

    `slots` is None for an engine without a basis, which refuses requests with an adapter.
    """

    def __init__(
        self,
        runner: ModelRunner,
        codec: TextCodec,
        info: EngineInfo,
        regions: KVRegions,
        slots: SlotTable | None,
        eos: frozenset[int],
        limits: SchedulerConfig,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._runner = runner
        self._codec = codec
        self._info = info
        self._regions = regions
        self._slots = slots
        self._eos = eos
        self._sampler = Sampler(eos)
        self._grammars = GrammarCompiler(codec, info.vocab_size, eos)
        self._scheduler = Scheduler(limits, regions, self._lease, self._release, prefixes)
        self._jobs: dict[Sequence, Job] = {}
        self._wake = threading.Condition()
        self._arriving: list[Job] = []
        self._leaving: list[Job] = []
        self._closing = False
        self._steps = StepCounts()
        self._thread = threading.Thread(target=self._loop, name="lorasb-engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def codec(self) -> TextCodec:
        return self._codec

    def start(self) -> None:
        self._thread.start()

    def check_health(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise EngineError("the engine is not running")

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> EngineStats:
        slots = self._slots
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            slots_used=slots.used if slots else 0,
            slots=slots.capacity if slots else 0,
            kv_tokens_used=self._regions.used,
            kv_tokens=self._regions.budget,
            steps=self._steps.steps,
            step_seconds=self._steps.seconds,
            forward_seconds=self._steps.forward_seconds,
            slot_hits=slots.hits if slots else 0,
            slot_fills=sum(slots.fills) if slots else 0,
            slot_evictions=slots.evictions if slots else 0,
            preemptions=self._scheduler.preemptions,
            batch_counts=self._steps.batch_counts,
            batch_sequences=self._steps.sequences,
        )

    @property
    def core_bytes(self) -> int:
        """Bytes of one number of a resident adapter."""
        return self._slots.cores.element_size() if self._slots else 0

    def warm(self, adapter: LoadedAdapter) -> None:
        """Bring an adapter into a slot ahead of its first request; before `start` only."""
        assert self._slots is not None and not self._thread.is_alive()
        slot = self._slots.lease(adapter.version, adapter.cores, adapter.name)
        if slot is not None:
            self._slots.release(slot)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        check_request(request, self._info, has_basis=self._slots is not None)
        matcher = None
        if request.sampling.grammar is not None:
            matcher = await asyncio.to_thread(self._grammars.compile, request.sampling.grammar)
        job = Job(request, asyncio.get_running_loop(), asyncio.Queue(), matcher)
        self._post(job, arriving=True)
        unfinished = request.n
        try:
            while unfinished:
                event = await job.events.get()
                if isinstance(event, LorasbError):
                    unfinished = 0
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            if unfinished:
                self._post(job, arriving=False)

    def _post(self, job: Job, *, arriving: bool) -> None:
        with self._wake:
            if arriving:
                self.check_health()
                self._arriving.append(job)
            else:
                self._leaving.append(job)
            self._wake.notify()

    def _loop(self) -> None:
        use_all_cores()
        try:
            while self._take_in():
                try:
                    self._step()
                except Exception:
                    logger.exception("a step failed")
                    self._fail_running(EngineError("the engine failed on this request"))
        except Exception:
            logger.exception("the engine died")
        finally:
            with self._wake:
                self._closing = True
            left = {id(job): job for job in (*self._jobs.values(), *self._arriving)}
            for job in left.values():
                job.send(EngineError("the engine was stopped"))

    def _take_in(self) -> bool:
        """Wait for work, take arrivals and departures in; False when the engine is to stop."""
        with self._wake:
            while not (self._closing or self._arriving or self._leaving or self._jobs):
                self._wake.wait()
            arriving, self._arriving = self._arriving, []
            leaving, self._leaving = self._leaving, []
            closing = self._closing
        for job in arriving:
            try:
                self._admit(job)
            except Exception:
                logger.exception("a request could not be admitted")
                self._end(job)
                job.send(EngineError("the engine failed on this request"))
        for job in leaving:
            self._end(job)
        return not closing

    def _admit(self, job: Job) -> None:
        for sequence in job.sequences(self._info.max_model_len):
            job.outputs[sequence] = SequenceOutput(sequence, self._codec, self._eos)
            self._jobs[sequence] = job
            self._scheduler.add(sequence)

    def _step(self) -> None:
        began = time.perf_counter()
        step = self._scheduler.schedule()
        if not step.tokens:
            return
        forward = time.perf_counter()
        for part in step.prefills:
            if part.sequence.waited is None:
                part.sequence.waited = forward - part.sequence.posted
        result = self._runner.run(step)
        forward_seconds = time.perf_counter() - forward
        for part, logits in result.prompts:
            self._sampler.read_prompt(part.sequence, part.start, logits)
        chosen = self._sampler.choose(result.receivers, result.logits)
        events: list[tuple[Job, Event]] = []
        try:
            for sequence, (token, logprobs) in zip(result.receivers, chosen, strict=True):
                sequence.tokens.append(token)
                job = self._jobs[sequence]
                chunk = job.outputs[sequence].push(token, logprobs)
                if chunk.finish_reason is not None:
                    self._finish(sequence)
                events.append((job, chunk))
        finally:
            send_all(events)
        size = len(step.decodes) + len(step.prefills)
        self._steps.add(size, time.perf_counter() - began, forward_seconds)

    def _finish(self, sequence: Sequence) -> None:
        job = self._jobs.pop(sequence, None)
        if job is not None:
            self._scheduler.finish(sequence)
            job.outputs.pop(sequence)

    def _end(self, job: Job) -> None:
        for sequence in list(job.outputs):
            self._finish(sequence)

    def _fail_running(self, error: EngineError) -> None:
        """End every request that has a sequence in the batch; the waiting ones are not touched."""
        for job in {id(j): j for j in (self._jobs[s] for s in self._scheduler.running)}.values():
            self._end(job)
            job.send(error)
        self._scheduler.forget()

    def _lease(self, sequence: Sequence) -> int | None:
        if sequence.adapter is None:
            return BASE_SLOT
        assert self._slots is not None
        adapter = sequence.adapter
        return self._slots.lease(adapter.version, adapter.cores, adapter.name)

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot:
            assert self._slots is not None
            self._slots.release(sequence.slot)
