"""Where those that a training reports to keep what they are told: TensorBoard, Weights & Biases, trackio."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqft.errors import TrainingError
from sqft.sections import TrainingSection

__all__ = ["check_reporting", "reporting_into"]

EVERYTHING = ("all", "none")
UNCHECKED = ("flyte",)  # that transformers does not list as available even where it is
TENSORBOARD, VARIABLE = "tensorboard", "TENSORBOARD_LOGGING_DIR"


def check_reporting(section: TrainingSection) -> None:
    """Ask transformers about what `report_to` names before hours of compression, and not after them.

    Raises: TrainingError for a name that it does not know, and for one whose package is not installed.
    """
    named = section.arguments.get("report_to") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return  # TrainingArguments says what is wrong with it
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    setting, available = f"{section.place}.arguments.report_to", get_available_reporting_integrations()
    for name in names:
        if name in (*EVERYTHING, *available, *UNCHECKED):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise TrainingError(f"{setting}: {name!r} is unknown; choose from {known}")
        raise TrainingError(f"{setting}: {name} is not installed; pip install {name}, or leave it out")


@contextmanager
def reporting_into(directory: Path | None) -> Iterator[None]:
    """While it lasts, TensorBoard's callback writes here, unless the user says where.

    Weights & Biases and trackio keep their own folders, in which their own commands look. A run of Weights &
    Biases that begins here is finished here, so that what was told is on the disk, and a second training of
    the same process does not go on in it.
    """
    here = None if VARIABLE in os.environ else directory
    if here is not None:
        os.environ[VARIABLE] = str(here / TENSORBOARD)
    before = _wandb_run()
    try:
        yield
    finally:
        if here is not None:
            del os.environ[VARIABLE]
        run = _wandb_run()
        if run is not None and run is not before:
            run.finish()


def _wandb_run() -> Any:
    """The run that is open in this process, if there is one; nothing is imported to find out."""
    return getattr(sys.modules.get("wandb"), "run", None)
