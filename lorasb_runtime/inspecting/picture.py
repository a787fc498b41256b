"""Pictures of what inspection found: spectra, a heat map of norms, a map of distances.

matplotlib is asked for only when a picture is drawn, and only its objects are used: no display,
no state that outlives the file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.inspecting.distances import classical_map, distance_matrix, in_neighbour_order
from lorasb_runtime.inspecting.inspection import Inspection, ModuleRow
from lorasb_runtime.storage import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 40  # names at most on each side of a map
COLOURS = "viridis"


def draw(found: Inspection, path: Path) -> None:
    """Write the picture that suits `found`, in the format that the file's name ends in.

    Raises InputError where it has none, for a format that is unknown, or without matplotlib.
    """
    pictures: dict[str, Callable[[Figure, Inspection], None]] = {
        "basis": _spectra,
        "adapter": _norms,
        "checkpoint": _norms,
        "adapters": _map,
    }
    if found.kind not in pictures:
        raise InputError(
            f"--plot: found a {found.kind}, expected a basis, an adapter or several; two models "
            "are compared by `lorasb diff`"
        )
    if found.kind != "adapters" and not any(row.spectrum for row in found.modules):
        raise InputError(f"--plot: found nothing to draw; {'; '.join(found.notes)}")
    figure = _figure()
    suffix = path.suffix.removeprefix(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise InputError(f"--plot: found {path.name!r}, expected a name ending in .png, .svg, .pdf")
    pictures[found.kind](figure, found)
    with atomic.new_file(path) as file:
        figure.savefig(file, format=suffix, dpi=150)


def _figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--plot: found no matplotlib, expected it installed: pip install 'lorasb[plot]'"
        ) from None
    return Figure(layout="constrained")


def split_module(module: str) -> tuple[int | None, str]:
    """The layer's number, the first in the name, and what comes after it; None and all without."""
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return int(part), ".".join(parts[index + 1 :])
    return None, module


def _by_kind(rows: tuple[ModuleRow, ...]) -> dict[str, list[tuple[int, ModuleRow]]]:
    """For each kind of module its layers' numbers and rows; without a number it is layer 0."""
    kinds: dict[str, list[tuple[int, ModuleRow]]] = {}
    for row in rows:
        layer, kind = split_module(row.module)
        kinds.setdefault(kind, []).append((layer or 0, row))
    return kinds


def _spectra(figure: "Figure", found: Inspection) -> None:
    """A panel for each kind of module: singular values by index, a line for each layer."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    kinds = {k: [i for i in v if i[1].spectrum] for k, v in _by_kind(found.modules).items()}
    kinds = {kind: items for kind, items in kinds.items() if items}
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure.set_size_inches(1.2 + 3.0 * columns, 1.2 + 2.6 * lines)
    figure.suptitle(f"{_last(found.source)} ({found.facts['method']}): {found.spectrum_of}")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    deepest = max(1, *(layer for items in kinds.values() for layer, _ in items))
    for axis, (kind, items) in zip(axes.flat, kinds.items(), strict=False):
        for layer, row in items:
            steps = range(1, len(row.spectrum) + 1)
            axis.plot(steps, row.spectrum, color=colormaps[COLOURS](layer / deepest), linewidth=1)
        axis.set_title(kind, fontsize="medium")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("value")
    for axis in list(axes.flat)[max(0, len(kinds) - columns) : len(kinds)]:
        axis.set_xlabel("direction")
        axis.tick_params(labelbottom=True)
    depth = ScalarMappable(Normalize(0, deepest), COLOURS)
    figure.colorbar(depth, ax=axes, label="layer", shrink=0.8)


def _norms(figure: "Figure", found: Inspection) -> None:
    """A heat map, layer by kind of module, of the delta's norms."""
    kinds = _by_kind(found.modules)
    layers = sorted({layer for items in kinds.values() for layer, _ in items})
    grid = torch.full((len(layers), len(kinds)), torch.nan, dtype=torch.float64)
    for column, items in enumerate(kinds.values()):
        for layer, row in items:
            grid[layers.index(layer), column] = row.norm
    figure.set_size_inches(max(6.0, 2.6 + 0.75 * len(kinds)), max(4.0, 2.2 + 0.2 * len(layers)))
    figure.suptitle(f"{_last(found.source)}: norm of its delta in each module")
    axis = figure.subplots()
    image = axis.imshow(grid.numpy(), aspect="auto", cmap=COLOURS, vmin=0.0)
    axis.set_xticks(range(len(kinds)), list(kinds), rotation=40, ha="right")
    every = max(1, len(layers) // 16)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axis.set_xlabel("module")
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, label="Frobenius norm")


def _map(figure: "Figure", found: Inspection) -> None:
    """The adapters and the base model as points in two dimensions, and all their distances."""
    assert found.gram is not None
    names = [row.name for row in found.adapters]
    figure.set_size_inches(14, 6.6)
    what = found.distance_of.partition(";")[0].partition(":")[0]
    figure.suptitle(f"{_last(found.source)}: {len(names)} adapters, distances between {what}")
    left, right = figure.subplots(1, 2)
    _draw_map(left, found.gram, names)
    distances = distance_matrix(found.gram)
    order = in_neighbour_order(distances)
    image = right.imshow(distances[order][:, order].numpy(), cmap=COLOURS, aspect="auto")
    right.set_title("every pair (near ones are neighbours)")
    if len(names) <= NAMED:
        shown = [_short(names[i]) for i in order]
        right.set_xticks(range(len(names)), shown, rotation=90, fontsize="x-small")
        right.set_yticks(range(len(names)), shown, fontsize="x-small")
    else:
        right.set_xlabel("adapter, in this order")
        right.set_ylabel("adapter, in this order")
    figure.colorbar(image, ax=right, label="distance", shrink=0.8)


def _draw_map(axis: "Axes", gram: torch.Tensor, names: list[str]) -> None:
    with_base = torch.nn.functional.pad(gram, (0, 1, 0, 1))  # an adapter of zeros
    places, share = classical_map(with_base)
    x, y = places[:, 0].tolist(), places[:, 1].tolist()
    axis.scatter(x[:-1], y[:-1], s=18, alpha=0.8, label="adapters")
    axis.scatter(x[-1:], y[-1:], s=90, marker="*", color="black", label="base model")
    for index in _with_room(places[:-1])[:NAMED]:
        axis.annotate(
            _short(names[index]),
            (x[index], y[index]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize="x-small",
        )
    axis.set_title(f"map: keeps {share:.0%} of the squared distances")
    axis.set_xlabel("first direction")
    axis.set_ylabel("second direction")
    axis.set_aspect("equal", adjustable="datalim")
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize="small")


def _with_room(places: torch.Tensor) -> list[int]:
    """Points whose names do not fall onto those of points before them."""
    span = float((places.amax(dim=0) - places.amin(dim=0)).max()) or 1.0
    chosen: list[int] = []
    for index, place in enumerate(places):
        apart = (places[chosen] - place).abs() / span
        if not bool(((apart[:, 0] < 0.18) & (apart[:, 1] < 0.025)).any()):
            chosen.append(index)
    return chosen


def _last(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}...{name[-10:]}"
