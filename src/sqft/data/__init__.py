"""Task items, prompts, batches and calibration texts; local files first."""

from sqft.data.batches import collate
from sqft.data.calibration import calibration_tokens
from sqft.data.prompts import Example
from sqft.data.splits import Splits, load_splits

__all__ = ["Example", "Splits", "calibration_tokens", "collate", "load_splits"]
