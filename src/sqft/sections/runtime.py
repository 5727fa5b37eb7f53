"""What must not change a result."""

import re
from typing import Literal

from pydantic import Field, model_validator

from sqft.sections.base import PathText, Positive, Section

__all__ = ["RuntimeSection"]


class RuntimeSection(Section):
    """What must not change a result; never part of a stage's identity."""

    workspace: PathText = "runs"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: Positive | None = None
    log_level: Literal["debug", "info", "warning"] = "warning"
    spill: bool = Field(
        False, description="While compressing, keep the calibration's activations in files, not in memory."
    )

    @model_validator(mode="after")
    def _device(self) -> "RuntimeSection":
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError("device is auto, cpu, cuda or cuda:N")
        return self
