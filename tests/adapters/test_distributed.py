"""Two processes on the CPU: the gradients of DDP and FSDP2 are those of one process on both batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sqft.adapters import SearchSpace, attach_adapters, set_ranks, set_step
from sqft.adapters.targets import find_targets
from sqft.models import QuantizedLinear
from sqft.ops import GridSpec, compute_qparams, encode_latent, keep_nonzero, mask_rows, quantize
from sqft.sections import AdapterSection


def build(directory: str, method: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, linear in find_targets(model, None).items():
        weight = linear.get_parameter("weight")
        mask = mask_rows(weight.detach().abs(), 0.5)
        base = keep_nonzero(weight.detach(), mask)
        weight.data = base
        if method == "qa_sparse_peft":
            grid = compute_qparams(base, GridSpec(4, 32, True))
            parent, _, end = name.rpartition(".")
            coded = QuantizedLinear(encode_latent(base, quantize(base, grid), mask, grid), grid)
            setattr(model.get_submodule(parent), end, coded)
    section = AdapterSection(method=method, ranks=[8, 4], dropout=0.25)
    peft_model = attach_adapters(model, section)
    generator = torch.Generator().manual_seed(0)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    peft_model.train()
    set_ranks(peft_model, SearchSpace.of(peft_model).ranks_at(0, 3))
    set_step(peft_model, 0, 3)
    return peft_model


def batch(rank: int) -> Tensor:
    return torch.randint(4, 288, (2, 9), generator=torch.Generator().manual_seed(rank))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def worker(rank: int, directory: str, method: str, kind: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output}.store", rank=rank, world_size=2)
    peft_model = build(directory, method)
    model: Any = peft_model
    if kind == "ddp":
        model = DistributedDataParallel(peft_model)
    else:
        for layer in peft_model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(peft_model)
    for _ in range(2):  # twice, as gradient accumulation does
        (model(input_ids=batch(rank), labels=batch(rank)).loss / 2).backward()
    found = gradients(model)
    if rank == 0:
        torch.save(found, output)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["lora", "sparse_peft", "qa_sparse_peft"])
def test_two_processes(method: str, kind: str, tiny_model_dir: Any, tmp_path: Path) -> None:
    directory, output = str(tiny_model_dir("llama")), str(tmp_path / "gradients.pt")
    spawn(worker, (directory, method, kind, output), nprocs=2)
    model = build(directory, method)
    for rank in range(2):
        (model(input_ids=batch(rank), labels=batch(rank)).loss / 2).backward()
    expected, found = gradients(model), torch.load(output)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4)
