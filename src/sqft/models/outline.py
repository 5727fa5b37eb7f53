"""What can be known of a model before any weight is loaded: its shapes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sqft.models.blocks import decoder_blocks, fused_weights, head_weights
from sqft.models.checkpoint import build_skeleton, open_checkpoint, open_config
from sqft.models.experts import has_experts
from sqft.models.gguf_description import gguf_config
from sqft.models.location import fetch_from_hub, find_gguf
from sqft.models.packing import read_grid
from sqft.models.shapes import AFTER_HEAD, ModelOutline, Shapes
from sqft.ops import GridSpec
from sqft.sections import ModelSection

__all__ = ["model_config", "model_outline", "outline_skeleton"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def model_outline(section: ModelSection) -> ModelOutline:
    """The shapes of a model, from its configuration alone.

    Raises: ModelError if there is no such model, or its architecture is not understood.
    """
    gguf = find_gguf(section)  # refuses what is not a path here, before it is taken for one
    directory = Path(section.source).expanduser()
    is_here = gguf is None and directory.is_dir()
    has_weights = not is_here or _has_weights(directory)
    if is_here and has_weights:  # which must be whole
        checkpoint = open_checkpoint(directory, trust_remote_code=section.trust_remote_code)
        outline = outline_skeleton(checkpoint.skeleton())
        return _quantized(outline, checkpoint.quantized_names, checkpoint.grid)
    config = model_config(section)
    outline = outline_skeleton(build_skeleton(config, section.trust_remote_code), has_weights=has_weights)
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return outline
    grid = read_grid(settings if isinstance(settings, dict) else settings.to_dict())
    return _quantized(outline, tuple(outline.linears), grid)


def model_config(section: ModelSection) -> Any:
    """The configuration of a model, as transformers has it.

    Raises: ModelError if there is no such model, or its configuration is not understood.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        return gguf_config(gguf)
    directory = Path(section.source).expanduser()
    found = directory if directory.is_dir() else fetch_from_hub(section, weights=False)
    return open_config(found, section.trust_remote_code)


def outline_skeleton(skeleton: Any, *, has_weights: bool = True) -> ModelOutline:
    """The shapes of a model whose parameters may be on the meta device.

    Raises: ModelError if its decoder blocks are not found.
    """
    blocks = decoder_blocks(skeleton)
    inside = tuple(f"{name}." for name in blocks)
    linears: Shapes = {}
    other: Shapes = {}
    special: list[str] = []
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear):
            found = linears if name.startswith(inside) else other
            found[name] = (module.out_features, module.in_features)
            if found is linears and type(module).forward is not nn.Linear.forward:
                special.append(name)
    text = skeleton.config.get_text_config()
    return ModelOutline(
        linears,
        sum({id(parameter): parameter.numel() for parameter in skeleton.parameters()}.values()),
        len(blocks),
        text.hidden_size,
        text.vocab_size,
        has_weights,
        other,
        {name: weight.numel() for name, weight in fused_weights(skeleton).items()},
        {name: (weight.shape[0], weight.shape[1]) for name, weight in head_weights(skeleton).items()},
        special=special,
        has_experts=has_experts(skeleton),
        changes_logits=any(getattr(skeleton.config, name, None) for name in AFTER_HEAD),
    )


def _quantized(outline: ModelOutline, names: tuple[str, ...], grid: GridSpec | None) -> ModelOutline:
    parts = ("bits", "group_size", "symmetric", "scale_bits")
    stated = None if grid is None else {part: getattr(grid, part) for part in parts}
    return replace(outline, quantized=list(names), grid=stated)


def _has_weights(directory: Path) -> bool:
    return any(path.suffix in WEIGHTS for path in directory.iterdir())
