"""Where the decoder blocks of a model are, and which linears inside them are meant by a name."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from sqft.errors import ModelError
from sqft.untrusted import time_limit

__all__ = [
    "check_fused_groups",
    "decoder_blocks",
    "fused_weights",
    "head_weights",
    "matches_name",
    "select_names",
    "target_linears",
]

ALL = "all-linear"
PLAIN = re.compile(r"[\w.]+")
SECONDS = 5.0  # for a regular expression
# Runtimes fuse these into one matrix, so they are compressed alike or not at all.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
    """The linears inside the decoder blocks that `targets` names and `skip` does not, by full name.

    model: a whole model, or one block together with its name as `prefix`. Names match as `select_names` says:
    "up_proj" and "mlp.up_proj" mean model.layers.0.mlp.up_proj and never mlp.gate_up_proj, "layers.0.*" all
    of block 0. targets None means every linear.

    Raises: ModelError if a target or a skipped name matches nothing.
    """
    blocks = {prefix: model} if prefix else decoder_blocks(model)
    linears = {
        f"{block_name}.{name}": module
        for block_name, block in blocks.items()
        for name, module in block.named_modules()
        if is_linear(module)
    }
    chosen, unknown = select_names(linears, ALL if targets is None else targets)
    skipped, also_unknown = select_names(linears, skip)
    for pattern in (*unknown, *also_unknown):
        ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ModelError(
            f"no linear in the decoder blocks is called '{pattern}'; there are {', '.join(ends)}"
            f"{_block_hint(pattern, linears)}"
        )
    return {name: linears[name] for name in chosen if name not in skipped}


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


def select_names(names: Iterable[str], wanted: Sequence[str] | str) -> tuple[list[str], list[str]]:
    """The names that are wanted, and what of `wanted` means none of them.

    wanted: a list of what `matches_name` takes; or one text, as PEFT has it: "all-linear", every name, or a
    regular expression for whole names. A text that could be a name is one.

    Raises: ModelError for an expression that is none, or that takes too long.
    """
    names = list(names)
    if wanted == ALL:
        return names, []
    if not isinstance(wanted, str) or PLAIN.fullmatch(wanted):
        patterns = [wanted] if isinstance(wanted, str) else wanted
        chosen = [name for name in names if any(matches_name(name, pattern) for pattern in patterns)]
        return chosen, [p for p in patterns if not any(matches_name(name, p) for name in chosen)]
    try:
        with time_limit(SECONDS):
            chosen = [name for name in names if re.fullmatch(wanted, name)]
    except (re.error, TimeoutError) as error:
        raise ModelError(f"the regular expression {wanted!r} cannot be used: {error}") from None
    return chosen, [] if chosen else [wanted]


def matches_name(name: str, pattern: str) -> bool:
    """Whether `pattern` is `name` or its last components; * and ? and [..] stand for others, dots included.

    "layers.0.*" matches model.layers.0.mlp.up_proj, "q_*" self_attn.q_proj, "layers.?.mlp.*" blocks 0 to 9.
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def _block_hint(pattern: str, names: Iterable[str]) -> str:
    inside = any(f".{pattern}." in f".{name}" for name in names)
    return f"; write '{pattern}.*' for all that is inside it" if inside else ""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or quantized."""
    return isinstance(module, nn.Linear) or bool(getattr(module, "is_quantized_linear", False))


def check_fused_groups(chosen: Iterable[str], existing: Iterable[str]) -> None:
    """Check that layers which runtimes fuse (q/k/v, gate/up) are all chosen, or none of them.

    Raises: ModelError naming the group that is split.
    """
    chosen, existing = set(chosen), set(existing)
    for name in sorted(chosen):
        parent, _, end = name.rpartition(".")
        for group in FUSED_GROUPS:
            if end in group:
                left_out = [f"{parent}.{m}" for m in group if f"{parent}.{m}" in existing - chosen]
                if left_out:
                    raise ModelError(
                        f"{name} is chosen and {left_out[0]} is not, but runtimes fuse {'/'.join(group)}; "
                        "choose all of them or none"
                    )


def _is_uniform(blocks: nn.ModuleList) -> bool:
    classes = {type(block) for block in blocks}
    return len(classes) == 1 and all(any(is_linear(m) for m in block.modules()) for block in blocks)
