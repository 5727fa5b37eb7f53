from typing import Any

import pytest

from sqft.adapters import SearchSpace, attach_adapters, set_ranks
from sqft.adapters.space import adapter_layers
from sqft.adapters.targets import find_targets, rank_groups
from sqft.errors import AdapterError
from sqft.sections import AdapterSection


def space_of(model: Any, **settings: Any) -> tuple[Any, SearchSpace]:
    peft_model = attach_adapters(
        model, AdapterSection(method="sparse_peft", ranks=[16, 12, 8, 4], **settings)
    )
    return peft_model, SearchSpace.of(peft_model)


def test_default_targets_and_groups(sparse_model: Any) -> None:
    _, space = space_of(sparse_model())
    assert space.groups["model.layers.0.q_proj+k_proj+v_proj"] == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    )
    assert space.groups["model.layers.1.mlp.up_proj"] == ("model.layers.1.mlp.up_proj",)
    assert len(space.groups) == 2 * 3
    assert space.ranks == (16, 12, 8, 4)


def test_fused_modules(sparse_model: Any) -> None:
    _, space = space_of(sparse_model("phi3"))
    ends = {name.rpartition(".")[2] for names in space.groups.values() for name in names}
    assert ends == {"qkv_proj", "gate_up_proj", "down_proj"}


def test_heuristics(sparse_model: Any) -> None:
    _, space = space_of(sparse_model())
    assert set(space.maximal().values()) == {16}
    assert set(space.median().values()) == {8}
    assert set(space.minimal().values()) == {4}
    assert set(SearchSpace({"a": ("a",)}, (32, 24, 16)).median().values()) == {24}


def test_ranks_are_a_function_of_seed_and_step(sparse_model: Any) -> None:
    _, space = space_of(sparse_model())
    drawn = [space.ranks_at(0, step) for step in range(200)]
    assert drawn == [space.ranks_at(0, step) for step in range(200)]
    assert drawn != [space.ranks_at(1, step) for step in range(200)]
    counts = [sum(d["model.layers.0.mlp.up_proj"] == rank for d in drawn) for rank in space.ranks]
    assert min(counts) > 25
    reordered = SearchSpace(dict(reversed(space.groups.items())), space.ranks)
    assert reordered.ranks_at(0, 7) == space.ranks_at(0, 7)


def test_set_ranks(sparse_model: Any) -> None:
    model, space = space_of(sparse_model(), rank_groups=[["up_proj", "down_proj"]])
    assert "model.layers.0.up_proj+down_proj" in space.groups
    chosen = space.ranks_at(0, 3)
    set_ranks(model, chosen)
    layers = adapter_layers(model)
    for group, names in space.groups.items():
        assert {layers[name].active_rank["default"] for name in names} == {chosen[group]}
    with pytest.raises(AdapterError, match="missing or unknown"):
        set_ranks(model, {"x": 4})
    with pytest.raises(AdapterError, match="rank 5"):
        set_ranks(model, dict.fromkeys(space.groups, 5))


def test_wrong_rank_groups(sparse_model: Any) -> None:
    names = list(find_targets(sparse_model(), None))
    with pytest.raises(AdapterError, match="matches none"):
        rank_groups(names, [["o_proj"]])
    with pytest.raises(AdapterError, match="2 rank groups"):
        rank_groups(names, [["q_proj"], ["self_attn.q_proj", "k_proj"]])
