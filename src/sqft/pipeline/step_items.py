"""The stage `items`: the data read, tokenized and checked, once for all stages that look at it."""

import logging
from collections.abc import Mapping
from typing import Any

from sqft.errors import DataError
from sqft.pipeline.context import StageContext
from sqft.pipeline.recipe import Recipe

__all__ = ["check_splits", "prepare_items"]

logger = logging.getLogger(__name__)


def prepare_items(context: StageContext) -> dict[str, Any]:
    """The data files and the model's tokenizer → training, search and test items as token ids."""
    from sqft.data import chance_accuracy, load_splits, write_items
    from sqft.models import load_tokenizer

    tokenizer = load_tokenizer(context.inputs["model"], trust_remote_code=context.trusts_code)
    splits = load_splits(context.data, tokenizer, seed=context.recipe.seed)
    check_splits(context.recipe, splits.report["items"])
    for note in splits.report["notes"]:
        logger.warning("data: %s", note)
    write_items(context.directory, splits)
    return {"data": splits.report, "chance_accuracy": chance_accuracy(splits.test)}


def check_splits(recipe: Recipe, items: Mapping[str, int]) -> None:
    """items: how many each split has.

    Raises: DataError if a split is empty that something in the recipe measures on.
    """
    if recipe.search and recipe.search.evaluates and not items["search"]:
        raise DataError(
            f"search.method {recipe.search.method} compares sub-adapters on search items, and the data is "
            "too small to be split; give data.search, more items, or take search.method median"
        )
    for training in (recipe.tune, recipe.train):
        if training and training.selects and not items["search"]:
            raise DataError(
                f"{training.place}.early_stopping and keep go by search items, and the data is too small to "
                "be split; give data.search or more items, or leave them out"
            )
    evaluate = recipe.evaluate
    if evaluate and not (items[evaluate.split] or evaluate.perplexity or evaluate.tasks):
        raise DataError(
            f"evaluate measures on {evaluate.split} items, and the data is too small to be split; give "
            f"data.{evaluate.split}, more items, or leave the evaluate section out"
        )
