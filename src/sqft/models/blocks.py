"""Where the decoder blocks of a model are, and which of its weights are linears."""

from collections.abc import Callable, Sequence

from torch import nn

from sqft.errors import ModelError
from sqft.models.names import choose_linears

__all__ = [
    "decoder_blocks",
    "fused_weights",
    "head_weights",
    "target_linears",
]


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by full name, in order: {"model.layers.0": ..., ...}.

    They are the members of the outermost `nn.ModuleList` whose members are all of one class and hold
    linears; of several such lists the one with most parameters.

    Raises: ModelError if there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_uniform(module):
            found[name] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} is not understood: looked for an nn.ModuleList of blocks of one class "
            "that hold nn.Linear layers (as model.layers of Llama) and found none"
        )
    name = max(found, key=lambda n: sum(p.numel() for p in found[n].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(found[name])}


def target_linears(
    model: nn.Module, targets: Sequence[str] | str | None, skip: Sequence[str] | str, *, prefix: str = ""
) -> dict[str, nn.Module]:
    """The linears inside the decoder blocks that `choose_linears` chooses, by full name.

    model: a whole model, or one block together with its name as `prefix`.

    Raises: ModelError if a target or a skipped name matches nothing.
    """
    blocks = {prefix: model} if prefix else decoder_blocks(model)
    linears = {
        f"{block_name}.{name}": module
        for block_name, block in blocks.items()
        for name, module in block.named_modules()
        if is_linear(module)
    }
    return {name: linears[name] for name in choose_linears(linears, targets, skip)}


def fused_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices in the decoder blocks that belong to no linear layer, by full name.

    These are the experts of a mixture that are kept in one tensor, which no method compresses, and small ones
    such as a router.
    """
    return {
        f"{block_name}.{name}": parameter
        for block_name, block in decoder_blocks(model).items()
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and not is_linear(block.get_submodule(name.rpartition(".")[0]))
    }


def head_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of token embedding and output head, by full name; of two that are tied the first."""
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    find_embedding: Callable[[], nn.Module] = model.get_input_embeddings  # type: ignore[assignment]
    ends = [find_embedding(), find_head()]
    found = {
        id(module.weight): (f"{name}.weight", module.weight)
        for name, module in reversed(list(model.named_modules()))
        if any(module is end for end in ends)
    }
    return dict(reversed(found.values()))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or quantized."""
    return isinstance(module, nn.Linear) or bool(getattr(module, "is_quantized_linear", False))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight of one dimension."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _is_uniform(blocks: nn.ModuleList) -> bool:
    classes = {type(block) for block in blocks}
    return len(classes) == 1 and all(any(is_linear(m) for m in block.modules()) for block in blocks)
