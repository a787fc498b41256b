"""Runs the prompts of one HTTP request on the engine and brings their chunks together."""

import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
from lorasb_runtime.engines.base import Chunk, GenerationRequest, SamplingParams, TokenLogprob
from lorasb_server.errors import FieldError, outcome_of
from lorasb_server.exchange import Exchange
from lorasb_server.interleave import interleave
from lorasb_server.service import Service
from lorasb_server.tally import Tally
from lorasb_server.tenants.caller import Caller


@dataclass
class Generation:
    """A checked request that is ready to run: prompts as tokens, `n` completions of each.

    Choice index = prompt's index * n + completion's index. With `prompt_only` what the engine
    generates is dropped, and each completion ends for its length.
    """

    service: Service
    caller: Caller
    exchange: Exchange
    prompts: list[list[int]]
    sampling: SamplingParams
    adapter: LoadedAdapter | None
    n: int
    prompt_only: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        service = self.service
        self.tally = Tally(service.metrics, service.meter, self.caller, self.exchange)

    def usage(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
            "total_tokens": tally.prompt_tokens + tally.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
        }

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(choice index, chunk) of all prompts as they come; closing it ends all of them.

        Raises QuotaError before the first where the tenant has no tokens left for today, and the
        error that ends the exchange before its time.
        """
        self.tally.begin(self.service.config.model_name, self.prompts, self.n, self.adapter)
        outcome = "abort"
        try:
            streams = [self._chunks_of(i) for i in range(len(self.prompts))]
            async with contextlib.aclosing(interleave(streams, self.exchange.stop)) as stream:
                async for prompt, chunk in stream:
                    if chunk.index == 0:
                        self.prompt_logprobs.setdefault(prompt, chunk.prompt_logprobs)
                    yield prompt * self.n + chunk.index, chunk
        except Exception as error:
            outcome = outcome_of(error)
            raise
        finally:
            if outcome == "abort" and self.exchange.stop.done():
                outcome = outcome_of(self.exchange.stop.result())
            self.tally.end(outcome)

    async def collect(self) -> list["Choice"]:
        """All completions, whole, in order of their index."""
        choices = [Choice() for _ in range(len(self.prompts) * self.n)]
        async with contextlib.aclosing(self.chunks()) as stream:
            async for index, chunk in stream:
                choices[index].add(chunk)
        return choices

    def shown_prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None]:
        """As vLLM shows them: for each prompt token, by token id; the first has none."""
        codec = self.service.engine.codec
        shown: list[dict[str, Any] | None] = [None]
        for entry in self.prompt_logprobs.get(prompt, ()):
            ranked: dict[int, tuple[float, int | None]] = {
                token: (value, rank) for rank, (token, value) in enumerate(entry.top, start=1)
            }
            ranked.setdefault(entry.token, (entry.logprob, None))
            shown.append(
                {
                    str(token): {
                        "logprob": finite(value),
                        "rank": rank,
                        "decoded_token": codec.token_text(token),
                    }
                    for token, (value, rank) in ranked.items()
                }
            )
        return shown

    async def _chunks_of(self, prompt: int) -> AsyncIterator[Chunk]:
        """The chunks of one prompt's completions, counted."""
        request = GenerationRequest(
            f"{self.id}-{prompt}",
            tuple(self.prompts[prompt]),
            self.sampling,
            self.adapter,
            self.n,
            self.caller.tenant,
        )
        async for said in self.service.engine.generate(request):
            chunk = _without_output(said) if self.prompt_only else said
            self.tally.take(prompt, chunk)
            yield chunk


@dataclass
class Choice:
    """One completion as far as it has come, or what of it has not been sent yet."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


def _without_output(chunk: Chunk) -> Chunk:
    return replace(chunk, text="", tokens=(), logprobs=(), finish_reason="length")


def finite(logprob: float) -> float | None:
    """JSON has no infinity: a token that could not be chosen is shown as OpenAI does.

    None for NaN, the log-probability of a token that has none.
    """
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def check_limits(
    service: Service,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    n: int,
    *,
    asked: int | None,
    length_param: str,
) -> None:
    """Refuse what the server or the model has no room for.

    asked: the tokens that the caller wants generated, None for as many as fit. length_param is
    the field that a refusal for length names.
    """
    longest = service.engine.info.max_model_len
    vocab = service.engine.info.vocab_size
    if n > service.config.max_n:
        raise FieldError("n", f"n: found {n}, expected at most {service.config.max_n}")
    for param, tokens in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if tokens and max(tokens) >= vocab:
            message = f"{param}: found token id {max(tokens)}, expected one below {vocab}"
            raise FieldError(param, message)
    asked = asked or 1
    for prompt in prompts:
        if len(prompt) + asked > longest:
            raise FieldError(
                length_param,
                f"This model's maximum context length is {longest} tokens; found {len(prompt)} "
                f"in the prompt and {asked} to be generated",
                "context_length_exceeded",
            )
        if not prompt:
            raise FieldError("prompt", "prompt: found no tokens, expected at least one")
        if max(prompt) >= vocab:
            raise FieldError(
                "prompt", f"prompt: found token id {max(prompt)}, expected one below {vocab}"
            )
