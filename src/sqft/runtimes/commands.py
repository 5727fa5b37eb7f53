"""How to serve an artefact with its runtime's own server, and what every runtime does with zeros."""

import importlib.util
import shlex
from pathlib import Path

__all__ = ["RUNTIME_ZEROS", "serving_commands"]

RUNTIME_ZEROS = {
    "llama.cpp": "stores and multiplies zeros like any other weight",
    "openvino": "stores and multiplies zeros like any other weight",
    "transformers": "stores and multiplies zeros like any other weight; INT4 is dequantized when opened",
    "vllm": "stores and multiplies zeros like any other weight (not run here)",
}

TRIED = "tried with SmolLM2-135M"  # docs/results/deploy.md


def serving_commands(
    format_name: str, directory: Path, file: str | None = None, *, base: Path | None = None
) -> list[str]:
    """One command a line, its paths quoted; a comment says what it needs, and whether it was ever tried.

    base: of an adapter (peft, or gguf with `file`), the model that it is served with.
    """
    place = shlex.quote(str(directory))
    if format_name == "gguf":
        model = shlex.quote(str(directory / (file or "model.gguf")))
        lora = f"BASE.gguf --lora {model}" if file == "adapter.gguf" else model
        note = f"{TRIED}; fastest if llama.cpp is built on the machine that serves"
        return [f"llama-server --model {lora} --ctx-size 2048 --port 8080  # {note}"]
    if format_name == "openvino":
        code = (
            f"import openvino_genai as g; p = g.LLMPipeline({str(directory)!r}, 'CPU'); "
            "print(p.generate('Hello', max_new_tokens=32))"
        )
        return [f"python -c {shlex.quote(code)}  # {TRIED}; needs pip install 'sqft[openvino]'"]
    if format_name == "gptq":
        return [_vllm(f"{place} --quantization gptq", "needs a GPU")]
    if format_name == "compressed-tensors":
        return [_vllm(place, "INT4 needs a GPU, or a CPU with AVX-512")]
    if format_name == "peft":
        served = "BASE" if base is None else shlex.quote(str(base))
        modules = shlex.quote(f"tuned={directory}")
        return [_vllm(f"{served} --enable-lora --lora-modules {modules}")]
    return [_vllm(place), f"transformers serve {place}  # {TRIED}; needs pip install 'transformers[serving]'"]


def _vllm(arguments: str, needs: str = "") -> str:
    missing = importlib.util.find_spec("vllm") is None
    # vLLM 0.33 pins compressed-tensors 0.17, and sqft needs 0.19: an extra of sqft could not be installed.
    install = "vLLM is missing: pip install vllm, in an environment of its own" if missing else ""
    notes = ["not tried here", needs, install]
    return f"vllm serve {arguments}  # {'; '.join(note for note in notes if note)}"
