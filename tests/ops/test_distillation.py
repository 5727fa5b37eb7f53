"""The loss of learning a teacher's predictions."""

import pytest
import torch
import torch.nn.functional as F

from sqft.ops import cross_entropy
from sqft.ops.distillation import chunked_distillation_loss, distillation_loss, top_log_probs


def test_is_the_divergence_of_the_likely_tokens_and_the_rest() -> None:
    teacher, student = torch.randn(5, 11), torch.randn(5, 11)
    ids, log_probs = top_log_probs(teacher, 3)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    wanted = 0.0
    for row in range(5):
        kept = p[row].argsort(descending=True)[:3]
        outcomes = [(p[row, i], q[row, i]) for i in kept]
        outcomes.append((1 - p[row, kept].sum(), 1 - q[row, kept].sum()))
        wanted += sum(float(a * (a / b).log()) for a, b in outcomes)
    found = distillation_loss(student, ids, log_probs)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    whole = F.kl_div(q.log(), p.log(), reduction="sum", log_target=True)
    assert 0 < wanted < whole
    torch.testing.assert_close(ids.sort(-1).values, teacher.topk(3).indices.sort(-1).values)


def test_is_nothing_where_both_agree_even_after_rounding() -> None:
    logits = 6 * torch.randn(7, 50, requires_grad=True)
    ids, log_probs = top_log_probs(logits.detach(), 8)
    loss = distillation_loss(logits, ids, log_probs.half())
    assert abs(loss.item()) < 1e-4
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 2e-3


def test_a_teacher_that_is_certain_has_no_rest_and_a_finite_gradient() -> None:
    sure = torch.full((1, 6), -200.0)
    sure[0, 2] = 200.0
    ids, log_probs = top_log_probs(sure, 2)
    student = sure.flip(-1).requires_grad_()
    loss = distillation_loss(student, ids, log_probs.clamp(min=-1e4).half())
    loss.backward()
    assert loss.item() == pytest.approx(400.0, rel=1e-3)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("chunk", [1, 90, 1 << 22])
def test_in_chunks_it_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": chunk})
    hidden, weight, bias = torch.randn(9, 4, requires_grad=True), torch.randn(30, 4), torch.randn(30)
    ids, log_probs = top_log_probs(torch.randn(9, 30), 5)
    plain = distillation_loss(F.linear(hidden, weight, bias), ids, log_probs)
    chunked = chunked_distillation_loss(hidden, weight, ids, log_probs, bias)
    torch.testing.assert_close(chunked, plain)
    found, wanted = (torch.autograd.grad(0.3 * loss, hidden)[0] for loss in (chunked, plain))
    torch.testing.assert_close(found, wanted)
