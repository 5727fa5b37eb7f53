"""`sqft preview`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sqft.cli.options import AsJson, Overrides, RecipePath, print_json

if TYPE_CHECKING:
    from sqft.pipeline.preview import DataPreview, ItemView

__all__ = ["preview", "print_data"]

SHOWN = 2000  # characters of an item, of which the middle is left out if it is longer
ENDS = ("«", "»")  # around what the loss counts, where there is no colour


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    items: Annotated[int, typer.Option(min=0, help="Items to show.")] = 3,
    split: Annotated[Literal["train", "search", "test"], typer.Option(help="Of which split.")] = "train",
    as_json: AsJson = False,
) -> None:
    """Show the data of a recipe as the model will see it, and which tokens the loss counts."""
    from sqft.pipeline import load_recipe
    from sqft.pipeline.preview import preview_data

    found = preview_data(load_recipe(recipe, overrides), items=items, split=split)
    if as_json:
        print_json(found)
    else:
        print_data(found)


def print_data(data: "DataPreview") -> None:
    """The table of splits, what should be known of them, and the items."""
    from sqft.cli.tables import print_table

    report = data.report
    header = ["split", "form", "items", "dropped", "repeated", "tokens each", "tokens", "in the loss"]
    rows = [_split_row(split, report) for split in report["items"]]
    print_table(header, rows, left=2)
    for line in _remarks(report):
        print(line)
    for item in data.items:
        _print_item(item)


def _split_row(split: str, report: dict[str, Any]) -> list[str]:
    dropped = sum(counts.get(split, 0) for counts in report["dropped"].values())
    lengths = report["lengths"].get(split)
    row = [split, report["forms"].get(split, "split off train"), str(report["items"][split])]
    row += [str(dropped), str(report["repeats"][split])]
    if lengths is None:
        return [*row, "-", "-", "-"]
    spread = f"{lengths['shortest']:.0f}-{lengths['longest']:.0f}, median {lengths['median']:.0f}"
    return [*row, spread, f"{lengths['tokens']:,}", f"{lengths['counted'] / lengths['tokens']:.0%}"]


def _remarks(report: dict[str, Any]) -> list[str]:
    dropped = {reason: sum(counts.values()) for reason, counts in report["dropped"].items()}
    words = {
        "null": "had a null field or an empty answer",
        "too_long": "were longer than data.sequence_length",
        "in_held_out": "stand in search or test as well",
    }
    lines = [f"{count} items {words[reason]}, and are left out" for reason, count in dropped.items() if count]
    for split, near in report["near_duplicates"].items():
        if any(near.values()):
            lines.append(
                f"of {split}, {near['similar']} items are much like one of train, "
                f"{near['same_but_numbers']} equal but for numbers"
            )
    return lines + list(report["notes"])


def _print_item(item: "ItemView") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    print(f"\n{item.split}, {item.tokens} tokens, of which the loss counts {item.counted}:")
    text = Text()
    for piece, counted in _shortened(item.pieces):
        marked = piece if coloured or not counted else f"{ENDS[0]}{piece}{ENDS[1]}"
        text.append(marked, "bold green" if counted else "dim")
    console.print(text)
    for place, choice in enumerate(item.choices):
        console.print(f"  {'right' if place == item.label else '     '}  {choice!r}", markup=False)


def _shortened(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The pieces, with the middle of long ones left out."""
    room = max(SHOWN // max(len(pieces), 1), 80)
    return [
        (piece if len(piece) <= room else f"{piece[: room // 2]} [...] {piece[-room // 2 :]}", counted)
        for piece, counted in pieces
    ]
