"""Would compiled elementwise passes bring the quantization-aware layer to its aim on a CPU?

    python -m benchmarks.compiled_passes [--json FILE] [--threads N]

The layer builds its weight twice a step, in passes over blocks that torch's operations cannot join. Here
torch.compile joins them into one C++ loop (it needs a compiler and about ten seconds), values are compared
number for number, and what a layer would take with it is its measured time less the passes saved.
"""

import statistics
from typing import Any

import torch
from benchmarks.adapters import ALPHA, GROUP, RANK, SMOLLM2, layer_jobs, pruned_layer
from benchmarks.common import (
    environment,
    interleave,
    make_parser,
    markdown_table,
    parse_options,
    write_result,
)
from torch import Tensor

from sqft.ops.weight_blocks import WeightBlocks

ZERO, TOP = 8, 7  # symmetric, 4 bits
SCALING = ALPHA / RANK


def passes(block: Tensor, latent: Tensor, scale: Tensor, gradient: Tensor | None) -> None:
    """block: lora_B @ lora_A, then the weight; gradient: times mask and clamp. (out, groups, group size)."""
    sixteenths = latent.float() - (16 * ZERO + 8)
    keep = sixteenths != 0
    adapted = sixteenths * (scale / 16) + torch.where(keep, block * SCALING, 0.0)
    steps = torch.round(adapted / scale)
    clamped = torch.clamp(steps, -ZERO, TOP)
    if gradient is not None:
        gradient.mul_(keep & (clamped == steps))
    block.copy_(clamped * scale)


def measure(name: str, out_features: int, in_features: int) -> dict[str, Any]:
    """One shape: times in ms, whether all numbers are equal, and the ratio to the published layer."""
    torch.manual_seed(0)
    _, grid, latent = pruned_layer(out_features, in_features, "cpu")
    lora_A = torch.randn(RANK, in_features) * in_features**-0.5
    lora_B = torch.randn(out_features, RANK) * 0.01
    gradient = torch.randn(out_features, in_features)
    blocks, rows = WeightBlocks(latent, lora_A, lora_B, SCALING, grid, None), slice(0, out_features)
    torch._dynamo.reset()
    loop = torch.compile(passes, dynamic=False)

    @torch.no_grad()
    def compiled(gradient: Tensor | None) -> Tensor:
        block = torch.mm(lora_B, lora_A)
        groups = None if gradient is None else gradient.unflatten(1, (-1, GROUP))
        first, second = (tensor.unflatten(1, (-1, GROUP)) for tensor in (block, latent))
        loop(first, second, grid.scale.unsqueeze(-1), groups)
        return block

    first, second = gradient.clone(), gradient.clone()
    pairs = [
        (blocks.build(rows, torch.float32), compiled(None)),
        (blocks.build(rows, torch.float32, first), compiled(second)),
        (first, second),
    ]
    jobs = layer_jobs(out_features, in_features, "cpu")
    kept: dict[str, Any] = {key: jobs[key] for key in ("published qa", "qa exact", "three products")}
    kept["torch passes"] = lambda: (
        blocks.build(rows, torch.float32),
        blocks.build(rows, torch.float32, first),
    )
    kept["compiled passes"] = lambda: (compiled(None), compiled(second))
    kept["rank products"] = lambda: (torch.mm(lora_B, lora_A), torch.mm(lora_B, lora_A))
    seconds = interleave(kept, 30, warmup=3)
    rounds = list(zip(*(seconds[key] for key in kept), strict=True))
    times = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
    would = [(ours - old + new) / theirs for theirs, ours, _, old, new, _ in rounds]
    return {
        "layer": name,
        "shape": [out_features, in_features],
        "ms": times,
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "now": statistics.median(ours / theirs for theirs, ours, *_ in rounds),
        "would be": statistics.median(would),
    }


def main() -> None:
    """Measure the layers of SmolLM2-135M and print a Markdown table."""
    arguments, facts = parse_options(make_parser(__doc__)), environment()
    rows = [measure(name, *shape) for name, shape in SMOLLM2.items()]
    names = list(rows[0]["ms"])
    cells = []
    for row in rows:
        times = [f"{row['ms'][name]:.2f}" for name in names]
        cells.append([row["layer"], *times, row["equal"], f"{row['now']:.2f}", f"{row['would be']:.2f}"])
    print(markdown_table(["layer", *(f"{n}, ms" for n in names), "equal", "now", "would be"], cells))
    write_result(arguments.json, {"environment": facts, "layers": rows, "checks": []})


if __name__ == "__main__":
    main()
