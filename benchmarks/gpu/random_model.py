"""Llama-3-8B with random weights, made on a device and never stored, opened as a model directory is."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from sqft.models import Checkpoint, decoder_blocks
from sqft.models.checkpoint import build_skeleton
from sqft.ops import GridSpec, QParams, QuantizedWeight, keep_nonzero, quantize

__all__ = ["LLAMA3_8B", "RandomCheckpoint", "RandomMasks", "random_checkpoint"]

GROUP = 128
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
DRY = LLAMA3_8B | {
    "vocab_size": 512,
    "hidden_size": GROUP,
    "intermediate_size": 2 * GROUP,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn when they are asked for; equal at every asking.

    device: where they are drawn. sparse: half of each linear inside the blocks is 0. shapes: of the weights.
    """

    device: str = "cpu"
    sparse: bool = True
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def tensor(self, name: str) -> Tensor:
        """Norms are 1; everything else is normal with deviation 0.02, in bfloat16."""
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        value = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        value.normal_(0, 0.02, generator=self._generator(name))
        if self.sparse and self._in_block(name):
            value = keep_nonzero(value, self.mask(name.removesuffix(".weight")))
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the architecture."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """bfloat16."""
        return torch.bfloat16

    def mask(self, linear: str) -> Tensor:
        """Which weights of a linear are kept: half of them, at random."""
        shape = self.shapes[f"{linear}.weight"]
        drawn = torch.rand(shape, device=self.device, generator=self._generator(f"{linear} mask"))
        return drawn < 0.5

    def quantized(self, name: str) -> QuantizedWeight:
        """A random weight on a symmetric 4-bit grid, zero where it is pruned."""
        rows, columns = self.shapes[f"{name}.weight"]
        weight = torch.empty(rows, columns, device=self.device)
        weight.normal_(0, 0.02, generator=self._generator(name))
        scale = torch.full((rows, columns // GROUP), 0.0078125, device=self.device)
        grid = QParams(scale, torch.full(scale.shape, 8, dtype=torch.uint8, device=self.device), 4, True)
        return QuantizedWeight(quantize(weight.mul_(self.mask(name)), grid), grid)

    def _in_block(self, name: str) -> bool:
        return name.startswith(tuple(f"{block}." for block in self.block_names))

    def _generator(self, text: str) -> torch.Generator:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return torch.Generator(self.device).manual_seed(seed)


class RandomMasks(Mapping[str, Tensor]):
    """The masks of a random checkpoint, each drawn when it is asked for."""

    def __init__(self, checkpoint: RandomCheckpoint, linears: list[str]) -> None:
        self.checkpoint, self.linears = checkpoint, linears

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.linears:
            raise KeyError(name)
        return self.checkpoint.mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


def random_checkpoint(
    device: str, *, quantized: bool, dry: bool, sparse: bool = True, blocks: int | None = None
) -> tuple[RandomCheckpoint, RandomMasks]:
    """A Llama-3-8B in bfloat16, or with all linears of its blocks on a 4-bit grid, its masks if sparse."""
    sizes = DRY if dry else LLAMA3_8B
    config = LlamaConfig(**(sizes | ({"num_hidden_layers": blocks} if blocks else {})))
    config.dtype = torch.bfloat16
    skeleton = build_skeleton(config, False)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = decoder_blocks(skeleton)
    linears = [
        f"{block}.{name}"
        for block, module in found.items()
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear)
    ]
    names = dict.fromkeys(shapes)
    if quantized:
        names = {n: None for n in names if n.removesuffix(".weight") not in linears}
        names |= {f"{name}.weight_packed": None for name in linears}
    grid = GridSpec(4, GROUP, True) if quantized else None
    checkpoint = RandomCheckpoint(
        Path("random-llama-3-8b"), config, tuple(names), tuple(found), torch.bfloat16, grid,
        device=device, sparse=sparse, shapes=shapes,
    )  # fmt: skip
    return checkpoint, RandomMasks(checkpoint, linears)
