"""Which modules get an adapter, and which of them share a rank."""

from collections.abc import Iterable, Sequence

from torch import nn

from sqft.adapters.config import DEFAULT_RANK_GROUPS
from sqft.errors import AdapterError
from sqft.models.blocks import is_linear
from sqft.models.names import REPEATED, choose_adapted, is_repeated, matches_name

__all__ = ["find_quantized", "find_targets", "in_layers", "rank_groups"]


def find_targets(
    model: nn.Module, patterns: Sequence[str] | str | None, skip: Sequence[str] | str = ()
) -> dict[str, nn.Module]:
    """The linear layers inside repeated blocks that `choose_adapted` chooses, by full name.

    Of a model without repeated blocks any linear layer may be named.

    Raises: AdapterError if a given pattern, or every default one, matches nothing, or nothing is left.
    """
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    inside = tuple(name + "." for name in wrapped)
    linears = {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(inside) and (is_linear(module) or name in wrapped)
    }
    linears = {name: module for name, module in linears.items() if is_repeated(name)} or linears
    return {name: linears[name] for name in choose_adapted(linears, patterns, skip)}


def in_layers(modules: dict[str, nn.Module], numbers: Sequence[int] | int | None) -> dict[str, nn.Module]:
    """The modules in the blocks of these numbers, by full name; None takes all.

    Raises: AdapterError if none is left.
    """
    if numbers is None or not modules:
        return modules
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    found = {
        name: module
        for name, module in modules.items()
        if (block := REPEATED.match(name)) and int(block.group(1).rpartition(".")[2]) in wanted
    }
    if not found:
        raise AdapterError(f"layers_to_transform {sorted(wanted)} leaves no layer to adapt")
    return found


def find_quantized(
    model: nn.Module, patterns: Sequence[str] | str | None, skip: Sequence[str] | str = ()
) -> dict[str, nn.Module]:
    """The linears inside repeated blocks whose group scales can be trained, by full name; None takes all.

    Raises: AdapterError if a pattern matches nothing, or there is no quantized linear.
    """
    layers = find_targets(model, ["*"] if patterns is None else patterns, skip)
    quantized = {name: layer for name, layer in layers.items() if is_quantized(layer)}
    if not quantized:
        raise AdapterError("trained scales need a quantized base, and this one is not; quantize it first")
    plain = sorted(set(layers) - set(quantized))
    if plain and patterns is not None:
        raise AdapterError(f"trained scales need a quantized base, and {plain[0]} is not; leave it out")
    return quantized


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear, wrapped or not, holds codes."""
    return getattr(getattr(layer, "base_layer", layer), "qparams", None) is not None


def rank_groups(names: Iterable[str], patterns: list[list[str]] | None) -> dict[str, tuple[str, ...]]:
    """Group modules that share a rank: group name -> module names, in the order of `names`.

    Inside a block, the modules that match one list of patterns form a group; every other one is alone.

    Raises: AdapterError if a pattern matches nothing, or two lists match the same module.
    """
    names = list(names)
    shared = [list(group) for group in (DEFAULT_RANK_GROUPS if patterns is None else patterns)]
    for pattern in (p for group in shared for p in group):
        if patterns is not None and not any(matches_name(name, pattern) for name in names):
            raise AdapterError(f"rank group pattern '{pattern}' matches none of the adapted modules")
    members: dict[tuple[str, int], list[str]] = {}
    for position, name in enumerate(names):
        lists = [i for i, group in enumerate(shared) if any(matches_name(name, p) for p in group)]
        if len(lists) > 1:
            raise AdapterError(f"{name} stands in {len(lists)} rank groups; leave it in one")
        block = REPEATED.match(name)
        key = (block.group(1) if block else "", lists[0]) if lists else (name, -1 - position)
        members.setdefault(key, []).append(name)
    return {_group_name(block, group): tuple(group) for (block, _), group in members.items()}


def _group_name(block: str, members: list[str]) -> str:
    if len(members) == 1:
        return members[0]
    ends = "+".join(name.rpartition(".")[2] for name in members)
    return f"{block}.{ends}" if block else ends
