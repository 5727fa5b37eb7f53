import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.ops import cross_entropy as module
from sqft.ops.cross_entropy import chunked_cross_entropy, liger_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_equals_the_plain_loss(chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": chunk, "cuda": chunk})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight, shift = torch.randn(37, 8, generator=generator), torch.randn(37, generator=generator)
    b = shift if bias else None
    targets = torch.randint(0, 37, (13,), generator=generator)
    targets[::3] = -100
    plain = F.cross_entropy(F.linear(hidden, weight, b), targets, reduction="sum")
    chunked = chunked_cross_entropy(hidden, weight, targets, b)
    torch.testing.assert_close(chunked, plain)
    found, wanted = (torch.autograd.grad(loss * 0.3, hidden)[0] for loss in (chunked, plain))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_nothing_counted() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(5, 4), torch.full((3,), -100))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 200, "cuda": 200})
    sizes: list[int] = []
    plain = F.linear

    def linear(x: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(x.shape[0] * rest[0].shape[0])
        return plain(x, *rest)

    monkeypatch.setattr(F, "linear", linear)
    chunked_cross_entropy(torch.randn(50, 4), torch.randn(40, 4), torch.zeros(50, dtype=torch.long))
    assert max(sizes) <= 200
    assert len(sizes) == 10


@pytest.mark.parametrize(("inputs", "head"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_head_in_another_dtype(inputs: str, head: str) -> None:
    hidden = torch.randn(6, 8).to(getattr(torch, inputs)).requires_grad_()
    weight, bias = (torch.randn(*shape).to(getattr(torch, head)) for shape in ((11, 8), (11,)))
    targets = torch.arange(6)
    loss = chunked_cross_entropy(hidden, weight, targets, bias)
    plain = F.cross_entropy(F.linear(hidden.float(), weight.float(), bias.float()), targets, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0.0)
    assert torch.autograd.grad(loss, hidden)[0].dtype == hidden.dtype


def test_autocast_computes_logits_as_the_output_layer_would(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = F.linear

    def linear(x: Tensor, *rest: Tensor) -> Tensor:
        seen.append(x.dtype)
        return plain(x, *rest)

    monkeypatch.setattr(F, "linear", linear)
    hidden = torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, torch.randn(11, 8), torch.arange(6))
    loss.backward()
    assert seen == [torch.bfloat16]
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter, where there is no GPU")
def test_liger_gives_the_same() -> None:
    pytest.importorskip("liger_kernel")
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(0, 50, (7,))
    losses = [f(hidden, weight, targets) for f in (chunked_cross_entropy, liger_cross_entropy)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))
