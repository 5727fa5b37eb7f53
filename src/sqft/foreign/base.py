"""Bases made elsewhere, converted once to a directory that sqft opens, one linear in memory at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqft.directories import new_directory
from sqft.errors import ModelError
from sqft.formats.awq import AwqLayout
from sqft.formats.gptq import GptqLayout
from sqft.formats.grouped import GroupedLayout
from sqft.formats.nf4 import Nf4Layout, round_to_nf4
from sqft.models import open_checkpoint
from sqft.models.beside import read_config
from sqft.models.checkpoint import build_skeleton, open_config
from sqft.models.files import ForeignFiles, write_directory
from sqft.models.packing import pack_weight, packed_specs, quantization_config
from sqft.models.tensorfile import TensorSpec
from sqft.ops import GridSpec, QParams, QuantizedWeight
from sqft.progress import SILENT, Progress, track

__all__ = ["ON_LOADING", "convert_base", "convert_training_base"]

ON_LOADING = "nf4:"  # in front of a 16-bit directory that QLoRA rounds to NF4 when it loads it
Layout = GroupedLayout | Nf4Layout
LAYOUTS: dict[str, type[Layout]] = {"gptq": GptqLayout, "awq": AwqLayout, "bitsandbytes": Nf4Layout}
AS_DENSE = "take it as 16 bits with --dequantize"
Shapes = dict[str, tuple[int, int]]
Specs = dict[str, TensorSpec]
Unpack = Callable[[str], dict[str, Tensor]]


def convert_base(
    directory: Path, output_dir: Path, *, dequantize: bool = False, progress: Progress = SILENT
) -> Path:
    """A directory that sqft opens: this one, or a converted copy of a model that another tool quantized.

    GPTQ and AWQ become compressed-tensors, with their integers and scales as they are. dequantize: they, and
    NF4 of bitsandbytes, become 16-bit weights instead.

    Raises: ModelError if the quantization is not understood, or its grid cannot be kept.
    """
    config = read_config(directory)
    quantization = config.pop("quantization_config", None) or {}
    method = quantization.get("quant_method")
    if method is None or (method == "compressed-tensors" and not dequantize):
        return directory
    if method == "compressed-tensors":
        raise ModelError(f"{directory} has a grid that a merge keeps; export it to safetensors for 16 bits")
    if method not in LAYOUTS:
        raise ModelError(f"{directory} is quantized by {method}; merge onto GPTQ, AWQ or compressed-tensors")
    files = ForeignFiles(directory)
    layout = LAYOUTS[method](files, quantization)
    skeleton = build_skeleton(open_config(directory, False), False)
    shapes = _shapes(skeleton, directory, layout.names)
    plain = _plain_names(skeleton, files, layout)
    if dequantize:
        specs, unpack = _to_dense(layout, shapes, config)
    elif isinstance(layout, Nf4Layout):
        raise ModelError(
            f"{directory} is NF4, no integer grid that a merge could keep; merge onto an integer base and "
            f"name this one with --trained-on, or {AS_DENSE}"
        )
    else:
        grid = _shared_grid(layout, shapes)
        specs, unpack = _to_grid(layout, shapes, grid)
        config["quantization_config"] = quantization_config(grid, sorted(set(shapes) - set(layout.names)))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, files.tensor(name)) for name in plain)
        for name in track(layout.names, "convert", progress):
            yield from unpack(name).items()

    with new_directory(output_dir) as partial:
        specs |= {name: files.spec(name) for name in plain}
        write_directory(partial, directory, config, specs, tensors())
    return output_dir


def convert_training_base(base: str, output_dir: Path, *, progress: Progress = SILENT) -> Path:
    """The base that an adapter was trained on, as a directory that sqft opens.

    base: a model directory, 16-bit, compressed-tensors, GPTQ, AWQ or NF4; or `nf4:` and a 16-bit directory:
    the linears of its blocks are rounded to NF4, as bitsandbytes does on loading.

    Raises: ModelError if it is none of these.
    """
    if not base.startswith(ON_LOADING):
        directory = Path(base)
        method = (read_config(directory).get("quantization_config") or {}).get("quant_method")
        return convert_base(directory, output_dir, dequantize=method in LAYOUTS, progress=progress)
    directory = Path(base.removeprefix(ON_LOADING))
    config = read_config(directory)
    if config.get("quantization_config"):
        raise ModelError(f"{directory} is quantized already; {ON_LOADING} stands before a 16-bit directory")
    checkpoint = open_checkpoint(directory)
    blocks = tuple(f"{name}." for name in checkpoint.block_names)
    rounded = {f"{name}.weight" for name in checkpoint.linears if name.startswith(blocks)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in track(checkpoint.names, "round to NF4", progress):
            value = checkpoint.tensor(name)
            yield name, round_to_nf4(value) if name in rounded else value

    with new_directory(output_dir) as partial:
        specs = {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint.names}
        write_directory(partial, directory, config, specs, tensors())
    return output_dir


def _to_grid(layout: GroupedLayout, shapes: Shapes, grid: GridSpec) -> tuple[Specs, Unpack]:
    """Codes and scales as they are, in the layout of compressed-tensors."""

    def unpack(name: str) -> dict[str, Tensor]:
        qparams = QParams(layout.scale(name), layout.zero_point(name), grid.bits, grid.symmetric)
        weight = QuantizedWeight(_fitting(name, layout.codes(name), shapes), qparams)
        return pack_weight(name, weight, grid.scale_dtype)

    specs: Specs = {}
    for name in layout.names:
        specs |= packed_specs(name, shapes[name], grid)
    return specs, unpack


def _to_dense(layout: Layout, shapes: Shapes, config: dict[str, Any]) -> tuple[Specs, Unpack]:
    """The weights that the layers multiply with."""
    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    half = stated if stated in {torch.float16, torch.bfloat16} else torch.float16
    dtypes = {name: layout.dense_dtype(name, half) for name in layout.names}

    def unpack(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": _fitting(name, layout.dense(name, dtypes[name]), shapes)}

    return {f"{name}.weight": (dtypes[name], shapes[name]) for name in layout.names}, unpack


def _shared_grid(layout: GroupedLayout, shapes: Shapes) -> GridSpec:
    """The grid that all linears share, out of their scales and zero points alone.

    Raises: ModelError if there is none.
    """
    directory = layout.files.directory
    sizes, rowwise, symmetric, narrow = set(), True, True, True
    for name in layout.names:
        columns, groups = shapes[name][1], layout.num_groups(name)
        size = columns // groups
        if columns % groups or not torch.equal(layout.group_index(name), torch.arange(columns) // size):
            raise ModelError(
                f"{directory} has the groups of {name} in activation order (desc_act), which a merge "
                f"cannot keep; {AS_DENSE}, and quantize the merged model with sqft compress"
            )
        scale, zero_point = layout.scale(name), layout.zero_point(name)
        sizes.add(size)
        rowwise &= groups == 1
        symmetric &= bool((zero_point == 1 << (layout.bits - 1)).all())
        narrow &= torch.equal(scale.bfloat16().float(), scale)
    if len(sizes) > 1 and not rowwise:
        raise ModelError(f"{directory} has groups of {sorted(sizes)} columns, not one size; {AS_DENSE}")
    size = -1 if rowwise else sizes.pop()
    return GridSpec(layout.bits, size, symmetric, 8 if narrow else 11)


def _shapes(skeleton: nn.Module, directory: Path, names: list[str]) -> Shapes:
    """(out, in) of every linear of the architecture, to which `names` must belong."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not names:
        raise ModelError(f"{directory} states a quantization but holds no quantized weights")
    for name in names:
        if name not in shapes:
            raise ModelError(f"{directory} holds {name}, which is not a linear of its architecture")
    return shapes


def _plain_names(skeleton: nn.Module, files: ForeignFiles, layout: Layout) -> list[str]:
    """The tensors that stay as they are; without the zero biases that older tools gave to every linear."""
    quantized: set[str] = set().union(*(layout.stored(name) for name in layout.names))
    known = set(skeleton.state_dict())
    return [
        name
        for name in files.names
        if name not in quantized
        and (name in known or not name.endswith(".bias") or bool(files.tensor(name).any()))
    ]


def _fitting(name: str, value: Tensor, shapes: Shapes) -> Tensor:
    if tuple(value.shape) != shapes[name]:
        raise ModelError(f"{name} has shape {tuple(value.shape)}, its architecture has {shapes[name]}")
    return value
