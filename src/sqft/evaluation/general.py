"""General text, on which a report tells what a model forgot of all but its task."""

from pathlib import Path

__all__ = ["general_path"]


def general_path(text: str) -> Path:
    """The file that `evaluate.general_text` means."""
    return Path(__file__).with_name("general.txt") if text == "package" else Path(text)
