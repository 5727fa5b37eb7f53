"""Seconds that each stage of a recipe takes on this machine, from what it computes.

    seconds = products / flops + bytes of passes over weights / stream + small operations * call

Products follow from the shapes, and from the tokens of the items and texts. How often a stage passes over the
weights, and what share of the measured speed it reaches, was fitted to runs of SmolLM2-135M
(docs/results/scale.md says how far off they are). Without a time is what nothing is known of: a stage on a
GPU, tasks of lm-evaluation-harness, an export, a teacher.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.pipeline.estimate import (
    BYTES_PER_TOKEN,
    FLOAT32,
    GRAM,
    SEARCH_BATCH,
    UNMEASURED,
    Estimate,
    ModulePlan,
)
from sqft.pipeline.machine import MachineSpeed
from sqft.pipeline.stages import Stage
from sqft.sections import (
    AdapterSection,
    CalibrationSection,
    EvaluateSection,
    QuantizeSection,
    ReconstructSection,
    SearchSection,
    SparsifySection,
    TrainingSection,
    TrainSection,
    TuneSection,
)

__all__ = ["Durations"]

START = 2.0  # seconds of a stage's own imports and bookkeeping
LOADING = 20  # passes over all weights: reading, converting, digests
WALKING = 2  # forward passes of a compression
INFERENCE, TRAINING = 0.8, 0.6  # of the measured products a second that a model reaches
# Passes over the weights in a training step, which builds them forwards and again backwards.
BUILDING = {"lora": 6, "scales": 24, "sparse_peft": 24, "qa_sparse_peft": 150}
FITTING = 75  # and in a step of a reconstruction, Adam's among them
SERVING = 25  # passes over the weights of an adapter that is not merged, for each batch
MERGING = {"scales": 1400, "sparse_peft": 2000, "qa_sparse_peft": 3400}  # written, opened, computed again
COLUMN_CALLS = 12  # small operations for each column that is rounded after the others
RANK_ONE = 8  # times that columns one by one take longer than a product of the same work
ITEM_CALLS = 40  # small operations for each item that is made into tokens


class Durations:
    """Seconds for each stage, None where they are not known.

    report: of the items, as `Splits` has it; empty without items. choices: whether answers are chosen among
    given ones, and not generated.
    """

    def __init__(
        self, estimate: Estimate, speed: MachineSpeed, report: Mapping[str, Any], *, choices: bool
    ) -> None:
        self.estimate, self.speed, self.report, self.choices = estimate, speed, report, choices
        self.recipe = estimate.recipe
        self.weights = estimate.block_weights
        self.head = estimate.outline.vocab_size * estimate.outline.hidden_size
        self.loading = START + self._passes(LOADING, self.weights + estimate.other_weights)

    def of(self, stage: Stage) -> float | None:
        """Seconds of one stage."""
        kind, recipe = stage.kind, self.recipe
        adapters = recipe.adapters or AdapterSection()
        if kind == "items":
            items = sum(self.report.get("items", {}).values())
            return START / 2 + items * ITEM_CALLS * self.speed.call
        work: float | None = None
        if kind == "sparsify" and recipe.sparsify:
            chosen = [module for module in self.estimate.modules if module.sparsified]
            work = self._compression(recipe.sparsify, chosen, recipe.sparsify.swaps / 10)
        elif kind == "quantize" and recipe.quantize:
            chosen = [module for module in self.estimate.modules if module.quantized]
            work = self._compression(recipe.quantize, chosen, recipe.quantize.descent)
        elif kind == "reconstruct" and recipe.reconstruct:
            work = self._reconstruction(recipe.reconstruct)
        elif kind == "tune":
            tune = recipe.tune or TuneSection()
            work = self._passes(LOADING, self.weights)
            work += self._training(tune, "lora", tune.rank) if tune.trains else 0
        elif kind == "train":
            rank = max(adapters.ranks) if adapters.low_rank else 0
            work = self._training(recipe.train or TrainSection(), adapters.method, rank)
        elif kind == "train_dense":
            work = self._training(recipe.train or TrainSection(), "lora", max(adapters.ranks))
        elif kind == "search":
            work = self._search(recipe.search or SearchSection())
        elif kind == "merge":
            work = self._passes(MERGING.get(adapters.method, 0), self.weights)
        elif kind == "evaluate":
            work = self._evaluation(recipe.evaluate or EvaluateSection(), stage.argument)
        return None if work is None else self.loading + work

    def _passes(self, count: float, weights: float) -> float:
        return count * FLOAT32 * weights / self.speed.stream

    def _forward(self, tokens: float, scored: float) -> float:
        """A pass through the model. scored: the tokens whose probabilities are looked at."""
        return 2 * (tokens * self.weights + scored * self.head) / (INFERENCE * self.speed.flops)

    def _items(self, split: str) -> int:
        return int(self.report.get("items", {}).get(split, 0))

    def _tokens(self, split: str, items: int | None = None) -> tuple[float, float]:
        """Tokens of so many items of a split, None all, with padding; and those that the loss counts."""
        count = self._items(split)
        if not count:
            return 0.0, 0.0
        lengths, items = self.report["lengths"][split], count if items is None else items
        padded = (lengths["tokens"] / count + lengths["longest"]) / 2
        return items * padded, items * lengths["counted"] / count

    def _compression(
        self, section: SparsifySection | QuantizeSection, modules: list[ModulePlan], sweeps: float
    ) -> float:
        seconds = self._passes(LOADING, sum(m.count * math.prod(m.shape) for m in modules))
        if not section.calibrates:
            return seconds
        calibration = self.recipe.calibration or CalibrationSection()
        tokens = calibration.num_samples * calibration.sequence_length
        seconds += WALKING * self._forward(tokens, 0)
        products = sum(2.0 * m.count * m.shape[0] * m.shape[1] ** 2 for m in modules)
        seconds += products * (RANK_ONE * sweeps + 2 * section.refit) / self.speed.flops
        if section.method in GRAM or section.refit or sweeps:
            seconds += sum(2.0 * tokens * m.count * m.shape[1] ** 2 for m in modules) / self.speed.flops
        if section.method in GRAM:
            seconds += sum(m.count * m.shape[1] for m in modules) * COLUMN_CALLS * self.speed.call
        return seconds

    def _reconstruction(self, section: ReconstructSection) -> float:
        """Steps on the sequences that are not held out, measurements on the others, both streams."""
        calibration = self.recipe.calibration or CalibrationSection()
        held_out, length = section.held_out(calibration.num_samples), calibration.sequence_length
        steps = section.epochs * math.ceil((calibration.num_samples - held_out) / section.batch_size)
        step = 3 * self._forward(section.batch_size * length, 0) * INFERENCE / TRAINING
        step += self._passes(FITTING, self.weights)
        seen = 2 * calibration.num_samples + (section.epochs + 1) * held_out
        return steps * step + self._forward(seen * length, 0) + self._passes(LOADING, self.weights)

    def _training(self, section: TrainingSection, method: str, rank: int) -> float:
        per_epoch = math.ceil(self._items("train") / section.batch_size)
        steps = section.max_steps or math.ceil(per_epoch * section.epochs)
        passes = (2 if method == "lora" else 3) + section.gradient_checkpointing
        step = passes * self._forward(*self._tokens("train", section.batch_size)) * INFERENCE / TRAINING
        step += section.gradient_accumulation * self._passes(BUILDING[method], self.weights)
        if method != "lora":  # B A and its gradients, in every micro-batch
            step += section.gradient_accumulation * 12.0 * rank * self.weights / self.speed.flops
        measured = steps // section.eval_steps + 1 if section.eval_steps else 0
        return steps * step + measured * self._forward(*self._tokens("search"))

    def _search(self, section: SearchSection) -> float:
        if section.method in UNMEASURED:
            return 0.0
        batches = math.ceil(self._items("search") / SEARCH_BATCH)
        trial = self._forward(*self._tokens("search")) + batches * self._passes(SERVING, self.weights)
        return section.num_trials * trial

    def _evaluation(self, section: EvaluateSection, model: str) -> float | None:
        if section.tasks:
            return None
        items = self._items(section.split)
        items = min(items, section.max_items or items)
        batches = math.ceil(items / section.batch_size)
        tokens, counted = self._tokens(section.split, items)
        read = sum(min(section.perplexity_tokens, length) for length in _text_lengths(section))
        seconds = self._forward(tokens, counted) + self._forward(read, read)
        if items and not self.choices:  # answers are generated, and read all weights for each of their tokens
            longest = min(section.max_new_tokens, 2 * counted / items + 2)
            seconds += self._forward(tokens + items * longest, items * longest)
            seconds += batches * longest * self._passes(1, self.weights + self.head)
        if model == "adapted":
            seconds += batches * self._passes(SERVING, self.weights)
        return seconds


def _text_lengths(section: EvaluateSection) -> list[float]:
    """About how many tokens the texts have that a model is measured on beside the items."""
    from sqft.evaluation import general_path

    named = [general_path(section.general_text)] if section.general_text else []
    named += [Path(section.perplexity)] if section.perplexity else []
    return [path.stat().st_size / BYTES_PER_TOKEN if path.is_file() else math.inf for path in named]
