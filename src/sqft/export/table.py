"""The table of formats: what each holds, how it is written, read back and run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sqft.errors import ExportError, require
from sqft.formats.compressed_tensors import compressed_refusal, copy_model, read_compressed
from sqft.formats.dense import plain_refusal, read_plain, write_plain
from sqft.formats.gguf_model import gguf_path, gguf_refusal, read_gguf, write_gguf
from sqft.formats.gptq import gptq_refusal, read_gptq, write_gptq
from sqft.formats.openvino import XML, openvino_refusal, read_openvino, write_openvino
from sqft.formats.weights import ExportSource, IntegerWeight
from sqft.ops import GridSpec
from sqft.runtimes.hf import run_transformers
from sqft.runtimes.llama_cpp import LlamaCpp, check_tokenizer
from sqft.runtimes.openvino import OpenVinoModel

__all__ = ["FORMATS", "Format", "find_format", "require_runtime"]

Stored = Iterator[tuple[str, IntegerWeight | Tensor]]
Items = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Format:
    """One format.

    refusal: why it cannot hold a model exactly, or None. write: (source, directory, head type) → types of
    all tensors. read: the stored weights in the names of transformers. run: the runtime's logits at every
    position, None where no runtime of this format runs here. gives_probabilities: of their log softmax.
    grid: what to requantize to if allowed.
    """

    holds: str
    runtime: str
    refusal: Callable[[ExportSource], str | None]
    write: Callable[[ExportSource, Path, str], dict[str, str]]
    read: Callable[[ExportSource, Path], Stored]
    run: Callable[[ExportSource, Path, Items], Tensor] | None
    extra: tuple[str, str] | None = None
    gives_probabilities: bool = False
    grid: GridSpec | None = None


def _run_transformers(source: ExportSource, directory: Path, items: Items) -> Tensor:
    return run_transformers(directory, items)


def _write_half(source: ExportSource, directory: Path, head_type: str) -> dict[str, str]:
    return write_plain(source, directory, None)


def _write_single(source: ExportSource, directory: Path, head_type: str) -> dict[str, str]:
    return write_plain(source, directory, torch.float32)


def _write_gguf(source: ExportSource, directory: Path, head_type: str) -> dict[str, str]:
    return write_gguf(source, directory / "model.gguf", head_type=head_type)


def _run_llama_cpp(source: ExportSource, directory: Path, items: Items) -> Tensor:
    context = max(256, 2 * max(len(item) for item in items))
    runtime = LlamaCpp(gguf_path(directory), context=context)
    check_tokenizer(source.tokenizer, runtime)
    vocabulary = int(source.config["vocab_size"])
    return torch.stack(
        [
            runtime.next_log_probabilities(item[: end + 1], vocabulary)
            for item in items
            for end in range(len(item))
        ]
    )


def _run_openvino(source: ExportSource, directory: Path, items: Items) -> Tensor:
    model = OpenVinoModel(directory / XML)
    rows = []
    for item in items:
        model.reset()
        rows.append(model.logits(list(item)))
    return torch.cat(rows)


def _exact(source: ExportSource) -> str | None:
    return None


def _read_gguf(source: ExportSource, directory: Path) -> Stored:
    return read_gguf(source, gguf_path(directory))


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        holds="every integer grid of sqft",
        runtime="transformers",
        refusal=compressed_refusal,
        write=lambda source, directory, head_type: copy_model(source, directory),
        read=lambda source, directory: read_compressed(directory),
        run=_run_transformers,
    ),
    "gptq": Format(
        holds="integer grids whose rows and columns fill int32 words",
        runtime="none here",
        refusal=gptq_refusal,
        write=lambda source, directory, head_type: write_gptq(source, directory),
        read=read_gptq,
        run=None,
    ),
    "safetensors": Format(
        holds="weights that are exact in 16 bits, among them symmetric grids up to 4 bits",
        runtime="transformers",
        refusal=plain_refusal,
        write=_write_half,
        read=lambda source, directory: read_plain(directory),
        run=_run_transformers,
    ),
    "safetensors-float32": Format(
        holds="every model",
        runtime="transformers",
        refusal=_exact,
        write=_write_single,
        read=lambda source, directory: read_plain(directory),
        run=_run_transformers,
    ),
    "gguf": Format(
        holds="groups of a multiple of 32: Q4_0 up to 4 bits symmetric, Q4_1 or Q8_0 else; plain weights",
        runtime="llama.cpp",
        refusal=gguf_refusal,
        write=_write_gguf,
        read=_read_gguf,
        run=_run_llama_cpp,
        extra=("xllamacpp", "gguf"),
        gives_probabilities=True,
        grid=GridSpec(4, 32, True),
    ),
    "openvino": Format(
        holds="integer grids with scales exact in float16; plain weights",
        runtime="openvino",
        refusal=openvino_refusal,
        write=lambda source, directory, head_type: write_openvino(source, directory),
        read=read_openvino,
        run=_run_openvino,
        extra=("openvino", "openvino"),
    ),
}


def find_format(name: str) -> Format:
    """Raises: ExportError if there is no format of this name."""
    if name not in FORMATS:
        raise ExportError(f"format '{name}' is unknown; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def require_runtime(name: str) -> None:
    """Raises: MissingExtraError if the runtime that checks a format is not installed."""
    extra = FORMATS[name].extra
    if extra is not None:
        require(*extra)
