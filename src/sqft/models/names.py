"""Which linears are meant by a name, an end of one, a pattern or an expression. Names alone, no torch."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sqft.errors import AdapterError, ModelError
from sqft.untrusted import time_limit

__all__ = [
    "check_fused_groups",
    "choose_adapted",
    "choose_linears",
    "is_repeated",
    "matches_name",
    "select_names",
]

ALL = "all-linear"
PLAIN = re.compile(r"[\w.]+")
SECONDS = 5.0  # for a regular expression
REPEATED = re.compile(r"^(.*?\.\d+)\.")
# Runtimes fuse these into one matrix, so they are compressed alike or not at all.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTED = ("q_proj", "k_proj", "v_proj", "qkv_proj", "up_proj", "gate_up_proj", "down_proj")


def choose_linears(
    names: Iterable[str], targets: Sequence[str] | str | None, skip: Sequence[str] | str
) -> list[str]:
    """The linears in decoder blocks that `targets` means and `skip` does not; targets None means every one.

    Names match as `select_names` says: "up_proj" and "mlp.up_proj" mean model.layers.0.mlp.up_proj and never
    mlp.gate_up_proj, "layers.0.*" all of block 0.

    Raises: ModelError if a target or a skipped name matches nothing.
    """
    names = list(names)
    chosen, unknown = select_names(names, ALL if targets is None else targets)
    skipped, also_unknown = select_names(names, skip)
    for pattern in (*unknown, *also_unknown):
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ModelError(
            f"no linear in the decoder blocks is called '{pattern}'; there are {', '.join(ends)}"
            f"{_block_hint(pattern, names)}"
        )
    left_out = set(skipped)
    return [name for name in chosen if name not in left_out]


def choose_adapted(
    names: Iterable[str], patterns: Sequence[str] | str | None, skip: Sequence[str] | str = ()
) -> list[str]:
    """Of linears the names that `patterns` means and `skip` does not.

    Both are as `select_names` takes them; None takes q, k, v, up and down, or the fused forms of them.

    Raises: AdapterError if a given pattern, or every default one, matches nothing, or nothing is left.
    """
    names = list(names)
    found, missing = select_names(names, ADAPTED if patterns is None else patterns)
    skipped, not_skipped = select_names(names, skip)
    if not found or (patterns is not None and missing) or not_skipped:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        unknown = missing if not found or patterns is not None else []
        given = ", ".join([*unknown, *not_skipped])
        raise AdapterError(f"no linear layer is called {given}; there are: {there}")
    left_out = set(skipped)
    left = [name for name in found if name not in left_out]
    if not left:
        raise AdapterError("skip_modules leaves no linear layer to adapt; name fewer")
    return left


def is_repeated(name: str) -> bool:
    """Whether a module lies in a numbered list of modules, as those of decoder blocks do."""
    return REPEATED.match(name) is not None


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


def _block_hint(pattern: str, names: Iterable[str]) -> str:
    inside = any(f".{pattern}." in f".{name}" for name in names)
    return f"; write '{pattern}.*' for all that is inside it" if inside else ""
