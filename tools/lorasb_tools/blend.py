"""`lorasb blend`: many adapters into one."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorasb_tools import method_flags
from lorasb_tools.report import JSON_FLAG, emit

if TYPE_CHECKING:
    from lorasb_runtime.storage.adapter_file import Adapter


def blend(
    adapters: list[str] = typer.Argument(help="ADAPTER or ADAPTER=WEIGHT, one or several."),
    output: Path = typer.Option(..., "-o", "--output", help="The adapter file to write."),
    method: str = method_flags.METHOD,
    basis: Path | None = typer.Option(
        None, help="The adapters' basis file; slerp, core-ties and core-dare need it."
    ),
    normalize: bool | None = method_flags.NORMALIZE,
    lambda_: float | None = method_flags.LAMBDA,
    density: float | None = method_flags.DENSITY,
    majority_sign: str | None = method_flags.MAJORITY_SIGN,
    seed: int | None = method_flags.SEED,
    rescale: bool | None = method_flags.RESCALE,
    t: float | None = method_flags.T,
    dtype: str = typer.Option("float32", help="bfloat16, float16 or float32."),
    name: str | None = typer.Option(None, help="The adapter's name; the file's stem by default."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Write what a method makes of adapters of one basis, by default their weighted sum.

    A weight may be negative; without one it is 1.
    """
    from lorasb_runtime.importing.output import check_output_file
    from lorasb_runtime.merging import find_method
    from lorasb_runtime.merging.blend import blend_adapters
    from lorasb_runtime.merging.weighted import load_weighted
    from lorasb_runtime.models.load import parse_dtype
    from lorasb_runtime.storage.adapter_file import save_adapter
    from lorasb_runtime.storage.basis_file import load_basis

    options = method_flags.given(
        normalize=normalize,
        lambda_=lambda_,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
        rescale=rescale,
        t=t,
    )
    chosen = find_method(method).with_options(options)
    wanted = parse_dtype(dtype)
    check_output_file(output, force=force)
    loaded = load_basis(basis) if basis is not None else None
    weighted = [load_weighted(text, loaded) for text in adapters]
    made = blend_adapters(weighted, output.stem if name is None else name, wanted, chosen, loaded)
    saved = save_adapter(made, output)
    _tell(output, saved, dtype, as_json)


def _tell(output: Path, saved: "Adapter", dtype: str, as_json: bool) -> None:
    parts = saved.info["blend"]
    method, options = saved.info["method"], saved.info["options"]
    result = {
        "output": str(output),
        "name": saved.name,
        "version": saved.version,
        "basis": saved.basis,
        "dtype": dtype,
        "method": method,
        "options": options,
        "adapters": parts,
    }
    lines = [
        f"{output}: version {saved.version[:12]}, {saved.cores.numel():,} numbers in {dtype}",
        "  " + " ".join([method, *(f"{name}={value}" for name, value in options.items())]),
        *(f"  {p['weight']:+g} * {p['name']} {p['version'][:12]}" for p in parts),
    ]
    emit(result, "\n".join(lines), as_json)
