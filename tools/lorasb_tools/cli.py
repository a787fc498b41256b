"""Entry point of `lorasb`: the command table, and the one mapping of errors to exit statuses."""

import sys

import typer

from lorasb_runtime.errors import InputError, LorasbError
from lorasb_tools import derive, merge, publish, serve, train

app = typer.Typer(
    name="lorasb",
    help="Serve and merge thousands of tiny per-user LoRA-SB adapters on one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("derive")(derive.derive)
app.command("train")(train.train)
app.command("serve")(serve.serve)
app.command("publish")(publish.publish)
app.command("adapters")(publish.adapters)
app.command("merge")(merge.merge)


def main() -> None:
    """Exit status 0 done, 2 wrong usage or bad input, 1 our own failure, 130 interrupted."""
    try:
        app()
    except LorasbError as error:
        typer.echo(f"lorasb: error: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        typer.echo("lorasb: interrupted", err=True)
        sys.exit(130)
