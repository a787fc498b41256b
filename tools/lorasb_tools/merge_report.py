"""What `lorasb merge` and `lorasb unmerge` say when they are done."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasb_tools.report import emit, note

if TYPE_CHECKING:
    from lorasb_runtime.merging.checkpoint import MergeConfig, MergeReport
    from lorasb_runtime.merging.survival import Survival
    from lorasb_runtime.merging.verify import Verification

SHOWN = 5  # of the modules, those with the largest errors
# Under this rms(delta) / rms(W0), rounding to the nearest 16-bit number shrinks the delta itself.
LEAST_RATIO = 3e-3


def tell(
    output: Path,
    result: "MergeReport",
    config: "MergeConfig",
    verified: "Verification | None",
    as_json: bool,
) -> None:
    """Print the report of a merge, with a warning first where rounding ate the delta."""
    from lorasb_runtime.merging.record import figures

    if not config.rounding.stochastic:
        _warn(result)
    if verified is not None and verified.effect <= verified.allowed:
        note(
            f"warning: --verify cannot tell: the adapters move the logits by {verified.effect:.2e} "
            f"on these prompts, which rounding hides; ask others, or write --dtype float32"
        )
    modules = {name: figures(survival) for name, survival in result.modules.items()}
    value: dict[str, Any] = {"output": str(output), **figures(result.total), "modules": modules}
    if verified is not None:
        value["verified"] = _checked(verified)
    emit(value, "\n".join(_lines(output, result, verified)), as_json)


def _warn(result: "MergeReport") -> None:
    small = [n for n in result.narrow if 0 < result.modules[n].ratio < LEAST_RATIO]
    if small:
        note(
            f"warning: rounding left {result.total.kept:.1%} of the delta; in {len(small)} of "
            f"{len(result.modules)} modules it is under {LEAST_RATIO:g} of the weights, where "
            "rounding to 16 bits shrinks it: write --dtype float32, --rounding stochastic, or "
            "serve the adapter unmerged"
        )


def _lines(output: Path, result: "MergeReport", verified: "Verification | None") -> list[str]:
    worst = result.worst_first[:SHOWN]
    width = max(len(name) for name in ("in all", *worst))
    lines = [
        f"{output}: {len(result.modules)} modules merged",
        f"  {'':<{width}}  rms(delta)/rms(W)    kept  relative error",
        f"  {'in all':<{width}}  {_row(result.total)}",
        *(f"  {name:<{width}}  {_row(result.modules[name])}" for name in worst),
    ]
    if len(result.modules) > len(worst):
        more = len(result.modules) - len(worst)
        lines.append(f"  and {more} with smaller errors: lorasb_merge.json in the folder has them")
    measured = result.total.measured / max(1, result.total.entries)
    if measured < 1:
        lines.append(
            f"  measured on {measured:.0%} of the entries; --measure-all takes all of them"
        )
    if verified is not None:
        lines.append(
            f"  verified: logits within {verified.difference:.2e} of the unmerged model's "
            f"(rounding alone makes {verified.rounding:.2e}, the adapters {verified.effect:.2e}), "
            f"{verified.agreeing} of {verified.tokens} greedy tokens equal"
        )
    return lines


def _row(survival: "Survival") -> str:
    return f"{survival.ratio:>17.2e} {survival.kept:>7.1%}  {survival.relative_error:>14.2e}"


def _checked(verified: "Verification") -> dict[str, float]:
    return {
        "difference": verified.difference,
        "allowed": verified.allowed,
        "rounding": verified.rounding,
        "effect": verified.effect,
        "agreeing_tokens": verified.agreeing,
        "tokens": verified.tokens,
    }
