"""`lorasb derive`: makes a basis for a model."""

from pathlib import Path

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit, phases

GRADIENT_FLAGS = ("samples", "seed", "max_length", "batch_size")


def derive(
    context: typer.Context,
    model: str = typer.Argument(help="Hugging Face id or local folder."),
    output: Path = typer.Option(..., "-o", "--output", help="The basis file to write."),
    method: str = typer.Option("lora-sb", help="lora-sb (from data) or lora-xs (from weights)."),
    data: list[Path] = typer.Option(
        [], help="JSON-lines file or a folder of them; several are pooled. (repeatable)"
    ),
    rank: int = typer.Option(16, min=1, help="Rank of the basis."),
    samples: int = typer.Option(64, min=1, help="Samples that give the gradient."),
    targets: str | None = typer.Option(
        None, help="Regular expression for module names; all linear layers by default."
    ),
    seed: int = typer.Option(0, help="Chooses the samples."),
    dtype: str = typer.Option("float32", help="dtype of the forward and backward passes."),
    max_length: int = typer.Option(1024, min=2, help="Longest sample in tokens."),
    batch_size: int = typer.Option(8, min=1, help="Samples in one forward and backward pass."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Derive the frozen pair (B, A) that all adapters of MODEL share."""
    if output.is_dir():
        raise InputError(f"{output}: found a folder, expected the basis file to write")

    from lorasb_runtime.basis import find_method
    from lorasb_runtime.storage.basis_file import save_basis
    from lorasb_runtime.training.derive import DeriveConfig, derive_basis

    if not find_method(method).needs_gradient:
        _refuse_gradient_flags(context, method)
    config = DeriveConfig(method, rank, samples, targets, seed, dtype, max_length, batch_size)
    with phases() as report:
        basis = derive_basis(model, data, config, report)
    save_basis(basis, output)
    result = {
        "output": str(output),
        "method": method,
        "digest": basis.digest,
        "targets": len(basis.targets),
        "rank": rank,
        "adapter_size": basis.size,
        "info": basis.info,
    }
    text = (
        f"{output}: {method} basis of rank {rank} for {len(basis.targets)} modules\n"
        f"  digest {basis.digest}\n"
        f"  an adapter is {basis.size:,} numbers ({2 * basis.size:,} bytes in bf16)"
    )
    emit(result, text, as_json)


def _refuse_gradient_flags(context: typer.Context, method: str) -> None:
    """A method that reads the weights alone has no use for what chooses or limits samples."""
    for name in GRADIENT_FLAGS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"method {method} takes no {flag}: its basis is of the weights")
