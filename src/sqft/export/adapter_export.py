"""Adapters that stay unmerged: a plain LoRA for the runtimes that take one."""

import shutil
from pathlib import Path

from sqft.artifacts import digest_files, new_directory, write_json
from sqft.errors import ExportError
from sqft.export.destination import check_destination
from sqft.export.foreign_adapter import open_foreign_adapter
from sqft.export.gguf_file import ARCHITECTURES, write_gguf_adapter
from sqft.export.source import open_source

__all__ = ["export_adapter"]

EXPORT = "sqft_export.json"


def export_adapter(adapter_dir: Path, base_dir: Path | None, format: str, output_dir: Path) -> Path:
    """Write a plain LoRA adapter as stock PEFT (`peft`) or for llama.cpp (`gguf`), and return what to serve.

    A masked or quantization-aware adapter is refused: a server would add it dense, and so run another model.

    base_dir: the model that it belongs to, which gguf needs.

    Raises: AdapterError if it is no plain LoRA; ExportError if the format takes none.
    """
    adapter = open_foreign_adapter(adapter_dir)
    check_destination(output_dir, adapter_dir, base_dir)
    if format == "peft":
        with new_directory(output_dir) as partial:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(adapter_dir / name, partial / name)
            _write_record(partial, format)
        return output_dir
    if format != "gguf":
        raise ExportError(f"an unmerged adapter cannot be written as {format}; choose peft or gguf")
    if base_dir is None:
        raise ExportError(
            "an adapter in gguf needs the names and rotary order of its model; give the base too"
        )
    source = open_source(base_dir)
    if source.architecture not in ARCHITECTURES or adapter.config.get("use_dora"):
        what = "DoRA" if adapter.config.get("use_dora") else source.architecture
        raise ExportError(f"llama.cpp takes no adapter of {what}; merge it")
    factors = {}
    for name in adapter.names:
        lora_A, lora_B = adapter.factors(name)
        # llama.cpp knows one alpha for all modules, whatever their rank; so the scaling goes into B.
        factors[name] = lora_A, lora_B * adapter.scaling(name)
    with new_directory(output_dir) as partial:
        write_gguf_adapter(source, factors, partial / "adapter.gguf")
        _write_record(partial, format)
    return output_dir / "adapter.gguf"


def _write_record(directory: Path, format: str) -> None:
    """What `sqft verify` compares the files with, and what tells that sqft wrote them."""
    write_json(directory / EXPORT, {"format": format, "adapter": True, "files": digest_files(directory)})
