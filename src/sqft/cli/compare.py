"""`sqft compare`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Results of sqft run or sqft sweep, models that sqft evaluate measured, or RUN:MODEL.",
        ),
    ],
    reference: Annotated[
        str | None, typer.Option(help="What gaps are taken to; default the first RUN.")
    ] = None,
    every_model: Annotated[
        bool, typer.Option("--all", help="Every model that a run measured, not only what it was for.")
    ] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Compare on the items that all have, where some measured more.")
    ] = False,
    html: Annotated[Path, typer.Option(metavar="DIR", help="Folder for comparison.html.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and write no page.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, and write no page.")] = False,
) -> None:
    """Compare measured models item by item: gaps with 95 % intervals, size, sparsity, what differs.

    Runs of one recipe under several seeds become one row. Figures of other items or prompts are refused.
    """
    import json as json_module

    from sqft.cli.tables import print_table
    from sqft.pipeline.comparison import compare_runs
    from sqft.report import comparison as shown
    from sqft.report.page import write_comparison

    data = compare_runs(runs, reference=reference, every_model=every_model, common=common)
    if json:
        print(json_module.dumps(data.to_json(), indent=1, ensure_ascii=False))
        return
    if markdown:
        print(shown.markdown(data))
        return
    header, *rows = shown.compare_table(data)
    print_table(header, rows)
    for note in data.notes:
        print(note)
    if data.differing:
        print("\nwhat differs:")
        header, *rows = shown.differing_table(data)
        print_table(header, rows, left=len(header))
    print(f"\npage: {write_comparison(data, html)}")
