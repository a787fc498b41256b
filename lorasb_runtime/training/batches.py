"""Examples as padded batches, and their loss."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lorasb_runtime.training.data import NO_LOSS, Example


def shuffled_batches(
    examples: Sequence[Example], size: int, rng: random.Random
) -> Iterator[list[Example]]:
    """One epoch: every example once, in an order that `rng` decides."""
    order = list(examples)
    rng.shuffle(order)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def answer_losses(model: PreTrainedModel, batch: Sequence[Example]) -> torch.Tensor:
    """Each example's summed negative log-likelihood (nats) of its answer tokens: [examples].

    Examples are padded on the right. Logits are computed from the first answer token on only:
    the prompts' are not needed.
    """
    longest = max(len(example.tokens) for example in batch)
    first = min(_first_answer(example) for example in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), NO_LOSS, dtype=torch.int64)
    for row, example in enumerate(batch):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    device = model.device
    logits = model(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        logits_to_keep=longest - first + 1,
        use_cache=False,
    ).logits[:, :-1]
    wanted = labels[:, first:].reshape(-1).to(device)
    losses = cross_entropy(
        logits.float().flatten(0, 1), wanted, ignore_index=NO_LOSS, reduction="none"
    )
    return losses.view(len(batch), -1).sum(1)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, examples: Sequence[Example], size: int) -> float:
    """Mean negative log-likelihood (nats) of an answer token over all examples."""
    total, count = 0.0, 0
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        total += answer_losses(model, batch).sum().item()
        count += sum(example.answer_tokens for example in batch)
    return total / count


def _first_answer(example: Example) -> int:
    """Position of the first token with a loss; position 0 has nothing before it."""
    return next(i for i, label in enumerate(example.labels) if i and label != NO_LOSS)
