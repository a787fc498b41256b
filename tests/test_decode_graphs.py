"""Decode steps in fixed places: what a CUDA graph would record, run again and again on the CPU."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import random_adapter, random_basis, reference_logits
from driving import Driven, drive

from lorasb_runtime.engines.torch import kv_batch
from lorasb_runtime.engines.torch.decode_graphs import Run
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis


class Recorder:
    """In the place of CUDA: what is recorded runs again, into one and the same tensor."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.recorded += 1
        place = run().clone()

        def replay() -> torch.Tensor:
            self.replayed += 1
            return place.copy_(run())

        return replay


def driven(
    folder: Path,
    basis: Basis,
    owners: list[Adapter | None],
    record: Callable[[Run], Run],
    steps: int = 25,
) -> list[Driven]:
    """Prompts of 1 to 50 tokens, so that sequences are of several size classes, and change them."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randint(1, 50))] for _ in owners]
    return drive(folder, basis, prompts, owners, steps=steps, record=record)


@pytest.mark.parametrize("attention", ["kernel", "torch"])
@pytest.mark.parametrize("kind", ["pico", "pico_gpt2"])
@pytest.mark.parametrize("adapted", [True, False])
def test_every_row_has_its_own_logits_in_whatever_step(
    adapted: bool,
    kind: str,
    attention: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if attention == "torch":  # as on a GPU
        monkeypatch.setattr(kv_batch, "attention_kernel", lambda *_: None)
    pico = request.getfixturevalue(kind)
    basis = random_basis(pico, rank=4, scaling=0.5)
    owners: list[Adapter | None] = [None] * 6
    if adapted:
        owners[1:4] = [random_adapter(basis, i) for i in range(3)]
        owners[5] = owners[1]
    recorder = Recorder()
    for sequence, owner in zip(driven(pico, basis, owners, recorder), owners, strict=True):
        expected = reference_logits(pico, basis, owner, sequence.tokens)
        assert sequence.error(expected) < 2e-5
    assert 1 < recorder.recorded < recorder.replayed - 10


def wrong(run: Run) -> Run:
    return lambda: run() + 1


def failing(run: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("record", "reason"), [(wrong, "found logits off by"), (failing, "not permitted")]
)
def test_what_cannot_be_recorded_runs_as_it_is(
    record: Callable[[Run], Run], reason: str, pico: Path, caplog: pytest.LogCaptureFixture
) -> None:
    basis = random_basis(pico, rank=4, scaling=0.5)
    owners: list[Adapter | None] = [random_adapter(basis, 0), None]
    with caplog.at_level(logging.WARNING):
        found = driven(pico, basis, owners, record, steps=4)
    for sequence, owner in zip(found, owners, strict=True):
        assert sequence.error(reference_logits(pico, basis, owner, sequence.tokens)) < 2e-5
    (told,) = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert reason in told


def test_a_row_that_overflows_keeps_no_step_from_being_recorded_later(
    pico: Path, caplog: pytest.LogCaptureFixture
) -> None:
    basis = random_basis(pico, rank=4, scaling=0.5)
    broken = replace(random_adapter(basis, 0), cores=torch.full((basis.size,), 3e38))
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        spoiled, own = driven(pico, basis, [broken, None], recorder, steps=4)
    assert spoiled.logits[1:].isnan().all() and not recorder.recorded
    assert own.error(reference_logits(pico, basis, None, own.tokens)) < 2e-5
    assert not [r for r in caplog.records if "CUDA graphs" in r.getMessage()]
