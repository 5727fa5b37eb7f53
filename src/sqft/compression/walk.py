"""The walk over decoder blocks: one block in memory, its calibration inputs in, its outputs on to the next.

Later blocks see what the earlier ones put out after compression.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Integer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.errors import CompressionError
from sqft.models import Checkpoint, decoder_blocks

__all__ = ["BlockWalk", "InputGroup", "Statistic"]

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048
HELD_OUT_FROM = 8  # sequences: with so many, the last one is kept out of the statistics, to measure errors on
SAMPLE_TOKENS = 1024


class Statistic(Protocol):
    """A running statistic of the inputs of a linear."""

    num_tokens: int

    def update(self, inputs: Tensor) -> None:
        """Take in (tokens, in)."""

    def check(self, name: str) -> None:
        """Raises: CompressionError if the inputs were not finite."""

    @property
    def num_dead(self) -> int:
        """Inputs that were 0 in every token."""


class InputGroup:
    """Linears of one block that read the same tensor: their names, statistic, and a sample of inputs."""

    def __init__(self, columns: int, make: Callable[[int, torch.device], Any], device: torch.device) -> None:
        self.names: list[str] = []
        self.statistic = make(columns, device)
        self.sample = torch.zeros(0, columns, device=device)

    def keep_sample(self, inputs: Tensor) -> None:
        """Keep the first tokens given, to measure errors on."""
        self.sample = inputs[:SAMPLE_TOKENS].float()

    def error(self, dense: Tensor, compressed: Tensor) -> float:
        """Relative squared error of a layer's output on the sample, against the dense layer's."""
        expected = self.sample @ dense.T
        difference = self.sample @ (dense - compressed).T
        return float(difference.square().sum() / expected.square().sum().clamp_min(1e-30))


class _Stop(Exception):
    """Ends a forward pass early."""


class BlockWalk:
    """Holds the hidden states of all calibration sequences and walks the blocks of a checkpoint.

    calibration: token ids (n, length), or None where no method asks for inputs.
    state_dir: where the hidden states before each block are kept, so that an interrupted walk goes on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Integer[Tensor, "n length"] | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.device, self.dtype = torch.device(device), dtype
        self.model = checkpoint.skeleton().to(dtype=dtype)
        self.blocks = decoder_blocks(self.model)
        self.hidden: list[Tensor] = []
        self.held_out = 0
        self._arguments: dict[str, dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        if calibration is not None:
            self._record_inputs(calibration)

    def load(self, name: str) -> nn.Module:
        """Put a block's weights into memory and return it."""
        block = self.blocks[name]
        for inner, _ in list(block.named_parameters()):
            self._set(f"{name}.{inner}", self.checkpoint.tensor(f"{name}.{inner}"))
        return block

    def unload(self, name: str) -> None:
        """Drop a block's weights."""
        for inner, _ in list(self.blocks[name].named_parameters()):
            parent, _, child = inner.rpartition(".")
            _drop(self.blocks[name].get_submodule(parent), child)

    @torch.no_grad()
    def outputs(self, name: str, hidden: list[Tensor]) -> Iterator[Tensor]:
        """Run a loaded block over batches of hidden states."""
        for batch in hidden:
            arguments, options = self._arguments[name][batch.shape[0]]
            out = self.blocks[name](batch.to(self.device), *arguments, **options)
            yield out[0] if isinstance(out, tuple) else out

    def advance(self, name: str) -> None:
        """Replace the hidden states by the block's outputs, batch by batch."""
        for index, out in enumerate(self.outputs(name, self.hidden)):
            self.hidden[index] = out

    def collect(
        self, name: str, linears: dict[str, nn.Module], make: Callable[[int, torch.device], Statistic]
    ) -> list[InputGroup]:
        """Run a loaded block and gather one statistic for each distinct input of these linears.

        linears: by full name. Groups come in the order in which the block uses them.

        Raises: CompressionError if an input is NaN or infinite, or a linear is never used.
        """
        groups: list[InputGroup] = []
        member: dict[str, InputGroup] = {}
        seen: list[tuple[Tensor, InputGroup]] = []
        held_out = False

        def observe(linear_name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                x: Tensor = inputs[0]
                if linear_name not in member:
                    shared = next((group for tensor, group in seen if tensor is x), None)
                    if shared is None:
                        shared = InputGroup(x.shape[-1], make, self.device)
                        groups.append(shared)
                    shared.names.append(linear_name)
                    member[linear_name] = shared
                group = member[linear_name]
                if group.names[0] != linear_name:
                    return
                seen.append((x, group))
                flat = x.reshape(-1, x.shape[-1])
                if held_out:
                    group.keep_sample(flat)
                    return
                if not len(group.sample):
                    group.keep_sample(flat)
                group.statistic.update(flat)

            return hook

        handles = [module.register_forward_pre_hook(observe(n)) for n, module in linears.items()]
        try:
            outputs = self.outputs(name, self.hidden)
            for index in range(len(self.hidden)):
                held_out = self.held_out > 0 and index == len(self.hidden) - 1
                seen.clear()
                next(outputs)
        finally:
            seen.clear()
            for handle in handles:
                handle.remove()
        unused = sorted(set(linears) - set(member))
        if unused:
            raise CompressionError(f"{unused[0]} is never used by its block; add it to skip_modules")
        for group in groups:
            group.statistic.check(group.names[0])
            dead = group.statistic.num_dead
            if dead:
                width = group.sample.shape[1]
                logger.warning(
                    "%s: %d of %d inputs are 0 in all calibration tokens", group.names[0], dead, width
                )
        return groups

    def save_state(self, path: Path, facts: dict[str, str]) -> None:
        """Write the hidden states and `facts`, such that the file is the old one or the whole new one."""
        temporary = path.with_name(path.name + ".tmp")
        tensors = {str(i): h.contiguous().cpu() for i, h in enumerate(self.hidden)} or {
            "none": torch.zeros(1)
        }
        save_file(tensors, temporary, metadata=facts)
        os.replace(temporary, path)

    def load_state(self, path: Path) -> None:
        """Read hidden states back."""
        tensors = load_file(path)
        self.hidden = [tensors[str(i)].to(self.device) for i in range(len(self.hidden))]

    def _set(self, name: str, value: Tensor) -> None:
        parent, _, child = name.rpartition(".")
        value = value.to(device=self.device, dtype=self.dtype)
        setattr(self.model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def _record_inputs(self, calibration: Tensor) -> None:
        """Run the embeddings, and note with what arguments the model calls each of its blocks."""
        embedding = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        self._set(f"{name}.weight", self.checkpoint.tensor(f"{name}.weight"))
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)
        size = max(1, BATCH_TOKENS // calibration.shape[1])
        rows = calibration.shape[0]
        batches = list(calibration.split(size))
        if rows >= HELD_OUT_FROM:
            self.held_out = 1
            batches = [*calibration[: rows - 1].split(size), calibration[rows - 1 :]]
        with self._recorders():
            for batch in batches:
                try:
                    self.model(input_ids=batch.to(self.device), use_cache=False)
                except _Stop:
                    continue
        _drop(embedding, "weight")

    @contextmanager
    def _recorders(self) -> Iterator[None]:
        names = list(self.blocks)

        def record(name: str) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
                self._arguments.setdefault(name, {})[hidden.shape[0]] = (arguments, options)
                if name == names[0]:
                    self.hidden.append(hidden)
                if name == names[-1]:
                    raise _Stop
                return hidden

            return forward

        originals = {name: block.forward for name, block in self.blocks.items()}
        for name, block in self.blocks.items():
            block.forward = record(name)
        try:
            yield
        finally:
            for name, block in self.blocks.items():
                block.forward = originals[name]


def _drop(module: nn.Module, name: str) -> None:
    """Free a parameter, keeping its shape."""
    empty = torch.empty_like(getattr(module, name), device="meta")
    setattr(module, name, nn.Parameter(empty, requires_grad=False))


def digest_tensor(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(
        tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()
