"""How to serve an artefact with its runtime's own server, and what every runtime does with zeros."""

import importlib.util
import json
import shlex
from pathlib import Path

__all__ = ["RUNTIME_ZEROS", "opening_code", "serving_commands"]

RUNTIME_ZEROS = {
    "llama.cpp": "stores and multiplies zeros like any other weight",
    "llama.cpp + sqft": "stored like any other weight; packed when the model is opened, and not multiplied",
    "openvino": "stores and multiplies zeros like any other weight",
    "transformers": "stores and multiplies zeros like any other weight; INT4 is dequantized when opened",
    "transformers + sqft": "neither stored nor multiplied",
    "vllm": "stores and multiplies zeros like any other weight (not run here)",
}

DEQUANTIZED = "quantization_config=CompressedTensorsConfig(dequantize=True)"
TRIED = "tried with SmolLM2-135M"  # docs/results/deploy.md


def serving_commands(
    format_name: str, directory: Path, file: str | None = None, *, base: Path | None = None
) -> list[str]:
    """Serving commands, one a line with quoted paths; comments say what each needs, and which were tested.

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


def opening_code(model: Path, adapter: Path | None = None) -> list[str]:
    """Lines of Python that open a model directory, with a plain LoRA beside it if there is one.

    Without an adapter transformers alone opens it. With one on an integer base stock PEFT needs float
    weights, which `sqft.models.load_model` gives exactly.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    if adapter is not None and quantization is not None:
        imports = ["from peft import PeftModel", "from sqft.models import load_model"]
        opened = f"load_model({str(model)!r})"
    else:
        groups = (quantization or {}).get("config_groups", {}).values()
        symmetric = all(group["weights"]["symmetric"] for group in groups)
        names = ["AutoModelForCausalLM", *([] if symmetric else ["CompressedTensorsConfig"])]
        imports = [f"from transformers import {', '.join(names)}"]
        imports = imports if adapter is None else ["from peft import PeftModel", *imports]
        options = "" if symmetric else f", {DEQUANTIZED}"
        opened = f"AutoModelForCausalLM.from_pretrained({str(model)!r}{options})"
    if adapter is not None:
        opened = f"PeftModel.from_pretrained({opened}, {str(adapter)!r})"
    return [*imports, f"model = {opened}"]


def _vllm(arguments: str, needs: str = "") -> str:
    missing = importlib.util.find_spec("vllm") is None
    # vLLM 0.33 pins compressed-tensors 0.17, and sqft needs 0.19: an extra of sqft could not be installed.
    install = "vLLM is missing: pip install vllm, in an environment of its own" if missing else ""
    notes = ["not tried here", needs, install]
    return f"vllm serve {arguments}  # {'; '.join(note for note in notes if note)}"
