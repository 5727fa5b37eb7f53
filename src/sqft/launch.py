"""What torchrun and accelerate tell the processes that they start together."""

import os

__all__ = ["launched_processes"]


def launched_processes() -> int:
    """How many processes a launcher started together; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() else 1
