"""`lorasb train`: trains adapters, one for each data file."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit, note, phases

if TYPE_CHECKING:
    from lorasb_runtime.training.trainer import TrainResult

HELD_OUT = 0.1


def train(
    model: str = typer.Argument(help="Hugging Face id or local folder."),
    basis: Path = typer.Option(..., help="The basis file that the adapter is for."),
    output: Path = typer.Option(
        ..., "-o", "--output", help="The adapter file, or with --data-dir a folder for them."
    ),
    data: Path | None = typer.Option(None, help="JSON-lines file to train one adapter on."),
    data_dir: Path | None = typer.Option(
        None, help="Folder of JSON-lines files: one adapter each, named by the file's stem."
    ),
    eval_data: Path | None = typer.Option(None, help="File to measure the held-out loss on."),
    held_out: float | None = typer.Option(
        None, help="Share of the data set aside for that otherwise; 0.1 if unset."
    ),
    name: str | None = typer.Option(None, help="The adapter's name; the output's stem if unset."),
    epochs: int = typer.Option(3, help="Times that each example is seen."),
    lr: float = typer.Option(4e-3, help="Peak learning rate of the cores."),
    batch_size: int = typer.Option(4, help="Examples in one step."),
    seed: int = typer.Option(0, help="Decides order, split and random starts."),
    init: str = typer.Option("basis", help="Where cores start: basis (LoRA-SB's R0) or zero."),
    init_lr: float | None = typer.Option(
        None, help="What R0 is multiplied by; by default the rate of the first step."
    ),
    max_length: int = typer.Option(1024, help="Longest example in tokens."),
    dtype: str = typer.Option("float32", help="dtype of the base model while training."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Train an adapter's cores; the base model and the basis stay as they are."""
    jobs = _jobs(data, data_dir, output, name)
    share = _held_out_share(held_out, eval_data, data_dir)

    from lorasb_runtime.training.trainer import CoreTrainer, TrainConfig

    config = TrainConfig(epochs, lr, batch_size, seed, init, init_lr, share, max_length, dtype)
    trainer = CoreTrainer(model, basis, config)
    files = [(trainer.read(path), target, label) for path, target, label in jobs]
    held = trainer.read(eval_data) if eval_data else None
    results = []
    for file, target, label in files:
        with phases() as report:

            def tell(done: int, total: int, text: str, label: str = label) -> None:
                report(label, done, total, text)

            results.append(trainer.train(file, target, label, tell, held))
    if share and any(r.held_out_before is None for r in results):
        note("no held-out loss: too few examples to set some aside (--eval-data gives others)")
    shown = [dataclasses.asdict(r) for r in results]
    result = {"adapters": shown} if data_dir is not None else shown[0]
    emit(result, "\n".join(_line(r) for r in results), as_json)


def _held_out_share(held_out: float | None, eval_data: Path | None, data_dir: Path | None) -> float:
    """The share of each data file to set aside, after refusing what contradicts it."""
    if data_dir is not None and eval_data is not None:
        raise InputError("--eval-data goes with --data; with --data-dir each file is split")
    if held_out is not None and eval_data is not None:
        raise InputError("expected at most one of --eval-data and --held-out")
    return HELD_OUT if held_out is None else held_out


def _jobs(
    data: Path | None, data_dir: Path | None, output: Path, name: str | None
) -> list[tuple[Path, Path, str]]:
    """Data file, adapter file and adapter name of each adapter to train."""
    if (data is None) == (data_dir is None):
        raise InputError("expected exactly one of --data and --data-dir")
    if data is not None:
        if output.is_dir():
            raise InputError(f"{output}: found a folder, expected the adapter file to write")
        return [(data, output, output.stem if name is None else name)]
    assert data_dir is not None
    if name is not None:
        raise InputError("--name goes with --data; with --data-dir the files' stems are the names")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: found a file, expected a folder for the adapters")
    paths = sorted(data_dir.glob("*.jsonl"))
    if not paths:
        raise InputError(f"{data_dir}: found no *.jsonl file in this folder")
    return [(path, output / f"{path.stem}.safetensors", path.stem) for path in paths]


def _line(result: "TrainResult") -> str:
    text = f"{result.output}: {result.steps} steps in {result.seconds:.0f} s"
    if result.held_out_before is not None:
        text += f", held-out loss {result.held_out_before:.3f} -> {result.held_out_after:.3f}"
    return f"{text}, train loss {result.train_loss:.3f}"
