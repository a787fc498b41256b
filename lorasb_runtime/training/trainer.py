"""Training cores: the base model and the basis are frozen, r x r numbers per target learn."""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.models.adapted_linear import TrainableCore, adapt_model
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer, parse_dtype
from lorasb_runtime.models.locate import locate_model
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint
from lorasb_runtime.storage.match import check_model
from lorasb_runtime.training.batches import answer_losses, mean_loss, shuffled_batches
from lorasb_runtime.training.data import DataFile, Example, read_data
from lorasb_runtime.training.rates import learning_rate, rate_factor

Report = Callable[[int, int, str], None]  # steps done, steps in all, note

CHECKPOINT_STEPS = 50
XS_START_STD = 1e-5  # LoRA-XS starts its cores at N(0, 1e-5)
CLIP_NORM = 1.0
SMALLEST_SPLIT = 10  # with fewer examples none is held out


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters. `init_lr` None: the rate of the first step (LoRA-SB's own choice)."""

    epochs: int = 3
    lr: float = 4e-3
    batch_size: int = 4
    seed: int = 0
    init: str = "basis"
    init_lr: float | None = None
    held_out: float = 0.1
    max_length: int = 1024
    dtype: str = "float32"


@dataclass(frozen=True)
class TrainResult:
    """Losses are nats per answer token; held-out ones are None when nothing is held out.

    `held_out_before` is the base model's, without any adapter.
    """

    output: str
    version: str
    examples: int
    held_out_examples: int
    steps: int
    seconds: float
    train_loss: float
    held_out_before: float | None
    held_out_after: float | None


class CoreTrainer:
    """A model adapted to a basis, ready to train one adapter after the other.

    Training a file gives the same adapter whether others were trained before it or not.
    """

    def __init__(self, model: str, basis_path: Path, config: TrainConfig) -> None:
        """Raises InputError for settings, BasisMismatchError for a basis, that do not fit."""
        self._config = config
        self._basis = load_basis(basis_path)
        _check(config, self._basis)
        folder = locate_model(model)
        check_model(self._basis, open_checkpoint(folder), str(basis_path))
        self._model = load_causal_lm(folder, parse_dtype(config.dtype))
        self.codec = TextCodec(load_tokenizer(folder))
        self._cores: list[TrainableCore] = []
        adapt_model(self._model, self._basis, self._make_core)
        self._rates = [rate_factor(self._basis, t.module) for t in self._basis.targets]

    def _make_core(self, index: int) -> TrainableCore:
        target = self._basis.targets[index]
        a = self._basis.a(target.module).to(self._model.dtype)
        core = TrainableCore(a, torch.zeros(target.rank, target.rank), self._basis.scaling)
        self._cores.append(core.to(self._model.device))
        return core

    def read(self, path: Path) -> DataFile:
        return read_data(path, self.codec, self._config.max_length)

    def train(
        self,
        data: DataFile,
        output: Path,
        name: str,
        report: Report,
        held_out: DataFile | None = None,
    ) -> TrainResult:
        """Train on `data` and write the adapter, also after every epoch and CHECKPOINT_STEPS.

        `held_out` is a file of its own to measure on; without it the config's share of `data` is
        set aside. An interruption leaves the last checkpoint at `output`.
        """
        started = time.monotonic()
        config = self._config
        learned, aside = _split(data, held_out, config)
        steps_in_all = config.epochs * math.ceil(len(learned) / config.batch_size)
        self._set_cores(None)
        before = mean_loss(self._model, aside, config.batch_size) if aside else None
        self._set_cores(self._initial_rate(steps_in_all))
        optimizer = self._optimizer()
        info = self._info(data, held_out, len(learned), len(aside), steps_in_all)
        rng = random.Random(f"{config.seed}:order")
        step, loss = 0, math.nan
        for _ in range(config.epochs):
            total, count = 0.0, 0
            for batch in shuffled_batches(learned, config.batch_size, rng):
                rate = learning_rate(config.lr, step, steps_in_all)
                value, tokens = self._step(optimizer, batch, rate)
                total, count, step = total + value, count + tokens, step + 1
                report(step, steps_in_all, f"loss {value / tokens:.3f}")
                if step % CHECKPOINT_STEPS == 0 and step < steps_in_all:
                    self._save(output, name, {**info, "steps": step, "complete": False})
            loss = total / count
            if step < steps_in_all:
                self._save(output, name, {**info, "steps": step, "complete": False})
        after = mean_loss(self._model, aside, config.batch_size) if aside else None
        losses = {"train_loss": loss, "held_out_before": before, "held_out_after": after}
        saved = self._save(output, name, {**info, "steps": step, "complete": True, **losses})
        return TrainResult(
            output=str(output),
            version=saved.version,
            examples=len(learned),
            held_out_examples=len(aside),
            steps=step,
            seconds=time.monotonic() - started,
            train_loss=loss,
            held_out_before=before,
            held_out_after=after,
        )

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: list[Example], rate: float
    ) -> tuple[float, int]:
        """One optimiser step; the batch's summed loss and its answer tokens.

        Raises InputError when the loss is no number any more: the rate was too high.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = answer_losses(self._model, batch).sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"found a loss of {loss.item()} in training, expected a number: "
                f"--lr {self._config.lr:g} is too high, or --dtype {self._config.dtype} too narrow"
            )
        tokens = sum(example.answer_tokens for example in batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_([c.core for c in self._cores], CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), tokens

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [core.core], "factor": factor}
            for core, factor in zip(self._cores, self._rates, strict=True)
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _initial_rate(self, steps: int) -> float:
        """What R0 is multiplied by; 0 starts the cores at zero."""
        config = self._config
        if config.init == "zero":
            return 0.0
        return learning_rate(config.lr, 0, steps) if config.init_lr is None else config.init_lr

    @torch.no_grad()
    def _set_cores(self, initial_rate: float | None) -> None:
        """Start all cores anew; None sets them to zero, which is the base model."""
        generator = torch.Generator().manual_seed(self._config.seed)
        for target, core in zip(self._basis.targets, self._cores, strict=True):
            core.core.grad = None
            r0 = self._basis.r0(target.module)
            if not initial_rate:
                core.core.zero_()
            elif r0 is not None:
                core.core.copy_(initial_rate * r0)
            else:
                noise = torch.randn(core.core.shape, generator=generator)
                core.core.copy_(XS_START_STD * noise)

    def _info(
        self, data: DataFile, held_out: DataFile | None, learned: int, aside: int, steps: int
    ) -> dict[str, Any]:
        info: dict[str, Any] = {**dataclasses.asdict(self._config), "total_steps": steps}
        info["data"] = {"name": data.name, "digest": data.digest, "examples": learned}
        if held_out is not None:
            info["held_out_data"] = {"name": held_out.name, "digest": held_out.digest}
        info["held_out_examples"] = aside
        return info

    def _save(self, output: Path, name: str, info: dict[str, Any]) -> Adapter:
        cores = torch.cat([c.core.detach().cpu().flatten() for c in self._cores])
        adapter = Adapter(cores, self._basis.digest, name, self._basis.base_model, info)
        return save_adapter(adapter, output)


def _split(
    data: DataFile, held_out: DataFile | None, config: TrainConfig
) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and those set aside to measure on."""
    examples = list(data.examples)
    if held_out is not None:
        return examples, list(held_out.examples)
    if len(examples) < SMALLEST_SPLIT or not config.held_out:
        return examples, []
    random.Random(f"{config.seed}:split").shuffle(examples)
    aside = max(1, round(config.held_out * len(examples)))
    return examples[aside:], examples[:aside]


def _check(config: TrainConfig, basis: Basis) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 2)):
        if getattr(config, name) < least:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least {least}")
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise InputError(f"lr: found {config.lr}, expected a rate above zero")
    if not 0 <= config.held_out < 1:
        raise InputError(f"held-out: found {config.held_out}, expected a share from 0 to below 1")
    if config.init not in ("basis", "zero"):
        raise InputError(f"init: found {config.init!r}, expected basis or zero")
    has_r0 = any(basis.r0(t.module) is not None for t in basis.targets)
    if config.init_lr is not None:
        if config.init == "zero" or not has_r0:
            raise InputError("init-lr multiplies the basis' R0, which is not used here")
        if not math.isfinite(config.init_lr):
            raise InputError(f"init-lr: found {config.init_lr}, expected a finite number")
