"""What of PEFT's tests SQFT refuses by design, and why; and what cannot be run without the hub."""

import re

__all__ = ["OTHERS", "REFUSALS", "UNREACHABLE", "refusal_of"]

LORA_ON_INT4 = "a plain lora adapter is not merged into an INT4 base: the result would leave the grid"
COPIED = "a configuration is copied when it is attached, and the caller's own object is never changed"
ROUNDED = "of trained scales the numbers that are served are saved, not the changes before rounding"
OTHER_BASE = "an adapter is loaded on the base that it was trained on, never on other random weights"
CLAMPED = "at this learning rate every weight leaves the grid, and past the clamp the gradient is 0"
BROKEN = "this learning rate makes scales negative, which is refused when they are saved"

MERGING = "(merge_layers|safe_merge|disable_adapters_with_merging|delete_merged|forward_b?float16)"
SEED = "an adapter starts from numbers that are a function of its own init_seed, not of torch's state"
WORDS = "an adapter that is not finite is refused in a sentence of our own, which names the layer"
PATTERN = "blocks are known by their number, and there is no layers_pattern"
# Part of a test's id, as a regular expression → why it is refused. The test must then fail.
REFUSALS: dict[str, str] = {
    rf"test_{MERGING}.*lora on MLP int4": LORA_ON_INT4,
    r"test_from_pretrained_config_construction": COPIED,
    r"test_config_layers_to_transform_index_zero": PATTERN,
    r"test_save_pretrained(_pickle)?\[(scales on|.*scales too)": ROUNDED,
    r"test_save_pretrained(_selected_adapters)?(_pickle)?\[.* int4-SqftConfig-config_kwargs10": ROUNDED,
    r"test_decoder_models.*test_merge_layers_multi": SEED,
    r"test_decoder_models.*test_merge_layers_nan": WORDS,
    r"test_only_params_are_updated\[quantization-aware": CLAMPED,
    r"test_parameters_after_loading_model\[(scales on|.*scales too)": BROKEN,
    r"test_loading_model(_with_modules_to_save)?_requires_grad_set_correctly": OTHER_BASE,
}
# These read a configuration or an adapter from the hub, which a stand-in would not test.
UNREACHABLE = r"test_config.py.*::test_(from_pretrained(_cache_dir)?|save_pretrained_with_runtime_config)\["
# These are of prompt learning, which has methods of its own.
OTHERS = "test_prompt_learning|test_training_prompt_learning"


def refusal_of(test: str) -> str | None:
    """Why a test is expected to fail; None for one that must pass."""
    return next((reason for pattern, reason in REFUSALS.items() if re.search(pattern, test)), None)
