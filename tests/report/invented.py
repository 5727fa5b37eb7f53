"""Invented figures, shaped like those of a real run."""

import math
from typing import Any

from sqft.checks import Check
from sqft.report.content import LayerRow, LineageRow, ModelRow, ReportData

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"]


def invent_report(**changes: Any) -> ReportData:
    values: dict[str, Any] = {
        "name": "invented-run",
        "recipe": {
            "model": {"source": "a <b> model"},
            "sparsify": {"sparsity": 0.5},
            "quantize": {"bits": 4},
        },
        "versions": {"sqft": "0", "python": "3"},
        "elapsed_seconds": 431.5,
        "models": [
            ModelRow("base", 1.2, 1.1, 1.3, 0.4, 0.35, 0.46, 300, 270_000_000, 0.0, perplexity=21.5),
            ModelRow("dense_tuned", 0.3, 0.25, 0.35, 0.8, 0.75, 0.84, 300, 275_000_000, 0.0),
            ModelRow("sparse", 2.6, 2.4, 2.8, 0.27, 0.22, 0.32, 300, 270_000_000, 0.5, perplexity=66.0),
            ModelRow("quantized", 2.9, 2.7, 3.1, 0.26, 0.21, 0.31, 300, 98_000_000, 0.5, 4, 88.0),
            ModelRow("merged", 0.5, 0.44, 0.56, 0.71, 0.66, 0.76, 300, 98_000_000, 0.5, 4),
        ],
        "checks": [
            Check("codes in range", True, "0 of 9 outside"),
            Check("zeros cover the mask", True),
        ],
        "stage_seconds": {"sparsify": 20.0, "train": 300.0},
        "layers": [
            LayerRow(f"model.layers.{block}.{kind}", 0.5 + 0.01 * i, 0.02 + 0.002 * block + 0.01 * i)
            for block in range(8)
            for i, kind in enumerate(KINDS)
        ],
        "ranks": {
            f"model.layers.{block}.{group}": (32, 24, 16)[(block + i) % 3]
            for block in range(8)
            for i, group in enumerate(["self_attn.qkv", "mlp.up", "mlp.down"])
        },
        "training": [(s, 0.4 + 2 * math.exp(-s / 30) + 0.2 * math.sin(s * 12.9)) for s in range(1, 121)],
        "eval_losses": [(s, 0.5 + 1.8 * math.exp(-s / 30)) for s in range(20, 121, 20)],
        "lineage": [
            LineageRow("sparsify", "ab" * 32, "sparsify-abab", 20.0),
            LineageRow("train", "cd" * 32, reused=True),
        ],
        "data": {"train": 1200, "dropped": {"also in test": 3}},
        "chance_accuracy": 0.25,
    }
    return ReportData(**(values | changes))
