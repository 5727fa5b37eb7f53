"""The stage `items`: the data read, tokenized and checked, once for all stages that look at it."""

import logging
from typing import Any

from sqft.pipeline.checks import check_splits
from sqft.pipeline.context import StageContext

__all__ = ["prepare_items"]

logger = logging.getLogger(__name__)


def prepare_items(context: StageContext) -> dict[str, Any]:
    """The data files and the model's tokenizer → training, search and test items as token ids."""
    from sqft.data import chance_accuracy, load_splits, write_items
    from sqft.models import load_tokenizer

    tokenizer = load_tokenizer(context.inputs["model"], trust_remote_code=context.trusts_code)
    splits = load_splits(context.data, tokenizer, seed=context.recipe.seed)
    check_splits(context.recipe, splits)
    for note in splits.report["notes"]:
        logger.warning("data: %s", note)
    write_items(context.directory, splits)
    return {"data": splits.report, "chance_accuracy": chance_accuracy(splits.test)}
