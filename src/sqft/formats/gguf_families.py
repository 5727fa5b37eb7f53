"""Model families that llama.cpp runs: its name of each, what it wants to know, and what it takes for granted.

Source: gguf-py, llama.cpp's `convert_hf_to_gguf.py` and `src/models/`, where some constants of a family are
compiled in; a model with other ones is refused. Each row was compared with transformers, logit by logit, in
llama.cpp (tests/export/test_gguf_families.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH

__all__ = ["FAMILIES", "GgufFamily", "head_size", "rope_settings"]

Config = dict[str, Any]
Tell = Callable[[GGUFWriter, Config], None]
Refuse = Callable[[Config], str | None]


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp stores one of transformers' model types.

    interleaved: it wants the two halves of each rotary head interleaved in q and k. norm_offset: what is
    added to the weights of norms. epsilon: the setting that holds it. layer_norm: norms subtract the mean.
    grouped: several heads may share a key. tell: metadata that only this family has. refuse: why a
    configuration cannot be held, or None.
    """

    arch: MODEL_ARCH
    interleaved: bool = False
    norm_offset: int = 0
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    grouped: bool = True
    tell: Tell = lambda writer, config: None
    refuse: Refuse = lambda config: None


def head_size(config: Config) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_settings(config: Config) -> Config:
    """The rotary embedding; of several that layers have, that of full attention."""
    settings: Config = config.get("rope_parameters") or {}
    return settings.get("full_attention") or settings


def _gemma2(writer: GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(float(config.get("attn_logit_softcapping") or 0))
    writer.add_final_logit_softcapping(float(config.get("final_logit_softcapping") or 0))
    writer.add_sliding_window(int(config["sliding_window"]))


def _gemma3(writer: GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(int(config["sliding_window"]))


def _gemma_refusal(period: int, largest: int) -> Refuse:
    """Gemma: which layers see a window, and the scale of attention, are compiled in.

    period: every so many layers one sees everything. largest: the number of layers of the size with a scale
    of its own.
    """

    def refuse(config: Config) -> str | None:
        layers, width = int(config["num_hidden_layers"]), head_size(config)
        if layers == largest:
            width = int(config["hidden_size"]) // int(config["num_attention_heads"])
        if config.get("query_pre_attn_scalar", width) != width:
            return f"query_pre_attn_scalar {config['query_pre_attn_scalar']} (llama.cpp takes {width})"
        expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
        if (config.get("layer_types") or expected) != expected:
            return f"windows in other layers than llama.cpp has them ({period - 1} of every {period})"
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_theta", 10000.0) != 10000.0:
            return f"rope_theta {local['rope_theta']} in layers with a window (llama.cpp takes 10000)"
        return None

    return refuse


def _granite(writer: GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(float(config["attention_multiplier"]))
    writer.add_embedding_scale(float(config["embedding_multiplier"]))
    writer.add_residual_scale(float(config["residual_multiplier"]))
    writer.add_logit_scale(float(config["logits_scaling"]))


def _smollm3_refusal(config: Config) -> str | None:
    expected = [int((layer + 1) % 4 != 0) for layer in range(int(config["num_hidden_layers"]))]
    if config["no_rope_layers"] != expected:
        return "layers without positions other than every fourth"
    return "a sliding window" if config.get("use_sliding_window") else None


def _neox(writer: GGUFWriter, config: Config) -> None:
    writer.add_parallel_residual(bool(config.get("use_parallel_residual", True)))


def _cohere(writer: GGUFWriter, config: Config) -> None:
    writer.add_logit_scale(float(config["logit_scale"]))


def _phi3(writer: GGUFWriter, config: Config) -> None:
    context = int(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(int(config.get("original_max_position_embeddings") or context))
    writer.add_sliding_window(int(config.get("sliding_window") or 0))


def _qk_norm_refusal(config: Config) -> str | None:
    named = [key for key in ("qk_layernorm", "use_qk_norm") if config.get(key)]
    return f"norms of q and k ({named[0]})" if named else None


def _activation_refusal(*known: str) -> Refuse:
    def refuse(config: Config) -> str | None:
        if config.get("qk_layernorm"):
            return _qk_norm_refusal(config)
        found = config.get("hidden_act")
        return None if found in known else f"the activation {found} (llama.cpp takes {known[0]})"

    return refuse


GELU = "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"
# By transformers' model type.
FAMILIES: dict[str, GgufFamily] = {
    "cohere": GgufFamily(
        MODEL_ARCH.COMMAND_R, epsilon="layer_norm_eps", layer_norm=True, tell=_cohere, refuse=_qk_norm_refusal
    ),
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, norm_offset=1),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, norm_offset=1, tell=_gemma2, refuse=_gemma_refusal(2, 46)),
    "gemma3_text": GgufFamily(MODEL_ARCH.GEMMA3, norm_offset=1, tell=_gemma3, refuse=_gemma_refusal(6, 62)),
    "glm4": GgufFamily(MODEL_ARCH.GLM4),
    "gpt_neox": GgufFamily(
        MODEL_ARCH.GPTNEOX, epsilon="layer_norm_eps", layer_norm=True, grouped=False, tell=_neox,
        refuse=_activation_refusal(*GELU),
    ),
    "granite": GgufFamily(MODEL_ARCH.GRANITE, interleaved=True, tell=_granite),
    "llama": GgufFamily(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, interleaved=True),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2),
    "phi": GgufFamily(
        MODEL_ARCH.PHI2, epsilon="layer_norm_eps", layer_norm=True, refuse=_activation_refusal(*GELU)
    ),
    "phi3": GgufFamily(MODEL_ARCH.PHI3, tell=_phi3),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "smollm3": GgufFamily(MODEL_ARCH.SMOLLM3, interleaved=True, refuse=_smollm3_refusal),
    "stablelm": GgufFamily(
        MODEL_ARCH.STABLELM, epsilon="layer_norm_eps", layer_norm=True, refuse=_qk_norm_refusal
    ),
    "starcoder2": GgufFamily(
        MODEL_ARCH.STARCODER2, epsilon="norm_epsilon", layer_norm=True, refuse=_activation_refusal(*GELU)
    ),
}  # fmt: skip
