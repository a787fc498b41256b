"""The flags that say how a merged model is written and checked."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lorasb_runtime.merging.fold import Rounding

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Question: What is 17 + 25?\nAnswer:",
)

OUTPUT = typer.Option(..., "-o", "--output", help="The folder to write.")
FORCE = typer.Option(False, "--force", help="Replace an existing model folder.")
WORKERS = typer.Option(None, min=1, help="Threads; by default as many as processors, at most 8.")
DTYPE = typer.Option(None, help="bfloat16, float16 or float32; the checkpoint's own by default.")
ROUNDING = typer.Option("nearest", help="Of merged weights to 16 bits: nearest or stochastic.")
SUBTRACT = typer.Option(False, "--subtract", help="Turn the sign of every weight round.")
UNTIE = typer.Option(
    False, "--untie", help="Give an output embedding that is the input's too a tensor of its own."
)
DEQUANTIZE = typer.Option(
    False, "--dequantize", help="Unpack a quantized model (fp8, int8 with scales, MXFP4)."
)
REVERSIBLE = typer.Option(
    False, "--reversible", help="Also write what `lorasb unmerge` needs to restore every byte."
)
MEASURE_ALL = typer.Option(
    False, "--measure-all", help="Report on every entry; else on a fourth of large weights."
)
VERIFY = typer.Option(
    False, "--verify", help="Reload the result and compare its logits; takes float32 memory."
)
PROMPT = typer.Option([], help="What --verify asks; repeats. A few sentences by default.")
PROMPTS = typer.Option(None, help="A text file with a prompt for --verify on every line.")


def verify_prompts(verify: bool, prompt: list[str], prompts: Path | None) -> list[str]:
    """The prompts to verify with; none without --verify.

    Raises InputError for prompts without it, and for a file without any.
    """
    from lorasb_runtime.errors import InputError, NotFoundError

    if not verify:
        if prompt or prompts is not None:
            raise InputError("--prompt and --prompts need --verify, which asks them")
        return []
    asked = list(prompt)
    if prompts is not None:
        if not prompts.is_file():
            raise NotFoundError(f"{prompts}: no such file")
        lines = [line for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{prompts}: found no prompts, expected one on each line")
        asked += lines
    return asked or list(DEFAULT_PROMPTS)


def parse_rounding(name: str, seed: int | None) -> "Rounding":
    """Raises InputError for an unknown rounding."""
    from lorasb_runtime.errors import InputError
    from lorasb_runtime.merging.fold import Rounding

    if name not in ("nearest", "stochastic"):
        raise InputError(f"rounding: found {name!r}, expected nearest or stochastic")
    return Rounding(name == "stochastic", seed or 0)
