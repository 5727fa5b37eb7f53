"""Where those that a training reports to keep what they are told: TensorBoard, Weights & Biases, trackio."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["reporting_into"]

TENSORBOARD, VARIABLE = "tensorboard", "TENSORBOARD_LOGGING_DIR"


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
