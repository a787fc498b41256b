"""The flags of merge methods, as `lorasb merge` and `lorasb blend` take them."""

from typing import Any

import typer

METHOD = typer.Option(
    "linear",
    help="How several adapters become one: linear, ties, slerp, ...; docs/merge-methods.md.",
)
NORMALIZE = typer.Option(
    None,
    "--normalize",
    help="Divide by the sum of the weights (ties: of those that agree); else they stay as given.",
)
LAMBDA = typer.Option(None, "--lambda", help="What the merged result is multiplied by; 1.")
DENSITY = typer.Option(
    None, help="Share of entries that ties (0.2) and dare (no default) keep, above 0 to 1."
)
MAJORITY_SIGN = typer.Option(
    None, help="ties: sign of the sum (total, the default) or of most (frequency)."
)
SEED = typer.Option(None, help="What chance depends on (dare, stochastic rounding); 0.")
RESCALE = typer.Option(
    None, "--rescale/--no-rescale", help="dare: divide what is kept by the density; yes."
)
T = typer.Option(None, "--t", help="slerp: from the first adapter (0) to the second (1); 0.5.")


def given(**flags: Any) -> dict[str, Any]:
    """The flags that the user gave, by the names that methods know; None stands for not given."""
    return {name.rstrip("_"): value for name, value in flags.items() if value is not None}
