"""Between our requests and chunks and vLLM's: sampling parameters in, outputs out."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.sampling_params import (
    RequestOutputKind,
    StructuredOutputsParams,
)
from vllm.sampling_params import (
    SamplingParams as VllmSampling,
)

from lorasb_runtime.engines.base import (
    Chunk,
    FinishReason,
    GenerationRequest,
    Grammar,
    TokenLogprob,
)
from lorasb_runtime.errors import EngineError, InputError

# vLLM raises a temperature below this to it, without telling the caller.
SMALLEST_TEMPERATURE = 0.01
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def vllm_sampling(request: GenerationRequest, room: int) -> VllmSampling:
    """Every field of the request's sampling; room: tokens left in the context.

    Raises InputError for what vLLM does not do.
    """
    p = request.sampling
    if 0.0 < p.temperature < SMALLEST_TEMPERATURE:
        raise InputError(
            f"temperature: found {p.temperature}, expected 0 or at least {SMALLEST_TEMPERATURE} "
            "with this engine"
        )
    limit = min(room, p.max_tokens or room)
    try:
        return VllmSampling(
            n=request.n,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=dict(p.logit_bias) or None,
            seed=p.seed,
            max_tokens=limit,
            min_tokens=min(p.min_tokens, limit),
            stop=list(p.stop),
            stop_token_ids=list(p.stop_token_ids),
            # A grammar lets an end token come only where its text may end, so it always counts.
            ignore_eos=p.ignore_eos and p.grammar is None,
            skip_special_tokens=p.skip_special_tokens,
            logprobs=p.logprobs,
            prompt_logprobs=p.prompt_logprobs,
            structured_outputs=None if p.grammar is None else _structured(p.grammar),
            output_kind=RequestOutputKind.DELTA,
        )
    except (VLLMClientError, ValueError) as error:
        raise InputError(str(error)) from None


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    match grammar.kind:
        case "json_schema":
            return StructuredOutputsParams(json=grammar.text)
        case "regex":
            return StructuredOutputsParams(regex=grammar.text)
        case "choice":
            return StructuredOutputsParams(choice=json.loads(grammar.text))
        case "lark":
            return StructuredOutputsParams(grammar=grammar.text)


def chunks_of(output: RequestOutput, request: GenerationRequest, *, first: bool) -> Iterator[Chunk]:
    """The chunks of one delta of vLLM's. Raises EngineError for a completion that vLLM gave up.

    first: whether nothing has come of completion 0 before.
    """
    p = request.sampling
    for part in output.outputs:
        reason = part.finish_reason
        if reason is not None and reason not in REASONS:
            raise EngineError(f"the engine ended this request ({reason})")
        logprobs: tuple[TokenLogprob, ...] = ()
        if p.logprobs is not None and part.logprobs:
            pairs = zip(part.token_ids, part.logprobs, strict=True)
            logprobs = tuple(_logprob(token, entry, p.logprobs) for token, entry in pairs)
        opening = first and part.index == 0
        yield Chunk(
            part.index,
            part.text,
            tuple(part.token_ids),
            logprobs,
            None if reason is None else REASONS[reason],
            part.stop_reason,
            cached_tokens=(output.num_cached_tokens or 0) if opening else 0,
            prompt_logprobs=_prompt_logprobs(output, request) if opening else (),
        )


def _prompt_logprobs(output: RequestOutput, request: GenerationRequest) -> tuple[TokenLogprob, ...]:
    count = request.sampling.prompt_logprobs
    if count is None or not output.prompt_logprobs:
        return ()
    pairs = zip(request.prompt[1:], output.prompt_logprobs[1:], strict=True)
    return tuple(_logprob(token, entry, count) for token, entry in pairs)


def _logprob(token: int, entry: Mapping[int, Any], count: int) -> TokenLogprob:
    """vLLM gives the chosen token and the `count` best, each with its rank from 1."""
    ranked = sorted((e.rank, t, e.logprob) for t, e in entry.items() if e.rank <= count)
    top = tuple((t, logprob) for _, t, logprob in ranked)
    return TokenLogprob(token, entry[token].logprob, top[:count])
