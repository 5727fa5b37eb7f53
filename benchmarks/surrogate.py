"""Does the first-order surrogate know which sub-adapters are good? Rank correlation, cost, what is gained.

    python -m benchmarks.surrogate --json FILE [--steps N] [--samples N] [--quick]

On the demo's task, on 50 % sparse INT4 SmolLM2-135M (Wanda, GPTQ), a super-adapter is trained (QA-SparsePEFT,
ranks 16, 12, 8, batches of 16 items at 1e-3). Sub-adapters drawn at random are evaluated on search items and
compared with what the surrogate predicts of them; then the median and the one that the search chooses meet on
test items. Cost is counted in evaluations of the search items; a backward pass is three.
"""

import argparse
import statistics
import time
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
from torch import nn

from sqft.adapters import SearchSpace, attach_adapters, set_ranks
from sqft.data import Example, read_items
from sqft.data.generated import write_demo_data
from sqft.evaluation import evaluate_loss
from sqft.evaluation.gradients import backward_loss
from sqft.evaluation.paired import paired_difference
from sqft.models import load_trainable
from sqft.pipeline import parse_recipe, run_recipe
from sqft.search import rank_slopes, search_sub_adapter
from sqft.sections import AdapterSection, SearchSection, TrainSection
from sqft.training import train_adapters

BACKWARD = 3  # evaluations that a backward pass costs
HILL_CLIMBING = 100  # trials of the paper's search


def compressed(options: argparse.Namespace) -> dict[str, Path]:
    """The items and the sparse INT4 model, by the name of their stage."""
    data = write_demo_data(options.workspace / "letters", train_items=1600, search_items=400, test_items=400)
    form = {"prompt": "{question}", "answer": " {answer}", "choices": "choices", "label": "label"}
    recipe = parse_recipe(
        {
            "name": "surrogate",
            "model": SMALL_MODEL,
            "data": {**data, **form, "sequence_length": 64},
            "calibration": {"num_samples": 64, "sequence_length": 64},
            "sparsify": {"method": "wanda", "sparsity": 0.5},
            "quantize": {"method": "gptq", "bits": 4, "group_size": 64},
            "runtime": {"workspace": str(options.workspace), "threads": options.threads},
        }
    )
    return {stage.name: stage.directory for stage in run_recipe(recipe).stages}


def trained(options: argparse.Namespace, stages: dict[str, Path]) -> nn.Module:
    """A super-adapter on it; a training that was killed goes on."""
    section = AdapterSection(method="qa_sparse_peft", ranks=[16, 12, 8], alpha=32)
    model = attach_adapters(load_trainable(stages["quantize"]), section, seed=0)
    training = TrainSection(
        learning_rate=1e-3, batch_size=16, max_steps=options.steps, warmup_steps=5, checkpoint_steps=10
    )
    train_adapters(
        model,
        read_items(stages["items"], "train"),
        training,
        output_dir=options.workspace / f"super-adapter-{options.steps}",
        space=SearchSpace.of(model),
    )
    return model


def measure(
    model: nn.Module, search_items: list[Example], test_items: list[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Predicted against true losses of random sub-adapters, and the chosen one against the median."""
    space = SearchSpace.of(model)

    def objective(ranks: dict[str, int]) -> float:
        set_ranks(model, ranks)
        return evaluate_loss(model, search_items).loss

    start = time.process_time()
    slopes = rank_slopes(model, lambda: backward_loss(model, search_items))
    slope_seconds = time.process_time() - start
    drawn = [space.ranks_at(99, step) for step in range(options.samples)]
    predicted = [sum(slopes[group][rank] for group, rank in ranks.items()) for ranks in drawn]
    start = time.process_time()
    true = [objective(ranks) for ranks in drawn]
    each = (time.process_time() - start) / len(drawn)
    storage = options.workspace / f"trials-{time.time_ns()}" / "trials.log"
    result = search_sub_adapter(
        space,
        objective,
        SearchSection(method="surrogate", num_trials=5),
        slopes=lambda: slopes,
        storage=storage,
    )
    ends = {"minimal": space.minimal(), "median": space.median(), "maximal": space.maximal()}
    known = {name: objective(ranks) for name, ranks in ends.items()}
    sums = []
    for ranks in (space.median(), result.best):
        set_ranks(model, ranks)
        sums.append(evaluate_loss(model, test_items).sums)
    gain = paired_difference(sums[0], sums[1])
    return {
        "rank_correlation": rank_correlation(predicted, true),
        "predicted": predicted,
        "true": true,
        "spread_of_true": statistics.pstdev(true),
        "slopes_in_evaluations": slope_seconds / each,
        "evaluations": 2 * BACKWARD + len(result.trials),
        "trials": [trial.loss for trial in result.trials],
        "known": known,
        "test_gain": {"nats": gain.difference, "low": gain.low, "high": gain.high, "items": gain.num_items},
    }


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def main() -> None:
    """Train, measure, print, write."""
    parser = make_parser(__doc__, quick="20 steps, 8 samples, 64 search items")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=40, help="sub-adapters drawn at random")
    parser.add_argument("--search-items", type=int, default=400)
    parser.add_argument("--workspace", type=Path, default=Path("runs"))
    options, facts = parse_options(parser), environment("cpu")
    if options.quick:
        options.steps, options.samples, options.search_items = 20, 8, 64
    stages = compressed(options)
    model = trained(options, stages)
    items = read_items(stages["items"], "search")[: options.search_items]
    found = measure(model, items, read_items(stages["items"], "test"), options)
    gain = found["test_gain"]
    rows = [
        ["rank correlation with true losses", f"{found['rank_correlation']:.2f} of {options.samples}"],
        ["spread of true losses, nats", f"{found['spread_of_true']:.4f}"],
        ["search items: minimal, median, maximal", ", ".join(f"{x:.4f}" for x in found["known"].values())],
        ["search items: median, then the candidates", ", ".join(f"{x:.4f}" for x in found["trials"])],
        ["slopes cost, in evaluations", f"{found['slopes_in_evaluations']:.1f}"],
        [
            "test items: chosen minus median",
            f"{gain['nats']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})",
        ],
    ]
    print(markdown_table(["", "measured"], rows))
    cost = found["evaluations"] / HILL_CLIMBING
    checks = [
        check("evaluations of the surrogate / 100 trials of hill climbing", cost, at_most=0.12, aim=0.08)
    ]
    print(checks_table(checks))
    size = {name: getattr(options, name) for name in ("steps", "samples", "search_items")}
    write_result(options.json, {"environment": facts, **size, **found, "checks": checks})


if __name__ == "__main__":
    main()
