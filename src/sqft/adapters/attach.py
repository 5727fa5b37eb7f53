"""Attaching the adapter that a recipe's section describes."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sqft.adapters.config import SqftConfig
from sqft.adapters.start import StartingAdapter
from sqft.errors import AdapterError
from sqft.sections import AdapterSection

__all__ = ["attach_adapters"]


def attach_adapters(
    model: nn.Module,
    section: AdapterSection,
    identity: dict[str, str] | None = None,
    *,
    storage_dtype: torch.dtype | None = None,
    seed: int = 0,
    start: StartingAdapter | None = None,
) -> PeftModel:
    """Attach a new adapter, which changes nothing until it is trained, or one that training goes on from.

    identity: digests ("base", "mask", "grid") as `base_identity` gives them; they are checked against the
    model, None computes them. storage_dtype: what merged weights are stored in, where the model was loaded in
    a wider dtype; None takes the weights' own. seed: lora_A is a function of it and of the module's name.
    start: an opened adapter (`adapters.start`), whose weights and ranks are taken, its base being compared.

    Raises: AdapterError if a target is missing, the method does not fit the base, or the identity differs.
    """
    config = SqftConfig(
        method=section.method,
        train_scales=section.train_scales,
        train_norms=section.train_norms,
        ranks=list(section.ranks),
        alpha=section.alpha,
        dropout=section.dropout,
        dropout_kind=section.dropout_kind,
        gradient=section.gradient,
        hybrid_steps=section.hybrid_steps,
        kernels=section.kernels,
        target_modules=section.target_modules,
        exclude_modules=section.skip_modules or None,
        rank_groups=section.rank_groups,
        identity=dict(identity or (start.config.identity if start else {})),
        rank_pattern=dict(start.config.rank_pattern) if start else {},
        storage_dtype=None if storage_dtype is None else str(storage_dtype).removeprefix("torch."),
        init_seed=seed,
        task_type="CAUSAL_LM",
    )
    if start is None:
        return get_peft_model(model, config)
    try:
        adapted = get_peft_model(model, config)
        start.load_into(adapted)
    except AdapterError as error:
        trained_on = start.config.base_model_name_or_path
        hint = f" ({trained_on})" if trained_on else ""
        raise AdapterError(f"{start.directory} cannot go on here: {error}{hint}") from None
    return adapted
