"""Entry point of `lorasb`: the command table, and the one mapping of errors to exit statuses."""

import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from lorasb_runtime.errors import InputError, LorasbError
from lorasb_tools import (
    bench,
    blend,
    compress,
    derive,
    diff,
    export,
    import_,
    inspect_,
    keys,
    merge,
    pack,
    publish,
    serve,
    store,
    train,
    unmerge,
)

app = typer.Typer(
    name="lorasb",
    help="Serve and merge thousands of tiny per-user LoRA-SB adapters on one model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("derive")(derive.derive)
app.command("train")(train.train)
app.command("serve")(serve.serve)
app.command("publish")(publish.publish)
app.command("adapters")(store.adapters)
app.command("rollback")(store.rollback)
app.command("prune")(store.prune)
app.command("pack")(pack.pack)
app.command("merge")(merge.merge)
app.command("unmerge")(unmerge.unmerge)
app.command("blend")(blend.blend)
app.command("import")(import_.import_)
app.command("export")(export.export)
app.command("compress")(compress.compress)
app.command("inspect")(inspect_.inspect)
app.command("diff")(diff.diff)
app.add_typer(bench.app, name="bench")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Exit status 0 done, 2 wrong usage or bad input, 1 our own failure, 130 interrupted."""
    try:
        status = app(prog_name="lorasb", standalone_mode=False)
    except TyperException as error:
        message = " ".join(error.format_message().split())
        _fail(f"{message} (lorasb --help tells the usage)", 2)
    except LorasbError as error:
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except OSError as error:
        _fail(str(error), 1)
    if status:
        _fail("interrupted" if status == 130 else f"status {status}", status)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"lorasb: error: {message}", err=True)
    sys.exit(status)
