"""What every engine offers and what it is asked: requests in, chunks of text out.

A request carries its adapter as loaded cores, so a version is fixed when the request is made and
cannot change under it.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.errors import InputError

if TYPE_CHECKING:
    from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
    from lorasb_runtime.models.text import TextCodec

FinishReason = Literal["stop", "length", "abort"]
# Upper bounds of the step sizes that EngineStats counts, in sequences.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


GrammarKind = Literal["json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What a completion has to conform to.

    text: a JSON schema, a regular expression, a JSON list of the texts to choose from, or a
    context-free grammar in Lark's syntax.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends; fields and defaults as vLLM names them.

    temperature 0 is greedy. top_k 0 or -1, top_p 1 and min_p 0 switch the filter off.
    max_tokens None means up to the context's end. logprobs counts the alternatives to report
    with each token (None: no log-probabilities at all), prompt_logprobs with each prompt token.
    A grammar ends a sequence when nothing may follow, min_tokens or not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and `n` completions of it under one adapter (None: the base model).

    Work on a prompt is shared only between requests of one `tenant` under one adapter version.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: "LoadedAdapter | None" = None
    n: int = 1
    tenant: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with the log-probabilities (natural log, before temperature) around it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """New output of completion `index`; the last chunk of each has a finish reason.

    `text` never holds part of a stop string or of a multi-byte character. `tokens` are the ids
    generated since the last chunk, an ending eos or stop token included. `cached_tokens` says, in
    the first chunk of completion 0, how much of the prompt was found in the prefix cache; the
    same chunk holds `prompt_logprobs`, one entry for each prompt token after the first.
    `queue_seconds` says, in the first chunk of each completion, how long it waited for its first
    step; None where the engine cannot tell.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    queue_seconds: float | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What the engine serves: its context length in tokens and the dtype it computes in.

    core_dtype: of the slots' cores, to which an adapter is rounded. max_num_seqs: sequences that
    run at once; more of them wait.
    """

    max_model_len: int
    vocab_size: int
    dtype: str
    core_dtype: str = "float32"
    max_num_seqs: int = SchedulerConfig.max_num_seqs


def check_request(request: GenerationRequest, info: EngineInfo, *, has_basis: bool) -> None:
    """Raises InputError for a request that no engine with this `info` can ever run."""
    longest = info.max_model_len
    if not request.prompt:
        raise InputError("prompt: found no tokens, expected at least one")
    if len(request.prompt) >= longest:
        raise InputError(
            f"prompt: found {len(request.prompt)} tokens, expected fewer than the context "
            f"of {longest}"
        )
    for token in (*request.sampling.logit_bias, *request.sampling.stop_token_ids):
        if not 0 <= token < info.vocab_size:
            raise InputError(f"token id: found {token}, expected one below {info.vocab_size}")
    if request.adapter is not None and not has_basis:
        raise InputError("this server has no basis, so it serves no adapters")


@dataclass(frozen=True)
class EngineStats:
    """Gauges read at any time: sequences, adapter slots and KV tokens in use.

    Counts since the start: slot_hits, admissions that found their adapter version resident;
    slot_fills, copies of cores into a slot; slot_evictions, those that took another version's slot.

    step_seconds counts the time spent in steps, forward_seconds what of it was the model's forward.
    preemptions counts sequences sent back to the queue for want of KV cache. batch_counts: how many
    steps had at most BATCH_SIZES[i] sequences, the last entry all of them; batch_sequences: how
    many sequences they had together.
    """

    running: int
    waiting: int
    slots_used: int
    slots: int
    kv_tokens_used: int
    kv_tokens: int
    steps: int
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    slot_hits: int = 0
    slot_fills: int = 0
    slot_evictions: int = 0
    preemptions: int = 0
    batch_counts: tuple[int, ...] = ()
    batch_sequences: int = 0


class Engine(Protocol):
    """Two properties and five methods: everything that the server needs of an engine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def codec(self) -> "TextCodec": ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Chunks of all the request's completions as they come.

        Raises InputError at the first step for a prompt that does not fit, EngineError when the
        engine fails. Closing the iterator early (`aclose`) aborts the request.
        """

    def stats(self) -> EngineStats: ...

    def check_health(self) -> None:
        """Raises EngineError where no request will be answered (any more); cheap, never waits."""

    def start(self) -> None: ...

    def close(self) -> None:
        """Stop; requests still running end with EngineError."""
