"""Finding the model that a recipe names, as a model directory on this machine.

torch is imported where a model is converted: its tokenizer can be had without.
"""

import json
from pathlib import Path
from typing import Any

from sqft.artifacts import DIGESTS, digest_file, digest_json, write_json
from sqft.directories import new_directory
from sqft.errors import ModelError
from sqft.models.beside import copy_kept_files, read_config
from sqft.models.gguf_description import gguf_tokenizer
from sqft.models.gguf_header import GgufHeader, read_gguf_header
from sqft.models.location import fetch_from_hub, find_gguf
from sqft.models.tokenizer import load_tokenizer, quiet_transformers
from sqft.progress import SILENT, Progress
from sqft.sections import ModelSection

__all__ = ["converted_directory", "resolve_model", "source_tokenizer"]


def resolve_model(section: ModelSection, cache_dir: Path, progress: Progress = SILENT) -> Path:
    """The model directory that `section.source` means.

    A directory is taken as it is. A GGUF file is dequantized into `cache_dir`, once for each content.
    `package:NAME` is the one GGUF file inside an installed Python package, which is not imported.
    Anything else is a hub id, of which config, tokenizer and safetensors are fetched.

    Raises: ModelError if there is no such model or it cannot be read.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        return _convert_gguf(gguf, section, cache_dir, progress)
    path = Path(section.source).expanduser()
    return _recast(path if path.is_dir() else fetch_from_hub(section), section, cache_dir)


def _convert_gguf(path: Path, section: ModelSection, cache_dir: Path, progress: Progress) -> Path:
    dtype_name, final = _dtype_name(section), _converted(path, section, cache_dir)
    if (final / "config.json").is_file():
        return final
    import torch
    import transformers

    from sqft.models.checkpoint import open_checkpoint

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with progress.task(f"dequantizing {path.name}", 2) as advance, quiet_transformers():
        _check_blocks(path, read_gguf_header(path))
        try:
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=getattr(torch, dtype_name),
                output_loading_info=True,
                **options,
            )
            _check_loaded(path, model, loaded)
            advance(1)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except ModelError:
            raise
        except Exception as error:  # the reader of a damaged file fails in any way it likes
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(f"{path} cannot be read as GGUF ({reason})") from error
        with new_directory(final) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _clean_config(partial / "config.json", dtype_name)
            open_checkpoint(partial)
        advance(1)
    return final


def source_tokenizer(section: ModelSection, cache_dir: Path) -> Any:
    """The tokenizer of a model that may not be converted or fetched yet, without its weights.

    Raises: ModelError if there is none, or it cannot be read.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        converted = _converted(gguf, section, cache_dir)
        return load_tokenizer(converted) if (converted / "config.json").is_file() else gguf_tokenizer(gguf)
    path = Path(section.source).expanduser()
    found = path if path.is_dir() else fetch_from_hub(section, weights=False)
    return load_tokenizer(found, trust_remote_code=section.trust_remote_code)


def converted_directory(section: ModelSection, cache_dir: Path) -> Path | None:
    """Where the copy is, or would be, that `resolve_model` makes of a model here; None where it makes none.

    Raises: ModelError if there is no such model; one of the hub is fetched.
    """
    gguf = find_gguf(section)
    if gguf is not None:
        return _converted(gguf, section, cache_dir)
    if section.storage_dtype == "auto":
        return None
    path = Path(section.source).expanduser()
    return _recast_copy(path if path.is_dir() else fetch_from_hub(section), section, cache_dir)


def _converted(gguf: Path, section: ModelSection, cache_dir: Path) -> Path:
    """Where the model directory of a GGUF file is, or would be."""
    digest = digest_file(gguf, cache=Path(cache_dir) / DIGESTS)
    return Path(cache_dir) / f"{gguf.stem}-{digest[:12]}-{_dtype_name(section)}"


def _dtype_name(section: ModelSection) -> str:
    return "bfloat16" if section.storage_dtype == "auto" else section.storage_dtype


def _check_blocks(path: Path, header: GgufHeader) -> None:
    """Refuse a file that claims more blocks than it has tensors of, before anyone builds them."""
    named = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if header.num_blocks != len(named):
        raise ModelError(
            f"{path} states {header.num_blocks} blocks and has tensors of {len(named)}; fetch it again, or "
            "join its parts if it is one of several"
        )


def _check_loaded(path: Path, model: Any, loaded: dict[str, Any]) -> None:
    """Refuse weights that the file does not have: transformers makes them up, and warns."""
    from sqft.models.checkpoint import tied_weights

    missing = sorted(set(loaded["missing_keys"]) - set(tied_weights(model)))
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} tensors of its architecture, first {missing[0]}; fetch it again"
        )


def _clean_config(path: Path, dtype_name: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k != "quantization_config" and not k.startswith("_")}
    write_json(path, config | {"dtype": dtype_name})


def _recast(directory: Path, section: ModelSection, cache_dir: Path) -> Path:
    """The directory itself, or a copy with its floats in the storage dtype that the recipe asks for."""
    import torch

    from sqft.models.checkpoint import SINGLE, open_checkpoint
    from sqft.models.tensorfile import TensorFile

    checkpoint = open_checkpoint(directory, trust_remote_code=section.trust_remote_code)
    if section.storage_dtype == "auto" or checkpoint.storage_dtype == getattr(torch, section.storage_dtype):
        return directory
    if checkpoint.grid is not None:
        raise ModelError(f"{directory} is quantized; its storage dtype cannot be changed, leave it at auto")
    dtype = getattr(torch, section.storage_dtype)
    final = _recast_copy(directory, section, cache_dir)
    if (final / "config.json").is_file():
        return final
    with new_directory(final) as partial:
        specs = {name: (dtype, checkpoint.shape(name)) for name in checkpoint.names}
        file = TensorFile(partial / SINGLE, specs, {"format": "pt"})
        for name in specs:
            file.write(name, checkpoint.tensor(name).to(dtype))
        copy_kept_files(directory, partial)
        config = read_config(directory)
        config.pop("torch_dtype", None)
        write_json(partial / "config.json", config | {"dtype": section.storage_dtype})
    return final


def _recast_copy(directory: Path, section: ModelSection, cache_dir: Path) -> Path:
    cache = Path(cache_dir) / DIGESTS
    parts = [f"{p.name}:{digest_file(p, cache=cache)}" for p in sorted(directory.glob("*.safetensors"))]
    key = digest_json([digest_file(directory / "config.json"), *parts])[:12]
    return Path(cache_dir) / f"{directory.name}-{key}-{section.storage_dtype}"
