"""Does the cheap gradient train as well? exact, lowrank and hybrid on mawps, paired by seed.

    python -m benchmarks.gradients DATA_DIR [--quick] [--json FILE] [--steps N] [--seeds N ...]

SmolLM2-135M-Instruct (its "dense" is itself a dequantized 4-bit model), Wanda at 50 % and 70 %, sparse_peft
of rank 16, batches of 8 items; the measure is the loss on held-out answers in nats a token. For one seed all
three start from the same adapter and see the same batches. A finished run is written to the JSON at once, and
runs that stand there are not made again.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SMALL_MODEL,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    write_result,
)

from sqft.adapters import attach_adapters
from sqft.compression import sparsify_model
from sqft.data import calibration_tokens, load_splits
from sqft.evaluation import evaluate_loss
from sqft.models import CheckpointWriter, load_tokenizer, load_trainable, open_checkpoint, resolve_model
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    DataSection,
    ModelSection,
    SparsifySection,
    TrainSection,
)
from sqft.training import train_adapters

GRADIENTS = ("exact", "lowrank", "hybrid")
SPARSITIES = (0.5, 0.7)


def data_section(directory: Path) -> DataSection:
    """Question to expression, as the recipes have it."""
    return DataSection(
        train=str(directory / "train.jsonl"),
        test=str(directory / "test.jsonl"),
        prompt="Question: {question}\nExpression: ",
        answer="{expression}",
        sequence_length=160,
    )


def run(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Every combination, and the loss of the untuned sparse models."""
    dense = resolve_model(ModelSection(source=SMALL_MODEL), cache)
    tokenizer, data = load_tokenizer(dense), data_section(arguments.data)
    train = load_splits(data, tokenizer, seed=0).train
    calibration = calibration_tokens(
        CalibrationSection(num_samples=32, sequence_length=128), train, tokenizer, seed=0
    )
    result: dict[str, Any] = {
        "environment": environment(),
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "items": arguments.items,
        "untuned": {},
        "runs": [],
        "checks": [],
    }
    if arguments.json and arguments.json.exists():
        earlier = json.loads(arguments.json.read_text(encoding="utf-8"))
        if all(earlier[name] == result[name] for name in ("steps", "learning_rate", "items")):
            result["untuned"], result["runs"] = earlier["untuned"], earlier["runs"]
    done = {(row["seed"], row["sparsity"], row["gradient"]) for row in result["runs"]}
    for sparsity in SPARSITIES:
        checkpoint, directory = open_checkpoint(dense), cache / f"sparse-{sparsity}"
        if (directory / "config.json").exists():
            continue
        writer = CheckpointWriter(directory, checkpoint)
        sparsify_model(checkpoint, SparsifySection(sparsity=sparsity), calibration, writer)
        writer.close()
    for seed in arguments.seeds:
        splits = load_splits(data, tokenizer, seed=seed)
        test = load_splits(data, tokenizer, seed=0).test[: arguments.items]
        for sparsity in SPARSITIES:
            directory = cache / f"sparse-{sparsity}"
            for gradient in GRADIENTS:
                if (seed, sparsity, gradient) in done:
                    continue
                model = load_trainable(directory)
                section = AdapterSection(
                    method="sparse_peft", ranks=[16], alpha=32, gradient=gradient, hybrid_steps=4
                )
                adapted = attach_adapters(model, section, seed=seed)
                if str(sparsity) not in result["untuned"]:
                    result["untuned"][str(sparsity)] = evaluate_loss(adapted.eval(), test).loss
                budget = TrainSection(
                    learning_rate=arguments.learning_rate, max_steps=arguments.steps, warmup_steps=4
                )
                output = cache / f"{seed}-{sparsity}-{gradient}"
                record = train_adapters(adapted, splits.train, budget, seed=seed, output_dir=output)
                found = evaluate_loss(adapted, test)
                row = {"seed": seed, "sparsity": sparsity, "gradient": gradient, "loss": found.loss}
                row |= {"item_nats": found.sums, "item_tokens": found.counts, "seconds": record.seconds}
                result["runs"].append(row)
                print(f"seed {seed} sparsity {sparsity} {gradient}: {found.loss:.4f}", flush=True)
                write_result(arguments.json, result)
    return result


def compare(result: dict[str, Any], sparsity: float, gradient: str) -> tuple[float, float, list[float]]:
    """Mean difference to exact in nats a token, its 95 % half width over items, and the mean of each seed.

    The same items come again with every seed, so an item's difference is first averaged over the seeds.
    """
    runs = {(r["seed"], r["gradient"]): r for r in result["runs"] if r["sparsity"] == sparsity}
    rows, tokens = [], 1
    for seed in sorted(seed for seed, kind in runs if kind == gradient):
        exact, other = runs[(seed, "exact")], runs[(seed, gradient)]
        tokens = sum(exact["item_tokens"])
        rows.append([b - a for a, b in zip(exact["item_nats"], other["item_nats"], strict=True)])
    items = [statistics.mean(values) for values in zip(*rows, strict=True)]
    half = 1.96 * statistics.stdev(items) * math.sqrt(len(items)) / tokens
    return sum(items) / tokens, half, [sum(row) / tokens for row in rows]


def markdown(result: dict[str, Any]) -> str:
    """Losses by seed, and differences to exact."""
    seeds = sorted({r["seed"] for r in result["runs"]})
    rows = []
    for sparsity in SPARSITIES:
        for gradient in GRADIENTS:
            losses = [
                r["loss"] for r in result["runs"] if (r["sparsity"], r["gradient"]) == (sparsity, gradient)
            ]
            if not losses:
                continue
            mean, half, each = compare(result, sparsity, gradient)
            seeds_apart = ", ".join(f"{value:+.4f}" for value in each)
            gap = "" if gradient == "exact" else f"{mean:+.4f} ± {half:.4f} ({seeds_apart})"
            cells = [f"{loss:.4f}" for loss in [*losses, statistics.mean(losses)]]
            rows.append([sparsity, gradient, *cells, gap])
    untuned = ", ".join(f"{sparsity}: {loss:.4f}" for sparsity, loss in result["untuned"].items())
    columns = ["sparsity", "gradient", *(f"seed {seed}" for seed in seeds), "mean"]
    table = markdown_table([*columns, "minus exact (95 %, items; each seed)"], rows)
    return f"{table}\n\nUntuned sparse model: {untuned}."


def main() -> None:
    """Run, print a Markdown table, write the JSON."""
    parser = make_parser(__doc__, quick="one seed, 8 steps, 32 items")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="mawps' train.jsonl and test.jsonl")
    parser.add_argument("--cache", type=Path, help="where models are kept between runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parse_options(parser)
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.items = 8, [0], 32
    with tempfile.TemporaryDirectory() as temporary:
        result = run(arguments, arguments.cache or Path(temporary))
    print(markdown(result))
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
