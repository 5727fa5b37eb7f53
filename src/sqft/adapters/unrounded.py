"""What a training needs of scales and norms beyond what is served: their changes before rounding.

An adapter on disk holds trained scales and norms as they are stored in the merged model. A training that goes
on from there would lose what lies between two of those numbers, so a checkpoint keeps the changes as well.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft.artifacts import UNROUNDED
from sqft.errors import AdapterError

__all__ = ["check_trained", "load_unrounded", "save_unrounded", "trained_in_place"]

PARTS = ("sqft_scale", "sqft_norm")


def trained_in_place(model: nn.Module, part: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of trained scales ("sqft_scale") and norms ("sqft_norm"), by full name."""
    wanted = PARTS if part is None else (part,)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(f".{kind}." in name for kind in wanted)
    }


def save_unrounded(model: nn.Module, checkpoint: Path) -> None:
    """Write the changes of trained scales and norms beside an adapter, if there are any."""
    tensors = {name: parameter.detach().cpu() for name, parameter in trained_in_place(model).items()}
    if tensors:
        save_file(tensors, checkpoint / UNROUNDED)


def load_unrounded(model: nn.Module, checkpoint: Path) -> None:
    """Put the changes of a checkpoint in the place of what its adapter gave.

    Raises: AdapterError if they are not those of this model.
    """
    parameters = trained_in_place(model)
    if not parameters:
        return
    path = checkpoint / UNROUNDED
    tensors: dict[str, Tensor] = load_file(path) if path.is_file() else {}
    if set(tensors) != set(parameters):
        raise AdapterError(f"{path} does not hold the scales and norms of this training; start it anew")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_trained(model: nn.Module) -> None:
    """Raises: AdapterError if a trained scale is not a positive number, or a trained norm is not finite."""
    scales, norms = trained_in_place(model, "sqft_scale"), trained_in_place(model, "sqft_norm")
    for parameters, least, kind in ((scales, -1.0, "scales"), (norms, -torch.inf, "weights")):
        if not parameters:
            continue
        changes = [parameter.detach() for parameter in parameters.values()]
        low, high = (torch.stack(t) for t in ([c.amin() for c in changes], [c.amax() for c in changes]))
        wrong = ~((low > least) & (high < torch.inf))
        if bool(wrong.any()):
            name = list(parameters)[int(wrong.nonzero()[0])].rpartition(".sqft_")[0].split("model.", 1)[-1]
            state = "not a number" if bool((low + high).isnan().any()) else "zero, negative or infinite"
            raise AdapterError(f"trained {kind} of {name} are {state}")
