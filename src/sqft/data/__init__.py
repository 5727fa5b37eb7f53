"""Task items, prompts, batches and calibration texts; local files first."""

from typing import TYPE_CHECKING

from sqft.deferred import deferred_names

if TYPE_CHECKING:
    from sqft.data.batches import collate
    from sqft.data.calibration import calibration_tokens
    from sqft.data.items import Example, Splits, chance_accuracy, read_items, write_items
    from sqft.data.splits import load_splits

__all__ = [
    "Example",
    "Splits",
    "calibration_tokens",
    "chance_accuracy",
    "collate",
    "load_splits",
    "read_items",
    "write_items",
]

__getattr__ = deferred_names(__name__, __file__)
