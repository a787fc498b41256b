"""From logits to tokens for the sequences of one step, with each one's own sampling rules."""

import torch

from lorasb_runtime.engines.base import TokenLogprob
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.ops.sampling import (
    RowSampling,
    log_probabilities,
    penalize,
    sample,
    uniform,
)


class Sampler:
    """Stateless but for the model's end tokens, which `min_tokens` keeps away."""

    def __init__(self, eos: frozenset[int]) -> None:
        self._eos = eos

    @torch.inference_mode()
    def choose(
        self, sequences: list[Sequence], logits: torch.Tensor
    ) -> list[tuple[int, tuple[TokenLogprob, ...]]]:
        """One token for each sequence from its logits [n, vocab] (float32, changed in place)."""
        wanted = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
        raw = log_probabilities(logits[wanted]) if wanted else None
        for i, sequence in enumerate(sequences):
            self._adjust(logits[i], sequence)
        tokens = sample(logits, [_row(s) for s in sequences]).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.matcher is not None:
                sequence.matcher.advance(token)
        result: list[tuple[int, tuple[TokenLogprob, ...]]] = [(t, ()) for t in tokens]
        if raw is not None:
            for row, i in enumerate(wanted):
                entry = _logprob(raw[row], tokens[i], sequences[i].sampling.logprobs or 0)
                result[i] = (tokens[i], (entry,))
        return result

    @torch.inference_mode()
    def read_prompt(self, sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        """Note the log-probabilities of the prompt tokens after positions start.. .

        logits: float32 [count, vocab], of one prefill chunk. Positions that are noted already
        (computed again after a preemption) are passed over.
        """
        first = len(sequence.prompt_logprobs)
        end = min(start + logits.shape[0], sequence.prompt_length - 1)
        if first >= end:
            return
        rows = log_probabilities(logits[first - start : end - start])
        for position, row in enumerate(rows, start=first):
            token = sequence.tokens[position + 1]
            entry = _logprob(row, token, sequence.sampling.prompt_logprobs or 0)
            sequence.prompt_logprobs.append(entry)

    def _adjust(self, logits: torch.Tensor, sequence: Sequence) -> None:
        """Penalties, bias, grammar and the ban on ending too early, on one row [vocab]."""
        p = sequence.sampling
        if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty:
            tokens = torch.tensor(sequence.tokens, dtype=torch.int64, device=logits.device)
            penalize(
                logits,
                tokens[: sequence.prompt_length],
                tokens[sequence.prompt_length :],
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
            )
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        if sequence.matcher is not None:
            allowed = sequence.matcher.allowed(logits.shape[0]).to(logits.device)
            logits.masked_fill_(~allowed, float("-inf"))
        elif sequence.generated < p.min_tokens:
            logits[sorted({*p.stop_token_ids, *self._eos})] = float("-inf")


def _row(sequence: Sequence) -> RowSampling:
    p = sequence.sampling
    draw = 0.0
    if p.temperature > 0:
        draw = uniform(sequence.seed, sequence.index, sequence.generated)
    return RowSampling(p.temperature, p.top_k, p.top_p, p.min_p, draw)


def _logprob(row: torch.Tensor, token: int, count: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if count:
        best = torch.topk(row, count)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(pairs)
    return TokenLogprob(token, row[token].item(), top)
