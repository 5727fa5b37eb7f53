"""Time and memory of training adapters: PEFT LoRA, the published formulas, and sqft's fused layer.

    python -m benchmarks.adapters [--quick] [--json FILE] [--device cpu|cuda] [--threads N] [--clock wall|cpu]
                                  [--parts layers,steps,memory]

One layer at the shapes of SmolLM2-135M and Llama-3-8B (random weights), then a training step of SmolLM2-135M
with 1024 tokens, rank 32 on q, k, v, up, down. float32 on a CPU, bfloat16 on a GPU; 50 % of weights pruned.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    check,
    checks_table,
    environment,
    interleave,
    make_parser,
    markdown_table,
    parse_options,
    ratio,
    summarize,
    write_result,
)
from benchmarks.published import PublishedLinear, layer_flops
from benchmarks.steps import (
    QUICK_VARIANTS,
    STEP_VARIANTS,
    VARIANTS,
    measure_steps,
    saved_bytes_per_weight,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sqft.ops import GridSpec, QParams, compute_qparams, encode_latent, keep_nonzero, mask_rows, quantize
from sqft.ops.adapted_linear import adapted_linear
from sqft.ops.packed import pack_codes
from sqft.ops.scaled_linear import scaled_linear

TOKENS, RANK, ALPHA, GROUP = 1024, 32, 64.0, 64
SMOLLM2 = {"q": (576, 576), "k, v": (192, 576), "up": (1536, 576), "down": (576, 1536)}
LLAMA3 = {"q": (4096, 4096), "k, v": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336)}
LAYER_VARIANTS = ("frozen", *VARIANTS, "three products")


def pruned_layer(
    out_features: int, in_features: int, device: str, group_size: int = GROUP
) -> tuple[Tensor, QParams, Tensor]:
    """A random weight with half of it pruned, its symmetric 4-bit grid, and its latent."""
    weight = torch.randn(out_features, in_features, device=device) * in_features**-0.5
    mask = mask_rows(torch.rand(weight.shape, device=device), 0.5)
    base = keep_nonzero(weight, mask)
    grid = compute_qparams(base, GridSpec(4, group_size, True))
    return base, grid, encode_latent(base, quantize(base, grid), mask, grid)


def layer_jobs(out_features: int, in_features: int, device: str) -> dict[str, Callable[[], None]]:
    """One forward and backward of a layer in every variant.

    "three products" is what every quantization-aware exact form must multiply, and nothing else.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base, grid, latent = pruned_layer(out_features, in_features, device)
    x = torch.randn(TOKENS, in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(TOKENS, out_features, device=device, dtype=dtype)
    lora_A = torch.randn(RANK, in_features, device=device).mul_(in_features**-0.5).requires_grad_()
    lora_B = torch.zeros(out_features, RANK, device=device, requires_grad=True)
    linear = nn.Linear(in_features, out_features, bias=False, device=device)
    linear.weight.data = base.to(dtype)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    peft_lora = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    published = PublishedLinear(base.to(dtype), RANK, ALPHA)
    published_qa = PublishedLinear(base, RANK, ALPHA, grid, latent)
    stored, scaling = base.to(dtype), ALPHA / RANK
    packed, scale = pack_codes(quantize(base, grid), grid.bits), grid.scale.clone().requires_grad_()

    def fused(tensor: Tensor, gradient: Any, **settings: Any) -> Callable[[], Tensor]:
        return lambda: adapted_linear(
            x, tensor, lora_A, lora_B, scaling=scaling, gradient=gradient, **settings
        )

    forwards: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: nn.functional.linear(x, stored),
        "peft lora": lambda: peft_lora(x),
        "published": lambda: published(x),
        "exact": fused(stored, "exact"),
        "lowrank": fused(stored, "lowrank"),
        "published qa": lambda: published_qa(x),
        "qa exact": fused(latent, "exact", qparams=grid),
        "qa lowrank": fused(latent, "lowrank", qparams=grid),
        "scales": lambda: scaled_linear(x, packed, replace(grid, scale=scale)),
    }
    if device == "cuda":
        forwards["exact triton"] = fused(stored, "exact", kernels="triton")
        forwards["qa exact triton"] = fused(latent, "exact", qparams=grid, kernels="triton")

    def products() -> None:
        nn.functional.linear(x.detach(), stored)
        dy @ stored
        dy.t() @ x.detach()

    def job(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = lora_A.grad = lora_B.grad = scale.grad = None
            forward().backward(dy)

        return run

    return {name: job(forward) for name, forward in forwards.items()} | {"three products": products}


def measure_layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant at every shape, with floors."""
    shapes = [("SmolLM2-135M", name, shape) for name, shape in SMOLLM2.items()]
    names = ("q", "k, v") if arguments.quick and arguments.device == "cpu" else tuple(LLAMA3)
    shapes += [("Llama-3-8B", name, LLAMA3[name]) for name in names]
    rows = []
    for model, name, (out_features, in_features) in shapes:
        heavy = out_features * in_features > 10**7 and arguments.device == "cpu"
        rounds = (5 if heavy else 15) if arguments.quick else (5 if heavy else 30)
        print(f"layer {model} {name}", file=sys.stderr)
        seconds = interleave(
            layer_jobs(out_features, in_features, arguments.device), rounds, clock=arguments.clock
        )
        flops = {v: layer_flops(v, TOKENS, RANK, out_features, in_features) for v in LAYER_VARIANTS}
        row: dict[str, Any] = {"model": model, "layer": name, "shape": [out_features, in_features]}
        row["times"] = {variant: summarize(values) for variant, values in seconds.items()}
        row["ratios"] = {}
        for variant, reference in RATIOS:
            found, floor = ratio(seconds[variant], seconds[reference]), flops[variant] / flops[reference]
            row["ratios"][f"{variant} / {reference}"] = {
                "value": found,
                "floor": floor,
                "of_floor": found / floor,
            }
        rows.append(row)
    return rows


RATIOS = (
    ("exact", "published"),
    ("exact", "peft lora"),
    ("lowrank", "peft lora"),
    ("qa exact", "published qa"),
    ("three products", "published qa"),
    ("qa lowrank", "peft lora"),
    ("scales", "exact"),
)


def measure_memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Peak memory of training steps, one process for each variant."""
    peaks = {}
    full = [variant for variant in VARIANTS if variant not in {"qa lowrank", "scales"}]
    for variant in ("peft lora", "exact", "qa exact") if arguments.quick else full:
        print(f"memory {variant}", file=sys.stderr)
        command = [
            sys.executable,
            "-m",
            "benchmarks.steps",
            variant,
            arguments.device,
            str(arguments.threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[variant] = int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
    return peaks


def collect_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The aims, each beside its floor."""

    def layer(key: str, model: str) -> float | None:
        """The ratio over a block's measured layers, each weighted by its time."""
        first, second = key.split(" / ")
        rows = [
            (row, 2 if row["layer"] == "k, v" else 1) for row in result["layers"] if row["model"] == model
        ]
        total = [sum(n * row["times"][v]["median_ms"] for row, n in rows) for v in (first, second)]
        return total[0] / total[1] if rows else None

    steps, memory = result.get("steps"), result.get("memory")

    def step(first: str, second: str) -> float | None:
        return None if steps is None else steps["ratios"][f"{first} / {second}"]["value"]

    def floor(first: str, second: str) -> float | None:
        return None if steps is None else steps["ratios"][f"{first} / {second}"]["floor"]

    peak = None if not memory else memory["exact"] / memory["peft lora"]
    qa_peak = None if not memory else memory["qa exact"] / memory["peft lora"]
    end, saved = ", SmolLM2-135M end to end", result["saved_bytes_per_weight"]
    return [
        *(
            check(f"{name}, layers of {model}", layer(key, model), at_most=at_most, aim=aim, floor=floor_)
            for name, key, at_most, aim, floor_ in (
                ("sparse_peft exact / published", "exact / published", 0.70, 0.64, 0.61),
                ("qa_sparse_peft exact / published QA", "qa exact / published qa", 0.88, 0.80, 1.01),
                ("scales / sparse_peft exact", "scales / exact", 1.0, 0.95, 0.96),
            )
            for model in ("SmolLM2-135M", "Llama-3-8B")
        ),
        *(
            check(
                f"{name} / PEFT LoRA{end}",
                step(variant, "peft lora"),
                at_most=at_most,
                aim=aim,
                floor=floor(variant, "peft lora"),
            )
            for name, variant, at_most, aim in (
                ("sparse_peft exact", "exact", 1.35, 1.25),
                ("sparse_peft lowrank", "lowrank", 1.12, 1.04),
                ("qa_sparse_peft lowrank", "qa lowrank", 1.20, 1.10),
            )
        ),
        check("bytes saved for backward per adapted weight", saved["exact"], at_most=0, aim=0),
        check("the same, qa_sparse_peft", saved["qa exact"], at_most=0, aim=0),
        check("peak training memory, sparse_peft / PEFT LoRA", peak, at_most=1.10, aim=1.02),
        check("peak training memory, qa_sparse_peft / PEFT LoRA", qa_peak, at_most=1.10, aim=1.02),
        check("NLS / fixed rank, step time", step("exact nls", "exact"), at_most=1.03, aim=1.00),
    ]


def markdown(result: dict[str, Any]) -> str:
    """The tables as printed."""
    lines = ["## One layer, forward and backward, ms (median ± half the quartile distance)", ""]
    rows = []
    for row in result["layers"]:
        times = [row["times"][variant] for variant in LAYER_VARIANTS]
        cells = [f"{t['median_ms']:.1f} ± {t['spread_ms']:.1f}" for t in times]
        rows.append([row["model"], row["layer"], "x".join(map(str, row["shape"])), *cells])
    lines.append(markdown_table(["model", "layer", "shape", *LAYER_VARIANTS], rows))
    lines += ["", "Ratios (floor by FLOPs in brackets):", ""]
    rows = []
    for row in result["layers"]:
        cells = [f"{r['value']:.2f} ({r['floor']:.2f})" for r in row["ratios"].values()]
        rows.append([row["model"], row["layer"], *cells])
    lines.append(markdown_table(["model", "layer", *(f"{a} / {b}" for a, b in RATIOS)], rows))
    if "steps" in result:
        lines += ["", f"## A training step of SmolLM2-135M, {TOKENS} tokens", ""]
        rows = []
        for variant, times in result["steps"]["times"].items():
            found = result["steps"]["ratios"][f"{variant} / peft lora"]
            saved = result["saved_bytes_per_weight"].get(variant)
            peak = (result.get("memory") or {}).get(variant)
            ms = f"{times['median_ms']:.0f} ± {times['spread_ms']:.0f}"
            beyond = ["" if saved is None else f"{saved:.2f}", "" if peak is None else f"{peak / 2**20:.0f}"]
            rows.append([variant, ms, f"{found['value']:.2f}", f"{found['floor']:.2f}", *beyond])
        columns = ["variant", "ms", "/ PEFT LoRA", "floor", "saved bytes a weight", "peak MiB"]
        lines.append(markdown_table(columns, rows))
    lines += ["", "## Aims", "", checks_table(result["checks"])]
    lines += ["", *(f"Not measured: {what}." for what in result["not_measured"])]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a Markdown table, and write the JSON."""
    parser = make_parser(__doc__, quick="fewer rounds and shapes; within 10 minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--parts", default="layers,steps,memory", help="which of these to measure")
    arguments = parse_options(parser)
    result: dict[str, Any] = {"environment": environment(arguments.clock), "seed": 0, "tokens": TOKENS}
    parts = arguments.parts.split(",")
    result["rank"], result["layers"] = RANK, measure_layers(arguments) if "layers" in parts else []
    result["saved_bytes_per_weight"] = saved_bytes_per_weight(arguments.device)
    result["not_measured"] = not_measured(arguments)
    finish(result, arguments.json)
    if "steps" in parts:
        result["steps"] = measure_steps(
            arguments.device,
            rounds=4 if arguments.quick else 9,
            clock=arguments.clock,
            variants=QUICK_VARIANTS if arguments.quick else STEP_VARIANTS,
        )
        finish(result, arguments.json)
    if "memory" in parts:
        result["memory"] = measure_memory(arguments)
        finish(result, arguments.json)
    print(markdown(result))


def not_measured(arguments: argparse.Namespace) -> list[str]:
    """What a reader may look for in vain."""
    found = ["peak memory of a single layer", "the whole of Llama-3-8B, and its blocks beyond single layers"]
    if arguments.device != "cuda":
        found.append("every row on a GPU (none was at hand)")
    if arguments.quick:
        found.append("hybrid steps (each is an exact or a lowrank one)")
        found += ["Llama-3-8B's up and down projections"] if arguments.device != "cuda" else []
    found += [part for part in ("layers", "steps", "memory") if part not in arguments.parts.split(",")]
    return found


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Check the aims with what is measured so far, and write it."""
    result["checks"] = collect_checks(result)
    write_result(path, result)


if __name__ == "__main__":
    main()
