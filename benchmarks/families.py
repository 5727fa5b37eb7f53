"""Every model family through the whole pipeline, on tiny random models, and into llama.cpp.

python -m benchmarks.families [FAMILY ...] --json docs/results/families.json

Wanda to 50 %, GPTQ to INT4 in groups of 32, 5 steps of qa_sparse_peft on all linears, search, merge with its
certificate, transformers' own reading of the result compared with ours, and GGUF compared in llama.cpp.
Families that are not named keep their rows in the file.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.tiny import write_model, write_recipe

from sqft.errors import SqftError
from sqft.export import export_model
from sqft.pipeline import load_recipe, run_recipe

__all__ = ["FAMILIES", "run_family"]

EVERY = {"method": "qa_sparse_peft", "ranks": [8, 4], "alpha": 16, "target_modules": "all-linear"}
LEFT_OUT = {"qwen2_moe": {"skip_modules": ["shared_expert_gate"]}}  # of one row, and no place for 8 ranks
# transformers' model type, and its settings beyond those of `benchmarks.tiny`. Windows are shorter than what
# is compared, caps and scales far from 1, so that a runtime without them differs.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16, "sliding_window": 8,
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6,
    },
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "smollm3": {"num_hidden_layers": 4},
    "glm4": {"head_dim": 16},
    "starcoder2": {"use_bias": True},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "stablelm": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "falcon": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 16},
    "gpt_oss": {"intermediate_size": 64, "head_dim": 16, "num_local_experts": 4},
}  # fmt: skip


def run_family(family: str, folder: Path) -> dict[str, Any]:
    """The row of a family: what went through, or why not."""
    row: dict[str, Any] = {"family": family}
    try:
        model = write_model(folder / "model", family, **FAMILIES[family])
        adapters = EVERY | LEFT_OUT.get(family, {})
        recipe = write_recipe(
            folder / "recipe.yaml", model, folder / "runs", "train, search and merge", adapters=adapters
        )
        result = run_recipe(load_recipe(recipe))
        assert result.model_dir is not None
        row["certificate"] = result.data.passed
        served = export_model(result.model_dir, "compressed-tensors", folder / "served")
        assert served.logit_comparison is not None
        row["transformers"] = served.logit_comparison.largest_share
    except SqftError as error:
        return row | {"refused": str(error).replace(str(folder), "")}
    try:
        written = export_model(result.model_dir, "gguf", folder / "gguf")
        assert written.logit_comparison is not None
        row["llama.cpp"] = written.logit_comparison.kl
        row["changed"] = written.code_comparison.changed + written.code_comparison.weights_changed
    except SqftError as error:
        row["gguf"] = str(error)
    return row


def main() -> None:
    """Run families and write their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--json", type=Path, default=Path("docs/results/families.json"))
    arguments = parser.parse_args()
    stored = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.is_file() else {}
    rows = {row["family"]: row for row in stored.get("rows", [])}
    for family in arguments.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = run_family(family, Path(folder))
        print(json.dumps(rows[family]), flush=True)
        report = {
            "versions": {name: version(name) for name in ("transformers", "torch", "gguf", "xllamacpp")},
            "rows": [rows[name] for name in FAMILIES if name in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
