"""The walk over decoder blocks: one block in memory, its calibration inputs in, its outputs on to the next.

Later blocks see what the earlier ones put out after compression.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Integer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from sqft.artifacts import replace_file, seal, unseal
from sqft.compression.inputs import InputGroup, Statistic
from sqft.compression.processes import share_of_rows
from sqft.errors import CompressionError
from sqft.models import Checkpoint, decoder_blocks
from sqft.models.experts import show_every_token

__all__ = ["BlockWalk", "digest_tensor", "read_facts"]

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048
HELD_OUT_FROM = 8  # from this many sequences on, the last is kept out of the statistics, to measure errors on
SAMPLE_TOKENS = 128
PROBE_TOKENS = 32
TENSORS = "tensors"  # in the metadata of a state: the digests of its tensors


class _Stop(Exception):
    """Ends a forward pass early."""


class _Unpacked(Exception):
    """The model takes the first part of what a block returns, so its blocks return tuples."""


class BlockWalk:
    """Holds the hidden states of all calibration sequences and walks the blocks of a checkpoint.

    calibration: token ids (n, length), or None where no method asks for inputs. dense_stream: keep the hidden
    states of the uncompressed model beside those of the compressed one. spill_dir: keep hidden states in
    memory-mapped files there. However a `with` block ends, hidden states and files are gone then.
    batch_rows: sequences of a batch; None: as many as make 2048 tokens. held_out_rows: so many at the end are
    batches of their own, the last `held_out`; None: one, of 8 sequences or more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Integer[Tensor, "n length"] | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        dense_stream: bool = False,
        spill_dir: Path | None = None,
        batch_rows: int | None = None,
        held_out_rows: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.spill_dir = spill_dir
        if spill_dir is not None:  # what a run that was killed has left
            shutil.rmtree(spill_dir, ignore_errors=True)
        self.device, self.dtype = torch.device(device), dtype
        self.model = checkpoint.skeleton().to(dtype=dtype)
        show_every_token(self.model)
        self.blocks = decoder_blocks(self.model)
        self.hidden: list[Tensor] = []
        self.dense_hidden: list[Tensor] = []
        self.dense_block: nn.Module | None = None
        self._dense_stream = dense_stream
        self.held_out = 0
        self._arguments: dict[str, dict[torch.Size, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        if calibration is not None:
            self._record_inputs(share_of_rows(calibration), batch_rows, held_out_rows)

    def load(self, name: str) -> nn.Module:
        """Put a block's weights into memory and return it."""
        block = self.blocks[name]
        for inner, _ in list(block.named_parameters()):
            self.replace(f"{name}.{inner}", self.checkpoint.tensor(f"{name}.{inner}"))
        if self._dense_stream:
            self.dense_block = copy.deepcopy(block)
        return block

    def unload(self, name: str) -> None:
        """Drop a block's weights."""
        self.dense_block = None
        for inner, _ in list(self.blocks[name].named_parameters()):
            parent, _, child = inner.rpartition(".")
            _drop(self.blocks[name].get_submodule(parent), child)

    @torch.no_grad()
    def outputs(self, name: str, hidden: list[Tensor], block: nn.Module | None = None) -> Iterator[Tensor]:
        """Run a loaded block (or a copy of it) over batches of hidden states."""
        for batch in hidden:
            yield self._call(name, block or self.blocks[name], batch)

    def advance(self, name: str) -> None:
        """Replace the hidden states by the block's outputs, batch by batch; nobody reads the last block's."""
        if name == next(reversed(self.blocks)):
            return
        for index, out in enumerate(self.outputs(name, self.hidden)):
            self.hidden[index] = self._keep(self.hidden[index], out)
        self.advance_dense(name)

    def advance_dense(self, name: str) -> None:
        """Replace the uncompressed model's hidden states by its block's outputs, once a block."""
        if self.dense_block is not None:
            for index, out in enumerate(self.outputs(name, self.dense_hidden, self.dense_block)):
                self.dense_hidden[index] = self._keep(self.dense_hidden[index], out)
            self.dense_block = None

    def input_groups(self, name: str, linears: dict[str, nn.Module]) -> list[list[str]]:
        """Which of these linears (by full name) of a loaded block read the very same tensor, in order of use.

        A few tokens show it.

        Raises: CompressionError if a linear is never used.
        """
        seen: list[tuple[Tensor, list[str]]] = []

        def observe(linear: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                for tensor, names in seen:
                    if tensor is inputs[0]:
                        names.append(linear)
                        return
                seen.append((inputs[0], [linear]))

            return hook

        with _hooks(linears, observe):
            self._call(name, self.blocks[name], self.hidden[0][:1, :PROBE_TOKENS])
        groups = [names for _, names in seen]
        unused = sorted(set(linears) - {n for names in groups for n in names})
        if unused:
            raise CompressionError(f"{unused[0]} is never used by its block; add it to skip_modules")
        return groups

    def collect(
        self, name: str, groups: list[list[str]], make: Callable[[int, torch.device], Statistic]
    ) -> list[InputGroup]:
        """Run a loaded block over the calibration and gather a statistic for each group of linears.

        The forward pass ends where the last of the groups has its input.

        Raises: CompressionError if an input is NaN or infinite.
        """
        leaders = {names[0]: self.model.get_submodule(names[0]) for names in groups}
        found: dict[str, InputGroup] = {}
        held_out_from = len(self.hidden) - self.held_out
        for index, batch in enumerate(self.hidden):
            inputs = self._inputs(name, self.blocks[name], leaders, batch)
            dense: dict[str, Tensor] = {}
            if self.dense_block is not None:
                start = len(name) + 1
                copies = {n: self.dense_block.get_submodule(n[start:]) for n in leaders}
                dense = self._inputs(name, self.dense_block, copies, self.dense_hidden[index])
            for names in groups:
                x = inputs[names[0]]
                if names[0] not in found:
                    statistic = make(x.shape[1], self.device)
                    found[names[0]] = InputGroup(names, statistic, x.shape[1], self.device)
                group = found[names[0]]
                held_out = index >= held_out_from
                if held_out or not len(group.sample):
                    group.sample = x[:: -(-len(x) // SAMPLE_TOKENS)].to(torch.float32, copy=True)
                if not held_out:
                    group.statistic.update(x, *([dense[names[0]]] if dense else []))
        result = [found[names[0]] for names in groups]
        for group in result:
            group.statistic.reduce()
            group.statistic.check(group.names[0])
            dead, width = group.statistic.num_dead, group.sample.shape[1]
            if dead:
                logger.warning(
                    "%s: %d of %d inputs are 0 in all calibration tokens", group.names[0], dead, width
                )
        return result

    def call(
        self, name: str, block: nn.Module, batch: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What a block makes of a batch of hidden states, with these weights in the place of its own."""
        arguments, options = self._arguments[name][batch.shape[:2]]
        out = functional_call(block, dict(weights or {}), (batch.to(self.device), *arguments), options)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def _call(self, name: str, block: nn.Module, batch: Tensor) -> Tensor:
        return self.call(name, block, batch)

    def _inputs(
        self, name: str, block: nn.Module, linears: dict[str, nn.Module], batch: Tensor
    ) -> dict[str, Tensor]:
        """What these linears of a block read, as (tokens, in)."""
        inputs: dict[str, Tensor] = {}

        def observe(linear: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                inputs[linear] = arguments[0].flatten(0, -2)
                if len(inputs) == len(linears):
                    raise _Stop

            return hook

        with _hooks(linears, observe), suppress(_Stop):
            self._call(name, block, batch)
        return inputs

    def _keep(self, old: Tensor, new: Tensor) -> Tensor:
        if self.spill_dir is None:
            return new
        return old.copy_(new)

    def _first(self, hidden: Tensor) -> Tensor:
        """A tensor of hidden states, in a memory-mapped file where activations are spilled."""
        if self.spill_dir is None:
            return hidden
        self.spill_dir.mkdir(parents=True, exist_ok=True)
        path = self.spill_dir / f"hidden-{len(list(self.spill_dir.iterdir()))}.bin"
        mapped = torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return mapped.view(hidden.shape).copy_(hidden)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the hidden states, and the files they were spilled to."""
        self.hidden, self.dense_hidden = [], []
        if self.spill_dir is not None:
            shutil.rmtree(self.spill_dir, ignore_errors=True)

    def save_state(self, path: Path, facts: dict[str, str], *, hidden: bool = True) -> None:
        """Write the hidden states and `facts`, such that the file is the old one or the whole new one.

        hidden False: without hidden states, where no block is left that reads them.
        """
        temporary = path.with_name(path.name + ".tmp")
        states = [*self.hidden, *self.dense_hidden] if hidden else []
        states = states or [torch.zeros(1)]
        tensors = {str(index): state.contiguous().cpu() for index, state in enumerate(states)}
        facts = facts | {TENSORS: json.dumps({name: digest_tensor(t) for name, t in tensors.items()})}
        save_file(tensors, temporary, metadata=seal(facts))
        replace_file(temporary, path)

    def load_state(self, path: Path) -> bool:
        """Read hidden states back; False if the file does not hold them as they were written."""
        digests = json.loads(read_facts(path)[TENSORS])
        count = len(self.hidden) + len(self.dense_hidden)
        with safe_open(path, framework="pt") as file:
            if sorted(file.keys()) != sorted(map(str, range(count))):
                return False
            tensors = [file.get_tensor(str(index)).to(self.device) for index in range(count)]
        if any(digests[str(index)] != digest_tensor(tensor) for index, tensor in enumerate(tensors)):
            return False
        first = len(self.hidden)
        self.hidden = [self._keep(old, new) for old, new in zip(self.hidden, tensors[:first], strict=True)]
        self.dense_hidden = [
            self._keep(old, new) for old, new in zip(self.dense_hidden, tensors[first:], strict=True)
        ]
        return True

    def replace(self, name: str, value: Tensor) -> None:
        """Put a parameter, by full name, into the model, as this walk computes."""
        parent, _, child = name.rpartition(".")
        value = value.to(device=self.device, dtype=self.dtype)
        setattr(self.model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def _record_inputs(self, calibration: Tensor, batch_rows: int | None, held_out_rows: int | None) -> None:
        """Run what comes before the blocks, and note with what arguments the model calls each of them."""
        before = self._outside_of_blocks()
        for name in before:
            self.replace(name, self.checkpoint.tensor(name))
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)
        size = batch_rows or max(1, BATCH_TOKENS // calibration.shape[1])
        last = int(len(calibration) >= HELD_OUT_FROM) if held_out_rows is None else held_out_rows
        seen, held_out = calibration[: len(calibration) - last], calibration[len(calibration) - last :]
        self.held_out = -(-last // size)
        batches = [*seen.split(size), *(held_out.split(size) if last else ())]
        for returns_tuple in (False, True):
            self.hidden, self.dense_hidden, self._arguments = [], [], {}
            with suppress(_Unpacked), self._recorders(returns_tuple):
                for batch in [*batches, calibration[:1, :PROBE_TOKENS]]:
                    with suppress(_Stop):
                        self.model(input_ids=batch.to(self.device), use_cache=False)
                break
        self.hidden, self.dense_hidden = self.hidden[: len(batches)], self.dense_hidden[: len(batches)]
        for name in before:
            parent, _, child = name.rpartition(".")
            _drop(self.model.get_submodule(parent), child)

    def _outside_of_blocks(self) -> list[str]:
        """Parameters that are in no block, nor the output head: embeddings of tokens and places, norms."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        heads = set() if head is embedding else {id(p) for p in head.parameters()} if head else set()
        heads -= {id(p) for p in embedding.parameters()}
        inside = tuple(f"{name}." for name in self.blocks)
        names = [name for name, p in self.model.named_parameters() if id(p) not in heads]
        return [name for name in names if not name.startswith(inside)]

    @contextmanager
    def _recorders(self, returns_tuple: bool) -> Iterator[None]:
        names = list(self.blocks)

        def record(name: str) -> Callable[..., Any]:
            def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
                if hidden.dim() == 2:
                    raise _Unpacked
                self._arguments.setdefault(name, {})[hidden.shape[:2]] = (arguments, options)
                if name == names[0]:
                    self.hidden.append(self._first(hidden))
                    if self._dense_stream:
                        self.dense_hidden.append(self._first(hidden.clone()))
                if name == names[-1]:
                    raise _Stop
                return (hidden,) if returns_tuple else hidden

            return forward

        originals = {name: block.forward for name, block in self.blocks.items()}
        for name, block in self.blocks.items():
            block.forward = record(name)
        try:
            yield
        finally:
            for name, block in self.blocks.items():
                block.forward = originals[name]


@contextmanager
def _hooks(
    linears: dict[str, nn.Module], observe: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None]]
) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(observe(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(module: nn.Module, name: str) -> None:
    """Free a parameter, keeping its shape."""
    empty = torch.empty_like(getattr(module, name), device="meta")
    setattr(module, name, nn.Parameter(empty, requires_grad=False))


def read_facts(path: Path) -> dict[str, str]:
    """The facts of a state that `save_state` wrote.

    Raises: SafetensorError, OSError, KeyError or ValueError if the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return unseal(file.metadata())


def digest_tensor(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(
        tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()
