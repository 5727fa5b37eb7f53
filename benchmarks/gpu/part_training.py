"""Training the whole Llama-3-8B: random weights, built and trained by the code that `sqft run` uses.

Rows on the sparse bfloat16 base: PEFT LoRA, the published formulas (their forward put into PEFT's own LoRA
layers, so that everything else is equal), sparse_peft with the exact and the lowrank gradient by torch and by
Triton, and elastic ranks. Rows on the quantized base, all linears of the blocks as latents: qa_sparse_peft.
On packed codes: scales and norms alone. Each with and without gradient checkpointing, batch 4 x 1024.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from benchmarks.gpu.random_model import random_checkpoint
from benchmarks.gpu.rows import Rows
from benchmarks.published import published_forward
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from sqft.adapters import SearchSpace, attach_adapters, set_ranks
from sqft.adapters.space import adapter_config
from sqft.data import Example
from sqft.models import build_trainable, training_dtype
from sqft.ops import GridSpec, QParams, compute_qparams
from sqft.sections import AdapterSection, TrainSection
from sqft.training import train_adapters

__all__ = ["measure"]

BATCH, LENGTH, RANK, ALPHA = 4, 1024, 32, 64.0
WARMUP, STEPS = 2, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
GROUP = 128


def measure(rows: Rows) -> None:
    """The rows of this part: the sparse base first, then the quantized one, then codes alone."""
    for base in (sparse_rows, quantized_rows, packed_rows):
        try:
            base(rows)
        except Exception as error:  # a base that cannot be built does not cost the other bases their rows
            rows.measure(base.__name__.replace("_", " "), partial(_fail, error))
        rows.free()


def _fail(error: Exception) -> dict[str, Any]:
    raise error


def sparse_rows(rows: Rows) -> None:
    """Everything that trains on the sparse bfloat16 model."""
    model = build(rows, quantized=False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora)
    both(rows, "peft lora", peft_model)
    publish(peft_model, quantized=False)
    both(rows, "published", peft_model)
    publish(peft_model, quantized=True)
    both(rows, "published qa", peft_model)
    model = peft_model.unload()
    del peft_model
    rows.free()
    adapted = attach(rows, model, "sparse_peft", [32, 24, 16])
    for gradient, kernels in (
        ("exact", "torch"),
        ("exact", "triton"),
        ("lowrank", "torch"),
        ("lowrank", "triton"),
    ):
        name = f"sparse_peft {gradient} {kernels}"
        both(rows, name, adapted, gradient=gradient, kernels=kernels)
    elastic = SearchSpace.of(adapted)
    both(rows, "sparse_peft exact nls torch", adapted, space=elastic, gradient="exact", kernels="torch")


def quantized_rows(rows: Rows) -> None:
    """Everything that trains on the latents of a 4-bit model."""
    adapted = attach(rows, build(rows, quantized=True), "qa_sparse_peft", [32])
    for kernels in ("torch", "triton"):
        both(rows, f"qa_sparse_peft exact {kernels}", adapted, gradient="exact", kernels=kernels)


def packed_rows(rows: Rows) -> None:
    """Scales and norms alone, on packed codes."""
    model = build(rows, quantized=True, base_precision="packed")
    section = AdapterSection(method="scales", train_norms=True, target_modules=TARGETS)
    both(rows, "scales and norms", attach_adapters(model, section))


def build(rows: Rows, *, quantized: bool, base_precision: Any = "latent") -> nn.Module:
    """The base, as the train stage loads it."""
    checkpoint, masks = random_checkpoint(rows.device, quantized=quantized, dry=rows.dry)
    dtype = torch.bfloat16 if rows.dry else training_dtype(checkpoint, rows.device)
    return build_trainable(
        checkpoint, masks, {}, base_precision=base_precision, dtype=dtype, device=rows.device
    )


def attach(rows: Rows, model: nn.Module, method: Any, ranks: list[int]) -> Any:
    """An adapter, as the train stage attaches it."""
    section = AdapterSection(method=method, ranks=ranks, alpha=ALPHA, target_modules=TARGETS)
    return attach_adapters(model, section, storage_dtype=torch.bfloat16 if method == "sparse_peft" else None)


def publish(peft_model: nn.Module, *, quantized: bool) -> None:
    """Give every LoRA layer of a PEFT model the published forward."""
    for layer in peft_model.modules():
        if isinstance(layer, Linear):
            weight: Tensor = layer.base_layer.weight.detach()
            size = min(GROUP, weight.shape[1])
            grid = compute_qparams(weight, GridSpec(4, size, True)) if quantized else None
            layer.forward = MethodType(partial(_published, mask=weight != 0, grid=grid), layer)


def _published(layer: Any, x: Tensor, *_: Any, mask: Tensor, grid: QParams | None) -> Tensor:
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return published_forward(x, layer.base_layer.weight, mask, *factors, layer.scaling["default"], grid)


def both(rows: Rows, name: str, model: Any, space: SearchSpace | None = None, **settings: Any) -> None:
    """Two rows: without and with gradient checkpointing."""
    for key, value in settings.items():
        setattr(adapter_config(model), key, value)  # one configuration, which all layers share
    if settings and space is None:
        set_ranks(model, SearchSpace.of(model).maximal())
    for checkpointing in (True, False):
        ending = "checkpointing" if checkpointing else "all activations"
        rows.measure(f"{name}, {ending}", partial(train, rows, model, space, checkpointing))


def train(rows: Rows, model: Any, space: SearchSpace | None, checkpointing: bool) -> dict[str, Any]:
    """A short training; the first steps warm up."""
    length, steps = (16, 3) if rows.dry else (LENGTH, WARMUP + STEPS)
    section = TrainSection(
        batch_size=BATCH, max_steps=steps, checkpoint_steps=10_000, schedule="constant", learning_rate=1e-4,
        gradient_checkpointing=checkpointing, arguments={"bf16": True},
    )  # fmt: skip
    vocabulary = model.get_base_model().config.vocab_size
    tokens = torch.randint(5, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(0))
    examples = [Example("", "", tuple(row[:4]), tuple(row[4:])) for row in tokens.tolist()]
    directory = Path(tempfile.mkdtemp())
    try:
        record = train_adapters(
            model, examples, section, loss_on="text", output_dir=directory / "out", space=space
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for parameter in model.parameters():
            parameter.grad = None
    timed = record.steps[WARMUP:]
    seconds = [step.seconds for step in timed]
    return {
        "step_seconds": seconds,
        "peak_bytes": record.peak_bytes,
        "tokens_per_second": sum(step.tokens for step in timed) / sum(seconds),
        "losses": record.losses,
    }
