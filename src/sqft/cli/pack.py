"""`sqft pack` and `sqft unpack`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pack", "unpack"]


def pack(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A sparse model on an integer grid.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default DIR-packed.")] = None,
    zstd: Annotated[
        bool, typer.Option("--zstd", help="Compress the weights once more, for a download.")
    ] = False,
) -> None:
    """Write a model so that pruned weights take no space; `sqft unpack` gives every file back bit for bit.

    transformers opens a packed directory after `import sqft.runtimes.packed`, and decodes from it directly.
    """
    from sqft.cli.messages import RichProgress
    from sqft.cli.tables import print_table
    from sqft.errors import require
    from sqft.formats.packed import pack_model
    from sqft.formats.packed_download import compress_packed
    from sqft.report.summary import format_bytes

    if zstd:
        require("zstandard", "zstd")
    output = output or directory.with_name(f"{directory.resolve().name}-packed")
    with RichProgress() as progress:
        result = pack_model(directory, output, progress)
        if zstd:
            compress_packed(output, output)
    written = sum(path.stat().st_size for path in output.iterdir() if path.name.startswith("packed"))
    before, packed = result.bytes_before, result.bytes_after
    rows = [
        ["written", str(output)],
        ["packed", f"{result.linears} linears, {result.kept / result.weights:.1%} of their weights kept"],
        ["weights and masks", f"{format_bytes(before)} before, {format_bytes(packed)} packed"],
    ]
    if zstd:
        rows.append(["compressed", format_bytes(written)])
    rows.append(["checked", "every file comes back bit for bit"])
    print_table(["pack", ""], rows, left=2)


def unpack(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What sqft pack wrote.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default DIR-unpacked.")] = None,
    format: Annotated[
        str,
        typer.Option(
            "--to",
            help="original: the directory that was packed; packed: without --zstd; or a format of export.",
        ),
    ] = "original",
) -> None:
    """Write the model that was packed, every file as it was; or what else it is wanted as."""
    from sqft.cli.export import export
    from sqft.cli.messages import RichProgress
    from sqft.errors import ExportError
    from sqft.export.table import FORMATS
    from sqft.formats.packed import unpack_model
    from sqft.formats.packed_download import expand_packed, is_compressed

    if format not in ("original", "packed", *FORMATS):
        raise ExportError(f"format '{format}' is unknown; choose from original, packed, {', '.join(FORMATS)}")
    end = "unpacked" if format == "original" else format
    output = output or directory.with_name(f"{directory.resolve().name.removesuffix('-packed')}-{end}")
    if format == "packed":
        if not is_compressed(directory):
            raise ExportError(f"{directory} is not compressed; it can be used as it is")
        expand_packed(directory, output)
        print(f"written: {output}")
        return
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".sqft-") as work:
        packed, original = directory, output
        if is_compressed(directory):
            packed = Path(work) / "packed"
            expand_packed(directory, packed)
        if format != "original":
            original = Path(work) / directory.name
        with RichProgress() as progress:
            unpack_model(packed, original, progress)
        if format != "original":
            export(original, format, output)
            return
    print(f"written: {output}, every file as it was packed")
