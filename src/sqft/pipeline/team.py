"""Several processes at one recipe, as torchrun and accelerate start them.

The first one runs the recipe. The others wait for its trainings, and take part in them.
"""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqft.errors import RecipeError
from sqft.launch import launched_processes

__all__ = ["Team", "open_team"]

PATIENCE = timedelta(days=30)  # compressing a large model takes hours, in which the others wait

Task = Callable[[], Any]


class Team:
    """The processes of a launch. is_first: whether this one runs the recipe."""

    def __init__(self, device: str) -> None:
        import torch.distributed as dist
        from accelerate import PartialState

        self.is_first = PartialState(cpu=device == "cpu").is_main_process
        # By gloo: waiting keeps no GPU busy.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def begin(self, task: Task) -> None:
        """Have the others do `task` as well, which is made of what can be pickled; called by the first."""
        self._hand_on(task)

    def end(self) -> None:
        """Let the others go; called by the first."""
        self._hand_on(None)
        self._leave()

    def assist(self) -> None:
        """Do what the first begins, until it lets go."""
        # Python would notice a signal only once the first has begun something; nothing is open here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while (task := self._hand_on(None)) is not None:
            task()
        self._leave()

    @staticmethod
    def _leave() -> None:
        import torch.distributed as dist

        dist.destroy_process_group()

    def _hand_on(self, task: Task | None) -> Task | None:
        import torch.distributed as dist

        handed = [task]
        dist.broadcast_object_list(handed, src=0, group=self._group)
        return handed[0]


def open_team(device: str) -> Team | None:
    """The team of a launch; None for a process that was started alone.

    device: as `runtime.device` has it.

    Raises: RecipeError for a device that all processes would share, and for a launcher that shards models.
    """
    if launched_processes() == 1:
        return None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RecipeError(
            "sqft run shards no model; launch it without FSDP, or train as examples/fsdp.py does"
        )
    if device.partition(":")[2]:
        raise RecipeError(
            f"runtime.device {device} is one GPU for {launched_processes()} processes; write auto or cuda"
        )
    return Team(device)
