"""`lorasb merge`: folds adapters into a Hugging Face checkpoint."""

from dataclasses import replace
from pathlib import Path

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools import merge_flags, method_flags
from lorasb_tools.merge_report import tell
from lorasb_tools.report import JSON_FLAG, phases


def merge(
    model: str = typer.Argument(help="Hugging Face id or local folder."),
    adapters: list[str] = typer.Argument(help="ADAPTER or ADAPTER=WEIGHT, one or several."),
    basis: Path = typer.Option(..., help="The adapters' basis file."),
    output: Path = merge_flags.OUTPUT,
    method: str = method_flags.METHOD,
    normalize: bool | None = method_flags.NORMALIZE,
    lambda_: float | None = method_flags.LAMBDA,
    density: float | None = method_flags.DENSITY,
    majority_sign: str | None = method_flags.MAJORITY_SIGN,
    rescale: bool | None = method_flags.RESCALE,
    t: float | None = method_flags.T,
    subtract: bool = merge_flags.SUBTRACT,
    dtype: str | None = merge_flags.DTYPE,
    rounding: str = merge_flags.ROUNDING,
    seed: int | None = method_flags.SEED,
    untie: bool = merge_flags.UNTIE,
    dequantize: bool = merge_flags.DEQUANTIZE,
    reversible: bool = merge_flags.REVERSIBLE,
    measure_all: bool = merge_flags.MEASURE_ALL,
    verify: bool = merge_flags.VERIFY,
    prompt: list[str] = merge_flags.PROMPT,
    prompts: Path | None = merge_flags.PROMPTS,
    workers: int | None = merge_flags.WORKERS,
    force: bool = merge_flags.FORCE,
    as_json: bool = JSON_FLAG,
) -> None:
    """Fold one or several weighted adapters into MODEL's weights, shard by shard."""
    from lorasb_runtime.merging import find_method
    from lorasb_runtime.merging.checkpoint import MergeConfig, merge_checkpoint
    from lorasb_runtime.merging.method_deltas import method_deltas
    from lorasb_runtime.merging.provenance import describe_merge
    from lorasb_runtime.merging.weighted import load_weighted
    from lorasb_runtime.models.locate import identify, open_model
    from lorasb_runtime.storage.basis_file import map_basis
    from lorasb_runtime.storage.dtypes import parse_dtype

    found = find_method(method)
    config = MergeConfig(
        dtype=parse_dtype(dtype) if dtype is not None else None,
        rounding=merge_flags.parse_rounding(rounding, seed),
        dequantize=dequantize,
        untie=untie,
        reversible=reversible,
        measure_all=measure_all,
        workers=workers,
    )
    if seed is not None and not (config.rounding.stochastic or found.takes("seed")):
        raise InputError("--seed needs --rounding stochastic or a method that draws from it")
    options = method_flags.given(
        normalize=normalize,
        lambda_=lambda_,
        density=density,
        majority_sign=majority_sign,
        seed=seed if found.takes("seed") else None,
        rescale=rescale,
        t=t,
    )
    chosen = found.with_options(options)
    asked = merge_flags.verify_prompts(verify, prompt, prompts)
    loaded = map_basis(basis)
    weighted = [load_weighted(text, loaded) for text in adapters]
    if subtract:
        weighted = [replace(item, weight=-item.weight) for item in weighted]
    deltas = method_deltas(weighted, loaded, chosen)
    source = open_model(model)
    provenance = describe_merge(identify(model, source), loaded, weighted, chosen)
    verifier = None
    if asked:
        from lorasb_runtime.merging.verify import Verifier

        verifier = Verifier(source, loaded, deltas, config, asked)
    with phases(in_bytes=True) as report:
        result = merge_checkpoint(
            source,
            loaded,
            deltas,
            output,
            provenance=provenance,
            config=config,
            force=force,
            report=report,
            check=verifier,
        )
    tell(output, result, config, verifier.result if verifier else None, as_json)
