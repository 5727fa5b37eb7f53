"""`sqft push`."""

from pathlib import Path
from typing import Annotated

import typer

from sqft.cli.options import AsJson, print_json

__all__ = ["push"]


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A merged model, an adapter or an export.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="USER/NAME on the hub; made if it is not there.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the card and the files; send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a model to the Hugging Face hub, with a card and what was measured of it."""
    from sqft.cli.tables import print_table
    from sqft.export.publication import describe_publication, push_model
    from sqft.report.summary import format_bytes

    if dry_run:
        found = describe_publication(directory, repo)
    else:
        found = push_model(directory, repo, private=private)
    if as_json:
        print_json(found)
        return
    if dry_run:
        print(found.card)
    print_table(["file", "size"], [[name, format_bytes(size)] for name, size in found.files.items()], left=1)
    print(f"published: {found.url}" if found.url else "nothing was sent: --dry-run")
