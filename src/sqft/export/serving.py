"""How to serve an artefact with its runtime's own server, and what every runtime does with zeros."""

from pathlib import Path

__all__ = ["RUNTIME_ZEROS", "serving_commands"]

RUNTIME_ZEROS = {
    "llama.cpp": "stores and multiplies zeros like any other weight",
    "openvino": "stores and multiplies zeros like any other weight",
    "transformers": "stores and multiplies zeros like any other weight; INT4 is dequantized when opened",
    "vllm": "stores and multiplies zeros like any other weight (not run here)",
}


def serving_commands(format_name: str, directory: Path, file: str | None = None) -> list[str]:
    """One command a line; a comment says what was not tried by the export."""
    place = str(directory)
    if format_name == "gguf":
        return [f"llama-server --model {place}/{file or 'model.gguf'} --ctx-size 2048 --port 8080"]
    if format_name == "openvino":
        return [
            'python -c "import openvino_genai as g; '
            f"print(g.LLMPipeline('{place}', 'CPU').generate('Hello', max_new_tokens=32))\"",
        ]
    if format_name == "gptq":
        return [f"vllm serve {place} --quantization gptq  # not tried: needs vLLM and a GPU"]
    if format_name == "compressed-tensors":
        return [f"vllm serve {place}  # not tried: INT4 needs a GPU or vLLM's AVX-512 build"]
    if format_name == "peft":
        return [f"vllm serve BASE --enable-lora --lora-modules tuned={place}  # not tried"]
    return [f"vllm serve {place}  # not tried", f"transformers serve {place}  # not tried"]
