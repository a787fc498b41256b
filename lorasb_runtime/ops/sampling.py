"""Choosing tokens: penalties, filters and the draw, for all rows of a batch at once.

The draw of a row depends on its own uniform number alone, so that what else is in the batch
changes nothing.
"""

import hashlib
from dataclasses import dataclass

import torch

BLOCK = 64  # of the vocabulary, which is a multiple of it as a rule


@dataclass(frozen=True)
class RowSampling:
    """How one row's token is chosen; temperature 0 is greedy. `uniform` in [0, 1) is its draw."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a function of seed, completion index and token position."""
    text = f"{seed}:{choice}:{position}".encode()
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return (bits >> 11) / (1 << 53)


def penalize(
    logits: torch.Tensor,
    prompt: torch.Tensor,
    output: torch.Tensor,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Apply the penalties to one row [vocab] in place.

    repetition (as in CTRL, arXiv 1909.05858) counts prompt and output; presence and frequency
    (OpenAI's definition) count the output alone. prompt, output: token ids, int64.
    """
    if repetition != 1.0:
        seen = torch.unique(torch.cat([prompt, output]))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if (presence or frequency) and output.numel():
        tokens, counts = torch.unique(output, return_counts=True)
        logits[tokens] -= presence + frequency * counts.to(logits.dtype)


def sample(logits: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    """Tokens [rows], int64, from float32 logits [rows, vocab] by each row's own rules."""
    tokens = greedy(logits)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    plain = [i for i in drawn if not _filtered(rows[i])]
    filtered = [i for i in drawn if _filtered(rows[i])]
    if plain:
        probs = _probabilities(logits, rows, plain)
        tokens[plain] = _draw(probs, rows, plain)
    if filtered:
        probs, order = _probabilities(logits, rows, filtered).sort(dim=-1, descending=True)
        ranks = _draw(_filter(probs, rows, filtered), rows, filtered)
        tokens[filtered] = order.gather(1, ranks[:, None])[:, 0]
    return tokens


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first largest of each row, int64: [rows, vocab] -> [rows].

    By blocks, as torch's CPU kernel finds a maximum several times faster than its place.
    """
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % BLOCK:
        return torch.argmax(logits, dim=-1)
    blocks = logits.unflatten(-1, (-1, BLOCK))
    best = torch.argmax(blocks.amax(dim=-1), dim=-1)
    within = torch.argmax(blocks[torch.arange(rows), best], dim=-1)
    return best * BLOCK + within


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Natural log-probabilities [rows, vocab] before temperature and filters, float32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _filtered(row: RowSampling) -> bool:
    return row.top_k > 0 or row.top_p < 1 or row.min_p > 0


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _probabilities(
    logits: torch.Tensor, rows: list[RowSampling], chosen: list[int]
) -> torch.Tensor:
    temperature = _column([rows[i].temperature for i in chosen], logits)
    return torch.softmax(logits[chosen].double() / temperature, dim=-1)


def _filter(probs: torch.Tensor, rows: list[RowSampling], chosen: list[int]) -> torch.Tensor:
    """Zero what min_p, top_k and top_p (in this order) leave out; probs are sorted, descending."""
    keep = probs >= probs[:, :1] * _column([rows[i].min_p for i in chosen], probs)
    vocab = probs.shape[1]
    top_k = _column([float(rows[i].top_k if rows[i].top_k > 0 else vocab) for i in chosen], probs)
    keep &= torch.arange(vocab, device=probs.device)[None, :] < top_k
    kept = probs * keep
    kept = kept / kept.sum(dim=-1, keepdim=True)
    before = kept.cumsum(dim=-1) - kept
    return kept * (before < _column([rows[i].top_p for i in chosen], probs))


def _draw(probs: torch.Tensor, rows: list[RowSampling], chosen: list[int]) -> torch.Tensor:
    """Invert the cumulative distribution at each row's uniform number; probs need not sum to 1."""
    cumulative = probs.cumsum(dim=-1)
    target = _column([rows[i].uniform for i in chosen], probs) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = (probs > 0).to(torch.uint8).cumsum(dim=-1, dtype=torch.int64).argmax(dim=-1)
    return torch.minimum(tokens, last)
