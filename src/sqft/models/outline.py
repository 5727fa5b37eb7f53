"""What can be known of a model before any weight is loaded: its identity and its shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sqft.artifacts import digest_file, digest_files, digest_json
from sqft.models.blocks import decoder_blocks
from sqft.models.checkpoint import build_skeleton, open_checkpoint, open_config
from sqft.models.gguf_description import gguf_config
from sqft.models.source import fetch_from_hub, find_gguf
from sqft.sections import ModelSection

__all__ = ["ModelOutline", "model_identity", "model_outline", "source_bytes"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ModelOutline:
    """Shapes of a model.

    skeleton: the model on the meta device. linears: (out, in) of every linear inside the
    blocks, by full name. has_weights: False of a directory with a config alone, which can be planned for.
    """

    skeleton: nn.Module
    linears: dict[str, tuple[int, int]]
    num_parameters: int
    num_blocks: int
    hidden_size: int
    vocab_size: int
    has_weights: bool = True


def model_identity(section: ModelSection, digest_cache: Path) -> str:
    """A digest of the weights that a recipe starts from: of file contents, or of the hub's commit.

    Raises: ModelError if there is no such model.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        content: Any = digest_file(gguf, cache=digest_cache)
    elif Path(section.source).expanduser().is_dir():
        content = digest_files(Path(section.source).expanduser(), cache=digest_cache)
    else:
        content = fetch_from_hub(section, weights=False).name  # a snapshot is called after its commit
    return digest_json({"content": content, "storage_dtype": section.storage_dtype})


def source_bytes(section: ModelSection) -> int:
    """The size of what `model_identity` reads; 0 for a model of the hub, which its commit identifies.

    Raises: ModelError if there is no such model.
    """
    gguf = find_gguf(section)
    directory = Path(section.source).expanduser()
    paths = [gguf] if gguf is not None else directory.rglob("*") if directory.is_dir() else []
    return sum(path.stat().st_size for path in paths if path.is_file())


def model_outline(section: ModelSection) -> ModelOutline:
    """The shapes of a model, from its configuration alone.

    Raises: ModelError if there is no such model, or its architecture is not understood.
    """
    gguf, has_weights = find_gguf(section), True
    directory = Path(section.source).expanduser()
    if gguf is not None:
        config = gguf_config(gguf)
    elif directory.is_dir():
        has_weights = any(path.suffix in WEIGHTS for path in directory.iterdir())
        if has_weights:
            config = open_checkpoint(directory, trust_remote_code=section.trust_remote_code).config
        else:
            config = open_config(directory, section.trust_remote_code)
    else:
        config = open_config(fetch_from_hub(section, weights=False), section.trust_remote_code)
    skeleton = build_skeleton(config, section.trust_remote_code)
    blocks = decoder_blocks(skeleton)
    linears = {
        f"{block_name}.{name}": (module.out_features, module.in_features)
        for block_name, block in blocks.items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    parameters = {id(parameter): parameter.numel() for parameter in skeleton.parameters()}
    return ModelOutline(
        skeleton,
        linears,
        sum(parameters.values()),
        len(blocks),
        config.get_text_config().hidden_size,
        config.get_text_config().vocab_size,
        has_weights,
    )
