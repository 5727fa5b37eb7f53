"""The table of commands: one function each, in a module that imports what it needs when it runs."""

from typing import Annotated

import typer

import sqft
from sqft.cli.bench import bench
from sqft.cli.chat import chat
from sqft.cli.clean import clean
from sqft.cli.compare import compare
from sqft.cli.compress import compress
from sqft.cli.demo import demo
from sqft.cli.doctor import doctor
from sqft.cli.evaluate import evaluate
from sqft.cli.export import export
from sqft.cli.init import init
from sqft.cli.inspect import inspect
from sqft.cli.merge import merge
from sqft.cli.pack import pack, unpack
from sqft.cli.plan import plan
from sqft.cli.preview import preview
from sqft.cli.push import push
from sqft.cli.reproduce import reproduce
from sqft.cli.run import run
from sqft.cli.schema import schema
from sqft.cli.sign import sign
from sqft.cli.status import status
from sqft.cli.sweep import sweep
from sqft.cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    help="Fine-tune once, get one small file (sparse, INT4) that is provably the model you trained.",
    pretty_exceptions_enable=False,
)
COMMANDS = (
    init, run, sweep, plan, preview, status, clean, evaluate, compare, verify, sign, compress, export,
    push, merge, pack, unpack, bench, chat, inspect, reproduce, demo, schema, doctor,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sqft {sqft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show errors and the result, no progress; in any place.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what each stage does as well; in any place.")
    ] = False,
) -> None:
    # -q and -v are taken out of the arguments before; here they are for --help.
    ...
