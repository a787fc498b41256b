"""Whether a merged model, read back from its folder, says what the base model plus deltas says."""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.errors import InputError, VerificationError
from lorasb_runtime.merging.checkpoint import MergeConfig, prepare
from lorasb_runtime.merging.delta import DeltaOf
from lorasb_runtime.merging.fold import Rounding
from lorasb_runtime.merging.source import target_weights
from lorasb_runtime.merging.view import ViewReader
from lorasb_runtime.models.load import load_causal_lm, load_state, load_tokenizer
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint
from lorasb_runtime.storage.shard_writer import DTYPES
from lorasb_runtime.storage.tensor_file import Tensors
from lorasb_runtime.types import Report

NEW_TOKENS = 16  # said greedily by the merged model after each prompt
# The same weights rounded on the side miss by so much; a merged model may miss by MARGIN times
# that, and by FLOOR of the largest logit in any case, as sums in float32 differ.
MARGIN = 4.0
FLOOR = 1e-4


@dataclass(frozen=True)
class Verification:
    """What was found on the prompts and NEW_TOKENS after each; logits in float32.

    difference: the largest between the merged model's and the reference's logits. rounding: the
    same where the reference's own weights are rounded to the output's dtypes. effect: the same
    between the reference and the base model. peak: the reference's largest logit. agreeing: how
    many of the `tokens` are the reference's choice too.
    """

    difference: float
    rounding: float
    effect: float
    peak: float
    agreeing: int
    tokens: int

    @property
    def allowed(self) -> float:
        return MARGIN * self.rounding + FLOOR * self.peak


class Verifier:
    """Compares a merged folder with the base model and the deltas, kept apart from the merge.

    The reference is W0 + delta, added in float64 and kept in float32 as a whole model; so is each
    of the four models that are loaded, one after the other.
    """

    def __init__(
        self,
        source: Checkpoint,
        basis: Basis,
        deltas: DeltaOf,
        config: MergeConfig,
        prompts: Sequence[str],
    ) -> None:
        """Raises InputError where the model has no tokenizer, or a prompt no tokens."""
        self.result: Verification | None = None
        self._tokenizer = load_tokenizer(source.folder)
        self._prompts = [self._encode(prompt) for prompt in prompts]
        self._source = source
        self._basis = basis
        self._deltas = deltas
        self._config = config

    def __call__(self, merged: Path, report: Report = lambda *_: None) -> None:
        """Raises VerificationError where more lies between them than rounding explains."""
        size = sum(entry.nbytes for entry in self._source.tensors.values())
        steps = itertools.count()

        def tell(what: str) -> None:
            report("verify", next(steps) * size, 4 * size, what)

        tell("the merged model")
        model = load_causal_lm(merged, torch.float32)
        texts = [_continue(model, prompt) for prompt in self._prompts]
        found = _logits(model, texts)
        kind, config = type(model), model.config
        del model

        def other(*, adapted: bool, rounded: bool) -> list[torch.Tensor]:
            gc.collect()
            tell("the base model" + adapted * ", adapted" + rounded * " and rounded")
            state = self._state(adapted=adapted, rounded=rounded)
            return _logits(load_state(kind, config, state), texts)

        reference = other(adapted=True, rounded=False)
        result = self.result = Verification(
            difference=_largest(found, reference),
            rounding=_largest(other(adapted=True, rounded=True), reference),
            effect=_largest(other(adapted=False, rounded=False), reference),
            peak=max(logits.abs().max().item() for logits in reference),
            agreeing=sum(_agreeing(f, r) for f, r in zip(found, reference, strict=True)),
            tokens=NEW_TOKENS * len(texts),
        )
        tell("")
        if not result.difference <= result.allowed:
            raise VerificationError(
                f"verify: found logits {result.difference:.3g} away from the base model's plus "
                f"adapters, expected at most {result.allowed:.3g} (rounding the weights alone "
                f"makes {result.rounding:.3g}, the adapters {result.effect:.3g}); "
                "nothing was written"
            )

    def _encode(self, prompt: str) -> list[int]:
        tokens: list[int] = self._tokenizer(prompt)["input_ids"]
        if not tokens:
            raise InputError(f"prompt {prompt!r}: found no tokens, expected at least one")
        return tokens

    def _state(self, *, adapted: bool, rounded: bool) -> Tensors:
        """Every tensor under its name: floating-point ones in float32, others as they are."""
        view = prepare(self._source, self._basis, self._config)
        reader = ViewReader(view)
        targets: dict[str, list[tuple[int | None, int]]] = {}
        for place, index in target_weights(view, self._basis).items() if adapted else ():
            targets.setdefault(place.name, []).append((place.expert, index))
        state = {}
        for name, entry in view.checkpoint.tensors.items():
            state[name] = reader.whole(name)
            if entry.dtype not in DTYPES:
                continue
            dtype = self._config.dtype or DTYPES[entry.dtype]
            exact = state[name].float()
            if name in targets:  # a copy, as what is mapped must not be changed
                exact = state[name].to(torch.float64, copy=True)
            for expert, index in targets.get(name, ()):
                part = exact if expert is None else exact[expert]
                self._add(part, index, dtype if rounded else None)
            state[name] = exact.to(dtype).float() if rounded else exact.float()
        return state

    def _add(self, weight: torch.Tensor, index: int, dtype: torch.dtype | None) -> None:
        """Add a target's delta to its float64 weight, and round the sum where a dtype is given."""
        target = self._basis.targets[index]
        delta = self._deltas(index, torch.float64).block(slice(None), slice(None))
        weight += delta.t() if target.transposed else delta
        if dtype is not None:
            chance = self._config.rounding  # other draws, of the same kind
            other = Rounding(chance.stochastic, chance.seed + 1)
            weight.copy_(other.round(target.module)(weight.float(), dtype))


def _continue(model: Any, prompt: list[int]) -> list[int]:
    """The prompt and NEW_TOKENS more, each the likeliest; with the model's cache if it has one."""
    tokens, new, cache = list(prompt), list(prompt), None
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            out = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            cache = getattr(out, "past_key_values", None)
            new = tokens[-1:] if cache is not None else tokens
    return tokens


def _logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """[tokens, vocabulary] for each text."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].clone()
            for tokens in texts
        ]


def _largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((f - e).abs().max().item() for f, e in pairs)


def _agreeing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Of the choices that made the new tokens, how many are the same."""
    chosen = slice(-NEW_TOKENS - 1, -1)
    return int((found[chosen].argmax(-1) == expected[chosen].argmax(-1)).sum())
