"""Compression from beginning to end: folders of LoRAs in, joint bases and their adapters out."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.adapters.publishing import BASIS_FILE
from lorasb_runtime.basis.clusters import cluster
from lorasb_runtime.errors import InputError, TooLargeError
from lorasb_runtime.importing.collection import Collection, open_collection
from lorasb_runtime.importing.foreign import ForeignAdapter
from lorasb_runtime.importing.joint_basis import CoreRows, joint_basis
from lorasb_runtime.importing.model import open_import_model
from lorasb_runtime.importing.output import adapter_names, check_output_folder, output_folder
from lorasb_runtime.importing.rebase import Fit
from lorasb_runtime.ops.threads import one_thread
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.types import Report, TargetModule, core_offsets

HOLDS = ("*.safetensors",)  # what a folder of ours has in it
SAMPLED_MODULES = 6  # by which adapters are put into clusters


@dataclass(frozen=True)
class CompressConfig:
    """rank: of the basis, at most. model, max_error: None where the flag was not given."""

    rank: int
    clusters: int = 1
    model: str | None = None
    max_error: float | None = None
    seed: int = 0

    def check(self, count: int) -> None:
        """Raise InputError for values that make no sense for `count` adapters."""
        for name in ("rank", "clusters"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: found {getattr(self, name)}, expected at least 1")
        if self.clusters > count:
            raise InputError(
                f"--clusters: found {self.clusters}, expected at most {count}, one for each LoRA"
            )
        if self.max_error is not None and not self.max_error >= 0:
            raise InputError(f"--max-error: found {self.max_error}, expected 0 or more")


@dataclass(frozen=True)
class Compressed:
    """One adapter that was written, and how well it fits by module."""

    name: str
    source: str
    folder: Path
    version: str
    cluster: int
    fits: dict[str, Fit]

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def relative_error(self) -> float:
        """|delta - scaling B R A| / |delta| over all modules together."""
        return sum(self.fits.values(), Fit()).relative_error

    @property
    def worst(self) -> str:
        """The module that loses the largest share of its delta."""
        return max(self.fits, key=lambda module: self.fits[module].relative_error)


@dataclass(frozen=True)
class CompressedBasis:
    """One joint basis that was written; by_rank as in JointBasis."""

    file: Path
    digest: str
    targets: tuple[TargetModule, ...]
    loras: int
    by_rank: dict[int, float]

    @property
    def adapter_size(self) -> int:
        """D, the length of an adapter's flat cores vector."""
        return core_offsets(self.targets)[-1]


@dataclass(frozen=True)
class CompressResult:
    """adapters: in the order in which they were given. base_models: as the LoRAs name them."""

    adapters: list[Compressed]
    bases: list[CompressedBasis]
    base_models: list[str]


def compress(
    paths: Sequence[Path],
    config: CompressConfig,
    output: Path,
    *,
    force: bool = False,
    report: Report = lambda *_: None,
) -> CompressResult:
    """Write a joint basis and an adapter for each LoRA into the folder `output`, all or none.

    With several clusters each is a folder `cluster-<n>` of its own, with its own basis. Raises
    InputError for what cannot be compressed, BasisMismatchError where the LoRAs or the model do
    not belong together, TooLargeError over the limit of the error, ConflictError for an output
    that is in the way.
    """
    config.check(len(paths))
    check_output_folder(output, HOLDS, force=force)
    names = adapter_names(paths)
    model = None if config.model is None else open_import_model(config.model)
    with one_thread():
        found = open_collection(paths, model, report)
    groups = _groups(found, config, report)
    adapters: dict[int, Compressed] = {}
    bases = []
    with output_folder(output, HOLDS, force=force) as folder:
        for index, places in enumerate(groups):
            job = _Cluster(index, len(groups), places, names, folder, output)
            basis, written = job.run(found, config, report)
            bases.append(basis)
            adapters |= written
    return CompressResult([adapters[p] for p in range(len(paths))], bases, found.base_models)


def _groups(found: Collection, config: CompressConfig, report: Report) -> list[list[int]]:
    """The places of each cluster's adapters."""
    everyone = list(range(len(found.adapters)))
    if config.clusters == 1:
        return [everyone]
    modules = list(found.shapes)
    count = min(SAMPLED_MODULES, len(modules))
    sample = [modules[(2 * i + 1) * len(modules) // (2 * count)] for i in range(count)]
    stacks = [stack for module in sample if (stack := found.stack(module, everyone)).batches]
    if not stacks:
        raise InputError(f"found no delta but zeros in {', '.join(sample)}, expected some")

    def tell(done: int, total: int, loss: float) -> None:
        report("cluster", done, total, f"squared error {loss:.3f}")

    with one_thread():
        assigned = cluster(stacks, config.clusters, config.rank, config.seed, tell)
    return [torch.nonzero(assigned == i).flatten().tolist() for i in range(config.clusters)]


@dataclass(frozen=True)
class _Cluster:
    """One basis and its adapters, on their way into `folder`, which will become `output`."""

    index: int
    clusters: int
    places: list[int]
    names: list[str]
    folder: Path
    output: Path

    def run(
        self, found: Collection, config: CompressConfig, report: Report
    ) -> tuple[CompressedBasis, dict[int, Compressed]]:
        """Solve, check and write; gives the adapters by their places."""
        part = "" if self.clusters == 1 else f"cluster-{self.index}"
        folder, output = self.folder / part, self.output / part
        folder.mkdir(exist_ok=True)
        info = {"cluster": self.index, "clusters": self.clusters} if part else {}

        def solving(name: str, done: int, total: int, module: str) -> None:
            report(name, self.index * total + done, self.clusters * total, f"{part} {module}")

        with tempfile.TemporaryFile(dir=folder) as file:
            rows = CoreRows(file, len(self.places))
            joint = joint_basis(found, self.places, config.rank, config.seed, rows, solving, info)
            made = [
                Compressed(self.names[p], found.adapters[p].source, output, "", self.index, fits)
                for p, fits in zip(self.places, joint.fits, strict=True)
            ]
            _check_errors(made, config.max_error)
            for row, place in enumerate(self.places):
                adapter = _adapter(made[row], found.adapters[place], rows.row(row), joint.basis)
                saved = save_adapter(adapter, folder / made[row].file.name)
                made[row] = replace(made[row], version=saved.version)
        save_basis(joint.basis, folder / BASIS_FILE)
        basis = CompressedBasis(
            file=output / BASIS_FILE,
            digest=joint.basis.digest,
            targets=joint.basis.targets,
            loras=len(self.places),
            by_rank=joint.by_rank,
        )
        return basis, dict(zip(self.places, made, strict=True))


def _check_errors(made: Sequence[Compressed], limit: float | None) -> None:
    worst = max(made, key=lambda one: one.relative_error)
    if limit is not None and worst.relative_error > limit:
        over = sum(one.relative_error > limit for one in made)
        raise TooLargeError(
            f"{worst.source}: found a relative error of {worst.relative_error:.3g}, expected at "
            f"most {limit:g} (--max-error), which {over} of {len(made)} adapters exceed; a higher "
            "--rank or more --clusters lose less"
        )


def _adapter(
    made: Compressed, source: ForeignAdapter, cores: torch.Tensor, basis: Basis
) -> Adapter:
    info: dict[str, Any] = {
        "format": source.format,
        **source.info,
        "relative_error": made.relative_error,
        "worst_module": made.worst,
        "worst_error": made.fits[made.worst].relative_error,
    }
    return Adapter(cores, basis.digest, made.name, basis.base_model, {"compressed": info})
