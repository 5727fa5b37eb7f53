"""Bytes of memory and disk that each stage of a recipe needs, from shapes.

Memory is what a stage holds at most beyond the half gigabyte of Python and its libraries, pages of mapped
files not counted. It follows the code that runs: `compression/walk.py` for one block and its calibration,
`compression/statistics.py` for Hessians and their factors, `models/loading.py` for whole models. The factors
below were measured (`python -m benchmarks.planning`, docs/results/scale.md).
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.kernels.choices import CHUNK_ELEMENTS
from sqft.pipeline.checks import planned_grid
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.stages import Stage
from sqft.sections import (
    CalibrationSection,
    DataSection,
    DistillationSection,
    EvaluateSection,
    HubSource,
    SearchSection,
    TrainingSection,
    TrainSection,
    TuneSection,
)

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["Estimate", "ModulePlan", "finds_gpu"]

FLOAT32 = 4
BYTES_PER_TOKEN = 4  # of a text
BATCH_TOKENS = 2048  # of a pass of the block walk
GRAM = ("sparsegpt", "gptq", "gptaq", "joint")  # methods with a matrix of inputs
# What compressing a linear holds beside it, in float32 copies of the largest.
COPIES = {
    "magnitude": 4, "wanda": 4, "ria": 5, "sparsegpt": 5, "rtn": 10, "gptq": 10, "gptaq": 10, "joint": 10,
}  # fmt: skip
FACTORING = 6  # matrices of the width that a factorisation holds at most, its result among them
FITTING = 12  # float32 copies of a block that is fitted: its weights, what Adam keeps, the best epoch
TARGETING = 5  # and as many more where the weight aims at what the dense model puts out
SHARED_INPUTS = ("k_proj", "v_proj", "up_proj")  # read what q_proj and gate_proj read
LOGIT_ROWS = 2048  # that scoring holds at a time (`evaluation/scoring.py`)
SEARCH_BATCH = 16  # items that a search measures a sub-adapter on at a time
UNMEASURED = ("median", "maximal", "minimal")  # searches that take a sub-adapter as it is
TEACHER_TOKENS = 512  # that a teacher sees at a time
WORKING = 4  # float32 copies of the largest linear while a model runs: its adapted weight, products


@dataclass(frozen=True)
class ModulePlan:
    """Linears of one kind, and what happens to them.

    rank: the largest of an adapter, 0 without one. num_scales: the trained scales of each linear, 0 without.
    tuned_rank: of the LoRA that is trained on the dense model, 0 without one.
    """

    name: str
    shape: tuple[int, int]
    count: int
    sparsified: bool
    quantized: bool
    rank: int
    num_scales: int = 0
    tuned_rank: int = 0


class Estimate:
    """Bytes of memory and disk for each stage of a recipe.

    longest: tokens of the longest item of each split, to which batches are padded; without it, as many as an
    item may have.
    """

    def __init__(
        self,
        recipe: Recipe,
        outline: "ModelOutline",
        modules: list[ModulePlan],
        longest: Mapping[str, int] | None = None,
    ) -> None:
        self.recipe = recipe
        self.longest = longest or {}
        self.outline = outline
        self.block_weights = sum(m.count * math.prod(m.shape) for m in modules)
        self.other_weights = outline.num_parameters - self.block_weights
        self.quantized_weights = sum(m.count * math.prod(m.shape) for m in modules if m.quantized)
        self.adapter_weights = sum(m.count * (m.rank * sum(m.shape) + m.num_scales) for m in modules)
        self.tuned_weights = sum(m.count * m.tuned_rank * sum(m.shape) for m in modules)
        self.modules = modules
        self.grid = planned_grid(recipe, outline)
        self.widest = max((m.shape[1] for m in modules), default=0)
        self.largest = max((math.prod(m.shape) for m in modules), default=0)

    def of(self, stage: Stage) -> tuple[float, float]:
        """(memory, disk) of one stage."""
        kind = stage.kind
        if kind == "items":
            return 0, self._items()
        if kind == "reconstruct":
            quantized = self.recipe.quantize is not None
            return self._reconstruction(), self._stored(quantized=quantized, latent=quantized)
        if kind in ("sparsify", "quantize"):
            return self._compression(kind), self._stored(
                quantized=kind == "quantize", latent=kind == "quantize"
            )
        if kind == "tune":
            return self._tuning()
        if kind in ("train", "train_dense"):
            return self._training(
                self.recipe.train or TrainSection(), dense=kind == "train_dense"
            ), 4 * FLOAT32 * self.adapter_weights
        if kind == "teacher":
            return self._inference(max(TEACHER_TOKENS, self._length("train"))), self._predictions()
        if kind == "search":
            measures = (self.recipe.search or SearchSection()).method not in UNMEASURED
            tokens = SEARCH_BATCH * self._length("search") if measures else 0
            return self._inference(tokens, adapted=True), FLOAT32 * self.adapter_weights
        if kind in ("merge", "export"):
            quantized = self.grid is not None
            memory = self._merging() if kind == "merge" else self._inference(self._length("test"))
            return memory, self._stored(quantized=quantized, latent=False)
        return self._inference(self._measured_tokens(), adapted=stage.argument == "adapted"), 0

    def _length(self, split: str) -> int:
        """Tokens of a padded item."""
        return self.longest.get(split) or (self.recipe.data or DataSection(train="")).sequence_length

    def _items(self) -> float:
        """Texts and token ids: about three times the files that they are read from."""
        from sqft.data.sources import expand_paths

        data = self.recipe.data
        sources = [data.train, data.search, data.test] if data else []
        files = [path for s in sources if s and not isinstance(s, HubSource) for path in expand_paths(s)]
        return 3 * sum(path.stat().st_size for path in files)

    def _predictions(self) -> float:
        """Those of a teacher: an id of 4 bytes and a log-probability of 2 for each of the likely tokens."""
        section = self.recipe.distillation or DistillationSection(item_weight=1.0)
        texts = section.num_samples * section.sequence_length if section.text is not None else 0
        items = self._items() / 3 / BYTES_PER_TOKEN if section.item_weight else 0
        return (texts + items) * 6 * section.top_k

    def _compression(self, kind: str) -> float:
        recipe = self.recipe
        section = recipe.sparsify if kind == "sparsify" else recipe.quantize
        assert section is not None
        sparsify = recipe.sparsify if kind == "sparsify" else None
        refined = sparsify is not None and bool(sparsify.swaps or sparsify.refit or sparsify.dense_targets)
        gram, streams = section.method in GRAM or refined, 1
        if section.method == "gptaq" or (sparsify is not None and sparsify.dense_targets):
            streams = 2
        block = streams * FLOAT32 * self.block_weights / max(self.outline.num_blocks, 1)
        linears = COPIES[section.method] * FLOAT32 * self.largest
        if not section.calibrates:
            return block + linears
        calibration = recipe.calibration or CalibrationSection()
        length, hidden = calibration.sequence_length, self.outline.hidden_size
        tokens = calibration.num_samples * length
        batch = min(tokens, max(length, BATCH_TOKENS // length * length))
        embedding = FLOAT32 * self.outline.vocab_size * hidden
        states = streams * FLOAT32 * tokens * hidden
        passing = FLOAT32 * batch * (8 * hidden + 4 * self.widest)
        widths = [m.shape[1] for m in self.modules if m.name.split(".")[-1] not in SHARED_INPUTS]
        sums = streams * FLOAT32 * sum(width**2 for width in widths) if gram else 0
        last = FLOAT32 * self.widest**2 if gram else 0
        factors = sum(FLOAT32 * width**2 for width in widths) - last if gram else 0
        matrices = FACTORING + (TARGETING if streams > 1 else 0)
        working = factors + max(matrices * last, last + linears) if gram else linears
        return max(embedding + states, states + block + sums + max(passing, working))

    def _reconstruction(self) -> float:
        """Two streams of hidden states, and what is trained of a block, as often as Adam keeps it."""
        recipe = self.recipe
        section, calibration = recipe.reconstruct, recipe.calibration or CalibrationSection()
        assert section is not None
        hidden, length = self.outline.hidden_size, calibration.sequence_length
        embedding = FLOAT32 * self.outline.vocab_size * hidden
        states = 2 * FLOAT32 * calibration.num_samples * length * hidden
        block = FITTING * FLOAT32 * self.block_weights / max(self.outline.num_blocks, 1)
        passing = FLOAT32 * section.batch_size * length * (16 * hidden + 6 * self.widest)
        return max(embedding + states, states + block + passing)

    def _stored(self, *, quantized: bool, latent: bool) -> float:
        masks = self.block_weights / 8 if self.recipe.sparsify else 0
        if not (quantized and self.grid):
            return self._dense_bytes() + masks
        bits, group = self.grid["bits"], self.grid["group_size"]
        codes = self.quantized_weights * (bits / 8 + 2 / (group if group > 0 else self.widest))
        sixteen = 2 * (self.block_weights - self.quantized_weights + self.other_weights)
        return codes + sixteen + masks + (self.quantized_weights * (1 if bits <= 4 else 2) if latent else 0)

    def _tuning(self) -> tuple[float, float]:
        """(memory, disk) of a LoRA that is trained on the dense model, if none exists, and merged."""
        section = self.recipe.tune or TuneSection()
        disk = self._dense_bytes() + 4 * FLOAT32 * self.tuned_weights
        linear = FLOAT32 * max((math.prod(shape) for shape in self.outline.linears.values()), default=0)
        return self._training(section, dense=True) if section.trains else 3 * linear, disk

    def _dense_bytes(self) -> float:
        return 2 * (self.block_weights + self.other_weights)

    def _training(self, train: TrainingSection, *, dense: bool) -> float:
        tokens = train.batch_size // train.gradient_accumulation * self._length("train")
        blocks = 1 if train.gradient_checkpointing else self.outline.num_blocks
        kept = FLOAT32 * tokens * (8 * self.outline.hidden_size + 3 * self.widest) * blocks
        logits = 3 * FLOAT32 * self._logits_at_a_time(tokens)
        trained = self.tuned_weights if isinstance(train, TuneSection) else self.adapter_weights
        step = WORKING * FLOAT32 * self.largest
        return self._trainable(dense=dense) + 4 * FLOAT32 * trained + kept + logits + step

    def _logits_at_a_time(self, tokens: int) -> int:
        """Of a training step, whose loss takes them in chunks where nothing follows the output layer."""
        vocabulary = self.outline.vocab_size
        if self.outline.changes_logits:
            return tokens * vocabulary
        device = self.recipe.runtime.device
        on_gpu = device.startswith("cuda") or (device == "auto" and finds_gpu())
        return min(tokens * vocabulary, max(vocabulary, CHUNK_ELEMENTS["cuda" if on_gpu else "cpu"]))

    def _trainable(self, *, dense: bool = False) -> float:
        """A model that adapters stand on: linears in the blocks as they are stored, all else in float32."""
        weights: float = 2 * self.block_weights
        if self.grid and not dense and self.recipe.adapters:
            form, bits = self.recipe.adapters.loaded_as, self.grid["bits"]
            each = {"latent": 1 if bits <= 4 else 2, "packed": bits / 8, "float32": 4}[form]
            weights = 2 * (self.block_weights - self.quantized_weights) + each * self.quantized_weights
        return weights + FLOAT32 * self.other_weights

    def _merging(self) -> float:
        """The adapted model, what it is merged into, and the merged one, opened twice to certify it."""
        each = (1 if self.grid else 2) + 1  # codes or weights, and masks
        return self._trainable() + each * self.block_weights + 2 * self._whole()

    def _whole(self) -> float:
        return FLOAT32 * (self.block_weights + self.other_weights)

    def _measured_tokens(self) -> int:
        """Tokens of a batch that a model is measured on: of items, or of windows of a text."""
        section = self.recipe.evaluate or EvaluateSection()
        windows = section.sequence_length if section.general_text or section.perplexity else 0
        return section.batch_size * max(self._length(section.split) if self.recipe.data else 0, windows)

    def _inference(self, tokens: int, *, adapted: bool = False) -> float:
        logits = 2 * FLOAT32 * min(tokens, LOGIT_ROWS) * self.outline.vocab_size
        working = WORKING * FLOAT32 * self.largest
        return (self._trainable() if adapted else self._whole()) + working + logits


def finds_gpu() -> bool:
    """Whether torch would train on an NVIDIA card; it is not imported where there is none."""
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        return False
    import torch

    return torch.cuda.is_available()
