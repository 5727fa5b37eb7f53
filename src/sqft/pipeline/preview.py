"""The items of a recipe as the model will see them, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifacts import Manifest
from sqft.errors import RecipeError
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.runner import Workspace, findable_keys
from sqft.pipeline.step_items import check_splits

if TYPE_CHECKING:
    from sqft.data import Example, Splits

__all__ = ["DataPreview", "ItemView", "load_items", "preview_data", "view_item"]


@dataclass(frozen=True)
class ItemView:
    """One item: pieces of its text in order, each with whether the loss counts its tokens.

    choices: the texts that are compared, where there are any; label: which of them is right.
    """

    split: str
    pieces: list[tuple[str, bool]]
    tokens: int
    counted: int
    choices: list[str]
    label: int | None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ItemView":
        """An item out of its fields as JSON has them."""
        return cls(**{**values, "pieces": [(text, counted) for text, counted in values["pieces"]]})


@dataclass(frozen=True)
class DataPreview:
    """What was read, and some of the items. report: as `Splits` has it."""

    report: dict[str, Any]
    items: list[ItemView]


def preview_data(recipe: Recipe, *, items: int = 3, split: str = "train") -> DataPreview:
    """Read the data of a recipe as a run would, and show the first items of a split.

    Raises: RecipeError without a data section; DataError and ModelError as the run would.
    """
    if recipe.data is None:
        raise RecipeError("the recipe has no data section; there is nothing to preview")
    workspace = Workspace(Path(recipe.runtime.workspace))
    keys = findable_keys(recipe, workspace)
    splits, tokenizer = load_items(recipe, workspace, keys)
    check_splits(recipe, splits.report["items"])
    chosen = getattr(splits, split)[:items]
    views = [view_item(example, split, tokenizer, recipe.data.loss_on) for example in chosen]
    return DataPreview(splits.report, views)


def load_items(recipe: Recipe, workspace: Workspace, keys: dict[str, str]) -> tuple["Splits", Any]:
    """The items, from the stage that holds them if it is there, and the tokenizer that made them."""
    from sqft.data import Splits, load_splits, read_items
    from sqft.models.source import source_tokenizer

    assert recipe.data is not None
    tokenizer = source_tokenizer(recipe.model, workspace.models)
    directory = workspace.stage_directory("items", keys["items"]) if keys else None
    if directory is not None and directory.exists():
        report = Manifest.read(directory).metrics["data"]
        train, search, test = (read_items(directory, split) for split in ("train", "search", "test"))
        return Splits(train, search, test, report), tokenizer
    return load_splits(recipe.data, tokenizer, seed=recipe.seed), tokenizer


def view_item(example: "Example", split: str, tokenizer: Any, loss_on: str) -> ItemView:
    """An item as text again, decoded from its tokens, cut where counting begins and ends."""
    ids, counted = example.token_ids, set(example.counted("text" if loss_on == "text" else "answer"))
    pieces: list[tuple[str, bool]] = []
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or (place in counted) != (start in counted):
            pieces.append((str(tokenizer.decode(ids[start:place])), start in counted))
            start = place
    choices = [str(tokenizer.decode(choice)) for choice in example.choices_ids or ()]
    return ItemView(split, pieces, len(ids), len(counted), choices, example.label)
