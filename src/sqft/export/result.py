"""What an export wrote, and how faithful it is."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqft.export.fidelity import CodeComparison, LogitComparison
from sqft.export.requantization import Damage

__all__ = ["ExportResult"]


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote, and how faithful it is.

    tensor_types: how many tensors are stored in which type. damage: None unless the grid was changed.
    logit_comparison: None where no runtime of the format runs here.
    """

    format: str
    directory: Path
    size_bytes: int
    tensor_types: dict[str, int]
    head_type: str
    code_comparison: CodeComparison
    logit_comparison: LogitComparison | None
    damage: Damage | None
    serve: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"directory": self.directory.name, "serve": self.commands}

    @property
    def commands(self) -> list[str]:
        """How to serve it from the folder that it lies in, wherever that is."""
        return [line.replace(f"{self.directory.parent}/", "") for line in self.serve]
