"""What a basis holds, and the spectrum that it was made with."""

from pathlib import Path
from typing import Any

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.inspecting.inspection import Inspection, ModuleRow
from lorasb_runtime.inspecting.weight_space import WeightSpace, singular_values
from lorasb_runtime.storage.basis_file import Basis, map_basis
from lorasb_runtime.types import TargetModule

OF_R0 = "singular values of B R0 A, the first step at learning rate 1"
OF_JOINT = "root of the mean share of a delta along each direction"
OF_PAIR = "singular values of B A (of a LoRA-XS basis those of the weight)"
SPECTRUM = "spectrum"  # in a joint basis' info: {module: [r numbers]}


def inspect_basis(path: Path) -> Inspection:
    """A basis file's facts and a row for each target. Raises what `map_basis` raises."""
    basis = map_basis(path)
    space = WeightSpace(basis)
    spectrum_of, spectra = _spectra(basis, space, str(path))
    rows = tuple(
        ModuleRow.of(target, spectrum)
        for target, spectrum in zip(basis.targets, spectra, strict=True)
    )
    info = {key: value for key, value in basis.info.items() if key != SPECTRUM}
    facts: dict[str, Any] = {
        "digest": basis.digest,
        "method": basis.method,
        "bytes": path.stat().st_size,
        "scaling": basis.scaling,
        **target_facts(basis.targets),
        "orthonormal": space.orthonormal,
        "off_orthonormal_B": space.off_orthonormal[0],
        "off_orthonormal_A": space.off_orthonormal[1],
        "base_model": basis.base_model.as_json() if basis.base_model else None,
        "made_from": info,
    }
    notes = () if spectrum_of else ("B and A are orthonormal and without R0: no spectrum",)
    return Inspection("basis", str(path), facts, rows, spectrum_of, notes=notes)


def target_facts(targets: tuple[TargetModule, ...]) -> dict[str, Any]:
    """How many targets, of which ranks, and how large their cores are together."""
    ranks = [t.rank for t in targets]
    return {
        "targets": len(targets),
        "ranks": sorted(set(ranks)),
        "adapter_size": sum(rank * rank for rank in ranks),
    }


def _spectra(basis: Basis, space: WeightSpace, source: str) -> tuple[str, list[tuple[float, ...]]]:
    """What the spectra are of, and one for each target; empty ones where there is none."""
    count = len(basis.targets)
    if any(basis.r0(t.module) is not None for t in basis.targets):
        found = []
        for index, target in enumerate(basis.targets):
            r0 = basis.r0(target.module)
            found.append(() if r0 is None else singular_values(space.scaled(r0, index)))
        return OF_R0, found
    if SPECTRUM in basis.info:
        return OF_JOINT, [_joint_spectrum(basis, t, source) for t in basis.targets]
    if space.orthonormal:
        return "", [()] * count
    return OF_PAIR, [singular_values(space.pair(index)) for index in range(count)]


def _joint_spectrum(basis: Basis, target: TargetModule, source: str) -> tuple[float, ...]:
    table = basis.info[SPECTRUM]
    values = table.get(target.module) if isinstance(table, dict) else None
    if (
        not isinstance(values, list)
        or len(values) != target.rank
        or not all(isinstance(value, int | float) and value >= 0 for value in values)
    ):
        found = f"info.{SPECTRUM} {values!r:.60} for {target.module}"
        raise FileFormatError(source, found, f"{target.rank} numbers from zero up")
    return tuple(float(value) for value in values)
