from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from sqft.adapters import attach_adapters
from sqft.ops.cross_entropy import chunked_cross_entropy
from sqft.sections import AdapterSection
from sqft.training.head import separable_head, without_head


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_the_loss_in_chunks_is_the_loss(arch: str, tiny_model_dir: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(arch), dtype=torch.float32)
    model = attach_adapters(base, AdapterSection(method="sparse_peft", ranks=[4]))
    tokens = torch.randint(4, 288, (2, 9))
    targets = tokens.roll(-1).flatten()
    head = separable_head(model)
    assert head is not None
    plain = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets, reduction="sum")
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with without_head(head):
        hidden = model(input_ids=tokens).logits.flatten(0, 1)
    loss = chunked_cross_entropy(hidden, head.weight, targets, head.bias)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4)
    assert model(input_ids=tokens).logits.shape[-1] == 288


def test_a_head_that_is_not_the_last_word(tiny_model_dir: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")).requires_grad_(False)
    assert separable_head(model) is not None
    model.config.final_logit_softcapping = 30.0
    assert separable_head(model) is None
    model.config.final_logit_softcapping = None
    model.lm_head.weight.requires_grad_(True)
    assert separable_head(model) is None
