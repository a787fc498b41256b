"""Counts one request's sequences as they run: tokens, times, and how each of them ends."""

import time
from collections.abc import Sequence

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.engines.base import Chunk
from lorasb_server.exchange import Exchange
from lorasb_server.metrics import Metrics
from lorasb_server.tenants.caller import Caller
from lorasb_server.tenants.meter import Meter


class Tally:
    """`usage` of the answer, and what metrics, quotas, log and span are told, from one count."""

    def __init__(self, metrics: Metrics, meter: Meter, caller: Caller, exchange: Exchange) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._metrics = metrics
        self._meter = meter
        self._caller = caller
        self._exchange = exchange
        self._running = 0
        self._finish_reasons: list[str] = []
        # By prompt and completion: when its first and its last token came, and how many did.
        self._times: dict[tuple[int, int], tuple[float, float, int]] = {}

    def begin(
        self, model: str, prompts: Sequence[Sequence[int]], n: int, adapter: LoadedAdapter | None
    ) -> None:
        """Raises QuotaError where the tenant has no tokens left for today."""
        tenant = self._caller.tenant
        self._meter.check_tokens(tenant, self._caller.quota)
        self.prompt_tokens = sum(map(len, prompts))
        self._meter.spend(tenant, self.prompt_tokens)
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        self._metrics.prefix_queries.inc(self.prompt_tokens)
        self._exchange.facts |= {"model": model, "prompt_tokens": self.prompt_tokens}
        if adapter is not None:
            self._metrics.count_adapter(str(adapter.name))
            self._exchange.facts["adapter"] = str(adapter.name)
        self._running = len(prompts) * n

    def take(self, prompt: int, chunk: Chunk) -> None:
        """Count a chunk of one of the prompt's completions, as soon as it is there."""
        metrics, now = self._metrics, time.monotonic()
        if not self._exchange.begun:
            self._exchange.begun = True
            metrics.first_token.observe(self._exchange.seconds)
        if chunk.queue_seconds is not None:
            metrics.queue_time.observe(chunk.queue_seconds)
        self.completion_tokens += len(chunk.tokens)
        self.cached_tokens += chunk.cached_tokens
        self._meter.spend(self._caller.tenant, len(chunk.tokens))
        metrics.generation_tokens.inc(len(chunk.tokens))
        metrics.prefix_hits.inc(chunk.cached_tokens)
        key = (prompt, chunk.index)
        first, last, count = self._times.get(key, (now, now, 0))
        if count:
            metrics.inter_token.observe(now - last)
        count += len(chunk.tokens)
        self._times[key] = (first, now, count)
        if chunk.finish_reason is not None:
            if count > 1:
                metrics.per_output_token.observe((now - first) / (count - 1))
            self._finish(chunk.finish_reason)

    def end(self, outcome: str) -> None:
        """Count those that are still unfinished as ended so, and tell the exchange."""
        if self._running:
            self._metrics.finished.labels(finished_reason=outcome).inc(self._running)
            self._exchange.outcome = outcome
        else:
            self._metrics.e2e.observe(self._exchange.seconds)
        if self._exchange.places is not None:
            self._exchange.places.close()
        self._exchange.facts |= {
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "finish_reasons": self._finish_reasons,
        }

    def _finish(self, reason: str) -> None:
        self._running -= 1
        self._finish_reasons.append(reason)
        self._metrics.finished.labels(finished_reason=reason).inc()
        if self._exchange.places is not None:
            self._exchange.places.leave()
