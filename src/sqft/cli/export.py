"""`sqft export`."""

from pathlib import Path
from typing import Annotated

import typer

from sqft.cli.options import AsJson, print_json

__all__ = ["export"]

FILE_ENDS = (".gguf", ".safetensors", ".xml")


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A merged model, or a plain LoRA adapter.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--to", help="compressed-tensors, gptq, safetensors, safetensors-float32, gguf or openvino."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Where to write; default DIR-FORMAT.")] = None,
    head: Annotated[
        str, typer.Option(help="gguf: type of embedding and head: auto (exact), f16, bf16, f32 or q8_0.")
    ] = "auto",
    base: Annotated[
        Path | None, typer.Option(help="For an adapter: the model it belongs to; --to is peft or gguf.")
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Change the grid where the format needs it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in the format of a runtime, open it there, and compare codes and logits."""
    from sqft.cli.messages import RichProgress
    from sqft.cli.tables import print_table
    from sqft.errors import ExportError
    from sqft.export import export_adapter, export_model
    from sqft.export.adapter_export import adapter_serving
    from sqft.report.summary import format_bytes

    if output is not None and output.suffix in FILE_ENDS:
        raise ExportError(
            f"--output {output} is a folder that gets several files; name it without {output.suffix}"
        )
    output = output or directory.with_name(f"{directory.resolve().name}-{format}")
    if (directory / "adapter_config.json").is_file():
        print(f"written: {export_adapter(directory, base, format, output)}")
        print("read back: equal to the adapter; not run")
        for line in adapter_serving(format, output, base):
            print(line)
        return
    with RichProgress() as progress:
        result = export_model(
            directory, format, output, allow_requantize=allow_requantize, head_type=head, progress=progress
        )
    if as_json:
        print_json(result.as_dict())
        return
    codes, logits, damage = result.code_comparison, result.logit_comparison, result.damage
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.tensor_types.items()))
    rows = [
        ["written", f"{result.directory} ({format_bytes(result.size_bytes)})"],
        ["tensors", kinds],
        ["embedding, head", result.head_type],
        ["codes changed", f"{codes.changed} of {codes.codes}"],
        ["other weights changed", f"{codes.weights_changed} of {codes.weights}"],
    ]
    if damage is not None:
        share = f"relative error {damage.relative_error:.4f}"
        changed = f"{damage.changed} of {damage.weights} weights changed, {share}"
        rows.append([f"requantized to {damage.grid}", changed])
    if logits is None:
        rows.append(["run", "no: no runtime of this format runs here; its fields were checked"])
    else:
        share = (
            "" if logits.largest_share is None else f"largest logit difference {logits.largest_share:.1e}, "
        )
        rows.append(
            [f"run in {logits.runtime}", f"{share}KL {logits.kl:.1e} nats, same top token {logits.top1:.1%}"]
        )
    print_table(["export", format], rows, left=2)
    for line in result.serve:
        print(line)
