"""One layer at Llama-3-8B's shapes, 4096 tokens, rank 32: which kernels are fastest, then every variant.

For each shape and kind of base the cuts (`Tiling`) of each kernel are timed alone, on operands that rotate so
that they do not lie in the cache. Then forward and backward of the layer are timed side by side with the best
of them, and the faster of torch and Triton is the row that `benchmarks.gpu.choose` puts into the table.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from benchmarks.adapters import pruned_layer
from benchmarks.gpu.part_facts import median_seconds, synchronize
from benchmarks.gpu.rows import Rows
from benchmarks.published import PublishedLinear, layer_flops
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sqft.kernels.choices import TORCH, WEIGHT_TILING, Choice, Tiling, table_row
from sqft.ops import QParams, adapted_weight, decode_latent
from sqft.ops.adapted_linear import adapted_linear
from sqft.ops.cross_entropy import chunked_cross_entropy, liger_cross_entropy
from sqft.ops.kernel_use import device_capability
from sqft.ops.weight_blocks import WeightBlocks

__all__ = ["measure"]

TOKENS, RANK, ALPHA = 4096, 32, 64.0
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
WEIGHT_TILINGS = (
    WEIGHT_TILING,
    Tiling(64, 64),
    Tiling(64, 128, precision="tf32x3"),
    Tiling(64, 64, precision="tf32x3"),
)
FUSED_TILINGS = (
    Tiling(128, 128, warps=8, stages=3),
    Tiling(128, 128, warps=8, stages=4, strip=4),
    Tiling(128, 256, warps=8, stages=3),
)
PRODUCT_TILINGS = (Tiling(128, 128, warps=8, strip=4), Tiling(64, 128, strip=8))
MAX_FLIPS = 1e-6  # share of weights that a kernel may round to another neighbour than the definition
CACHE_BYTES = 200 << 20  # operands rotate over at least so many bytes
ROUNDS = 10


def measure(rows: Rows) -> None:
    """The rows of this part."""
    shapes = ((64, 96), (96, 64)) if rows.dry else SHAPES
    for shape in shapes[:1] if rows.dry else shapes:
        for quantized in (False, True):
            kind = f"{'x'.join(map(str, shape))} {'latent' if quantized else 'bf16'}"
            layer = Layer(shape, quantized, rows)
            best = Choice(WEIGHT_TILING, FUSED_TILINGS[0])
            found = rows.measure(f"{kind}: kernels", layer.best_kernels)
            if found is not None:
                best = layer.choice_of(found)
            rows.measure(f"{kind}: layer", partial(layer.variants, best))
            del layer
            rows.free()
    rows.measure("loss", partial(loss_rows, rows))


class Layer:
    """One layer's operands, and what is timed on them."""

    def __init__(self, shape: tuple[int, int], quantized: bool, rows: Rows) -> None:
        torch.manual_seed(0)
        self.shape, self.quantized, self.rows, self.device = shape, quantized, rows, rows.device
        self.tokens = 24 if rows.dry else TOKENS
        out, columns = shape
        self.base, self.grid, self.latent = pruned_layer(out, columns, rows.device, 32 if rows.dry else 128)
        self.stored = self.base.bfloat16()
        self.dtype = torch.bfloat16
        self.x = torch.randn(self.tokens, columns, device=rows.device, dtype=self.dtype, requires_grad=True)
        self.dy = torch.randn(self.tokens, out, device=rows.device, dtype=self.dtype)
        self.lora_A = torch.randn(RANK, columns, device=rows.device).mul_(columns**-0.5).requires_grad_()
        self.lora_B = torch.randn(out, RANK, device=rows.device).mul_(0.01).requires_grad_()

    @property
    def qparams(self) -> QParams | None:
        """The grid of a quantized base."""
        return self.grid if self.quantized else None

    def blocks(self, base: Tensor, choice: Choice) -> WeightBlocks:
        """What builds the weight of a base."""
        storage = None if self.quantized else self.dtype
        factors = self.lora_A.detach(), self.lora_B.detach()
        return WeightBlocks(base, *factors, ALPHA / RANK, self.qparams, storage, choice)

    def best_kernels(self) -> dict[str, Any]:
        """Milliseconds of each cut of each kernel, and the best of them."""
        base = self.latent if self.quantized else self.stored
        copies = [base.clone() for _ in range(1 if self.rows.dry else 1 + CACHE_BYTES // base.nbytes)]
        whole = slice(0, base.shape[0])
        found: dict[str, Any] = {"weight": [], "gradient": []}
        exact = self.definition()
        for tiling in (None, *(WEIGHT_TILINGS[::2] if self.rows.dry else WEIGHT_TILINGS)):
            rotated = cycle([self.blocks(copy, Choice(tiling)) for copy in copies])

            def build(rotated: Any = rotated) -> None:
                blocks = next(rotated)
                (blocks.build if blocks.kernels == TORCH else blocks.build_with_mask)(whole, self.dtype)

            flips = (self.blocks(base, Choice(tiling)).build(whole, torch.float32) != exact).float().mean()
            found["weight"].append(timing(tiling, self.milliseconds(build), flips=float(flips)))
        keep = self.blocks(base, Choice(WEIGHT_TILING)).build_with_mask(whole, self.dtype)[1]
        last = 1 if self.rows.dry else None
        fused, product = FUSED_TILINGS[:last], PRODUCT_TILINGS[:last]
        found["gradient"].append(timing(None, self.milliseconds(self.torch_gradient), product=False))
        for tiling, multiplied in [*((t, False) for t in fused), *((t, True) for t in product)]:
            blocks = self.blocks(base, Choice(WEIGHT_TILING, tiling, multiplied))
            contract = partial(blocks.contract_gradient, whole, self.dy, self.x.detach(), keep)
            found["gradient"].append(timing(tiling, self.milliseconds(contract), product=multiplied))
        return found

    def definition(self) -> Tensor:
        """The weight by `ops.adapted`."""
        base = decode_latent(self.latent, self.grid) if self.quantized else self.stored.float()
        storage = None if self.quantized else self.dtype
        return adapted_weight(
            base, self.lora_A.detach(), self.lora_B.detach(), scaling=ALPHA / RANK, mask=base != 0,
            qparams=self.qparams, storage_dtype=storage,
        )  # fmt: skip

    def torch_gradient(self) -> None:
        """What torch does for the same, without the mask, which it applies while it builds the weight."""
        gradient = torch.mm(self.dy.t(), self.x.detach())
        torch.mm(gradient, self.lora_A.detach().to(self.dtype).t())
        torch.mm(self.lora_B.detach().to(self.dtype).t(), gradient)

    def milliseconds(self, job: Callable[[], Any]) -> float:
        """Of one run among ten in a row, the median of five."""
        inner = 1 if self.rows.dry else 10

        def several() -> None:
            for _ in range(inner):
                job()

        return 1e3 * median_seconds(several, self.rows) / inner

    def choice_of(self, found: dict[str, Any]) -> Choice:
        """The fastest cut of each kernel that rounds as the definition does."""
        weights = [row for row in found["weight"] if row["tiling"] and row["flips"] <= MAX_FLIPS]
        weight = min(weights or [found["weight"][1]], key=lambda row: row["ms"])
        gradient = min((row for row in found["gradient"] if row["tiling"]), key=lambda row: row["ms"])
        return Choice(Tiling(**weight["tiling"]), Tiling(**gradient["tiling"]), gradient["product"])

    def variants(self, best: Choice) -> dict[str, Any]:
        """Forward and backward of every variant, side by side; bytes beyond what is resident; the choice."""
        jobs = {name: self.job(forward) for name, forward in self.forwards(best).items()}
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        failed: dict[str, str] = {}
        warmup, rounds = (0, 1) if self.rows.dry else (2, ROUNDS)
        for turn in range(warmup + rounds):
            for name in [n for n in jobs if n not in failed]:
                try:
                    spent = self.once(jobs[name])
                except Exception as error:  # the other variants go on
                    failed[name] = f"{type(error).__name__}: {error}"[:200]
                else:
                    seconds[name] += [spent] if turn >= warmup else []
        medians = {name: statistics.median(values) for name, values in seconds.items() if values}
        kind = "qa_sparse_peft exact" if self.quantized else "sparse_peft exact"
        ours = {name: value for name, value in medians.items() if name.startswith(kind)}
        fastest = min(ours, key=lambda name: ours[name])
        choice = best if "triton" in fastest else Choice(best.weight) if "built" in fastest else TORCH
        capability = device_capability(torch.device(self.device))
        return {
            "ms": {name: 1e3 * value for name, value in medians.items()},
            "tflops": {name: self.flops(name) / value / 1e12 for name, value in medians.items()},
            "transient_bytes": {name: self.transient(jobs[name]) for name in medians},
            "failed": failed,
            "fastest": fastest,
            "table_row": table_row(capability, self.shape, self.quantized, choice),
        }

    def forwards(self, best: Choice) -> dict[str, Callable[[], Tensor]]:
        """The layer's output in each variant."""
        out, columns = self.shape

        def ours(gradient: Any, choice: Choice) -> Callable[[], Tensor]:
            base = self.latent if self.quantized else self.stored
            return lambda: adapted_linear(
                self.x, base, self.lora_A, self.lora_B, scaling=ALPHA / RANK, qparams=self.qparams,
                storage_dtype=None if self.quantized else self.dtype, gradient=gradient, kernels=choice,
            )  # fmt: skip

        kind = "qa_sparse_peft" if self.quantized else "sparse_peft"
        built = replace(best, gradient=None, product=False)
        found: dict[str, Callable[[], Tensor]] = {
            f"{kind} exact torch": ours("exact", TORCH),
            f"{kind} exact built": ours("exact", built),
            f"{kind} exact triton": ours("exact", best),
            f"{kind} lowrank torch": ours("lowrank", TORCH),
            f"{kind} lowrank triton": ours("lowrank", best),
        }
        if self.quantized:
            qa = PublishedLinear(self.base, RANK, ALPHA, self.grid, self.latent)
            return found | {"published qa": lambda: qa(self.x)}
        linear = nn.Linear(columns, out, bias=False, device=self.device)
        linear.weight.data = self.stored
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["0"])
        lora = get_peft_model(nn.Sequential(linear), config)
        published = PublishedLinear(self.stored, RANK, ALPHA)
        frozen = partial(nn.functional.linear, self.x, self.stored)
        others: dict[str, Callable[[], Tensor]] = {
            "frozen": frozen,
            "peft lora": lambda: lora(self.x),
            "published": lambda: published(self.x),
        }
        return others | found

    def job(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward, under autocast as in training."""

        def run() -> None:
            self.x.grad = self.lora_A.grad = self.lora_B.grad = None
            with torch.autocast(self.device, dtype=self.dtype):
                y = forward()
            y.backward(self.dy)

        return run

    def once(self, job: Callable[[], None]) -> float:
        """Seconds of one run."""
        synchronize(self.device)
        start = time.perf_counter()
        job()
        synchronize(self.device)
        return time.perf_counter() - start

    def transient(self, job: Callable[[], None]) -> int:
        """The most bytes that one run needs beyond what lay there before it."""
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return int(torch.cuda.max_memory_allocated() - before)

    def flops(self, name: str) -> float:
        """Floating point operations of a variant."""
        words = name.split()
        known = {"exact": "exact", "lowrank": "lowrank"}
        counted = next((known[word] for word in words if word in known), name)
        return layer_flops(counted, self.tokens, RANK, *self.shape)


def timing(tiling: Tiling | None, milliseconds: float, **more: Any) -> dict[str, Any]:
    """One timed cut; None is torch."""
    return {"tiling": None if tiling is None else asdict(tiling), "ms": milliseconds, **more}


def loss_step(loss: Callable[..., Tensor], *operands: Tensor) -> None:
    """The loss and its gradient."""
    loss(*operands).backward()


def loss_rows(rows: Rows) -> dict[str, Any]:
    """The chunked loss of 4096 tokens over Llama-3's vocabulary, by torch and by Liger Kernel."""
    tokens, features, vocabulary = (20, 32, 100) if rows.dry else (TOKENS, 4096, 128256)
    hidden = torch.randn(tokens, features, device=rows.device, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocabulary, features, device=rows.device, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, vocabulary, (tokens,), device=rows.device)
    found: dict[str, Any] = {"capability": device_capability(torch.device(rows.device))}
    for name, loss in (("torch", chunked_cross_entropy), ("liger", liger_cross_entropy)):
        try:
            found[f"{name}_ms"] = 1e3 * median_seconds(partial(loss_step, loss, hidden, head, targets), rows)
        except Exception as error:  # Liger is an extra
            found[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
    return found
