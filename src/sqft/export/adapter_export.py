"""Adapters that stay unmerged: a plain LoRA for the runtimes that take one."""

import shutil
from pathlib import Path

import torch

from sqft.adapters.lora_files import ForeignAdapter, open_foreign_adapter
from sqft.artifacts import EXPORT_RECORD, digest_file, digest_files, seal, write_json
from sqft.directories import check_destination, new_directory
from sqft.errors import ExportError
from sqft.export.model_card import adapter_card
from sqft.formats.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from sqft.formats.gguf_families import FAMILIES
from sqft.formats.weights import ExportSource, open_source
from sqft.runtimes.commands import serving_commands

__all__ = ["adapter_serving", "export_adapter"]

FILES = ("adapter_config.json", "adapter_model.safetensors")
GGUF = "adapter.gguf"


def export_adapter(adapter_dir: Path, base_dir: Path | None, format: str, output_dir: Path) -> Path:
    """Write a plain LoRA adapter as stock PEFT (`peft`) or for llama.cpp (`gguf`), and return what to serve.

    What was written is read back and compared with the adapter. A masked or quantization-aware adapter is
    refused: a server would add it dense, and so run another model.

    base_dir: the model that it belongs to, which gguf needs.

    Raises: AdapterError if it is not a plain LoRA; ExportError if the format takes none, if writing would
    destroy something else, or if what was written is not the adapter.
    """
    adapter = open_foreign_adapter(adapter_dir)
    if format not in {"peft", "gguf"}:
        raise ExportError(f"an unmerged adapter cannot be written as {format}; choose peft or gguf")
    source = _gguf_source(adapter, base_dir) if format == "gguf" else None
    check_destination(output_dir, adapter_dir, base_dir)
    made_of = {name: digest_file(adapter_dir / name) for name in FILES}
    with new_directory(output_dir) as partial:
        if source is None:
            _copy_peft(adapter, partial, made_of)
        else:
            _write_gguf(adapter, source, partial / GGUF)
        serve = adapter_serving(format, output_dir, base_dir)
        (partial / "README.md").write_text(adapter_card(output_dir, made_of, serve), encoding="utf-8")
        record = {"format": format, "adapter": True, "serve": serve, "files": digest_files(partial)}
        write_json(partial / EXPORT_RECORD, seal(record))
    return output_dir if source is None else output_dir / GGUF


def adapter_serving(format: str, output_dir: Path, base_dir: Path | None) -> list[str]:
    """How to serve an exported adapter beside its model."""
    return serving_commands(format, output_dir, GGUF if format == "gguf" else None, base=base_dir)


def _copy_peft(adapter: ForeignAdapter, directory: Path, made_of: dict[str, str]) -> None:
    for name in FILES:
        shutil.copyfile(adapter.directory / name, directory / name)
    changed = [name for name, digest in made_of.items() if digest_file(directory / name) != digest]
    if changed:
        raise ExportError(f"{changed[0]} changed while it was copied; export again")


def _gguf_source(adapter: ForeignAdapter, base_dir: Path | None) -> ExportSource:
    if base_dir is None:
        raise ExportError(
            "an adapter in gguf has its model's tensor names and rotary order; give the base too"
        )
    source = open_source(base_dir)
    if source.architecture not in FAMILIES or adapter.config.get("use_dora"):
        what = "DoRA" if adapter.config.get("use_dora") else source.architecture
        raise ExportError(f"llama.cpp takes no adapter of {what}; merge it")
    return source


def _write_gguf(adapter: ForeignAdapter, source: ExportSource, path: Path) -> None:
    factors = {}
    for name in adapter.names:
        lora_A, lora_B = adapter.factors(name)
        # llama.cpp knows one alpha for all modules, whatever their rank; so the scaling goes into B.
        factors[name] = lora_A, lora_B * adapter.scaling(name)
    write_gguf_adapter(source, factors, path)
    written = read_gguf_adapter(source, adapter.names, path)
    for name, expected in factors.items():
        if not all(torch.equal(a, b.half()) for a, b in zip(written[name], expected, strict=True)):
            raise ExportError(f"the update of {name} changed on the way to gguf")
