"""`sqft bench`."""

from pathlib import Path
from typing import Annotated

import typer

from sqft.cli.options import AsJson, print_json

__all__ = ["bench"]


def bench(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Model directories, GGUF files or OpenVINO models."),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(help="Also run the first one with this plain LoRA, unmerged (for GGUF one in GGUF)."),
    ] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Run GGUF files also with our kernels for sparse Q4_0 weights.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure size, time to first token, decode speed and peak memory, in turn, in each one's runtime."""
    from sqft.cli.messages import RichProgress
    from sqft.cli.tables import print_table
    from sqft.report.summary import format_bytes
    from sqft.runtimes.commands import RUNTIME_ZEROS
    from sqft.runtimes.speed import measure_speed, open_artefact

    artefacts = [open_artefact(path) for path in directories]
    if sparse:
        files = [artefact for artefact in artefacts if artefact.runtime == "llama.cpp"]
        artefacts += [open_artefact(file.path, file.name, packed_products=True) for file in files]
    if adapter is not None:
        first = directories[0]
        both = f"{first.resolve().name} + {adapter.resolve().name} (unmerged)"
        artefacts.append(open_artefact(first, both, adapter))
    with RichProgress() as progress:
        results = measure_speed(
            artefacts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(results)
        return
    rows = [
        [
            row.name,
            row.runtime,
            format_bytes(row.size_bytes),
            f"{row.first_token_seconds * 1000:.0f} ms",
            f"{row.decode_speed:.1f}",
            format_bytes(row.peak_bytes),
        ]
        for row in results
    ]
    print_table(["artefact", "runtime", "size", "first token", "tokens/s", "peak memory"], rows, left=2)
    for runtime in sorted({row.runtime for row in results}):
        print(f"zeros in {runtime}: {RUNTIME_ZEROS[runtime]}")
