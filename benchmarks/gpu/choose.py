"""Fill the table of kernels from measured results: `python -m benchmarks.gpu.choose FILE`.

Rows of the card's compute capability in src/sqft/kernels/choices.json are replaced by those of FILE, which
`make gpu` wrote; rows of other cards stay. `git diff` shows what changed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sqft.artifacts import write_json
from sqft.kernels import choices

__all__ = ["main", "merge_results"]

TABLE = Path(choices.__file__).with_name("choices.json")


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the JSON that make gpu wrote")
    result = json.loads(parser.parse_args().file.read_text(encoding="utf-8"))
    if result["dry"]:
        sys.exit("these are the results of a dry run; they say nothing of a card")
    table = merge_results(json.loads(TABLE.read_text(encoding="utf-8")), result)
    if table is None:
        sys.exit("no layer was measured; run the part layers again")
    write_json(TABLE, table)
    print(f"{TABLE}: {len(table['rows'])} rows")


def merge_results(table: dict[str, Any], result: dict[str, Any]) -> dict[str, Any] | None:
    """The table with the rows of a result; None if the result has none."""
    measured = [row["values"] for row in result["parts"].get("layers", {}).get("rows", []) if "values" in row]
    rows = [values["table_row"] for values in measured if "table_row" in values]
    if not rows:
        return None
    capabilities = {row["capability"] for row in rows}
    card = result["environment"]["gpu"]
    loss = dict(table["loss"])
    for values in measured:
        if "liger_ms" in values and "torch_ms" in values:
            faster = "liger" if values["liger_ms"] < values["torch_ms"] else "torch"
            loss[values["capability"]] = faster
    return {
        "measured_on": sorted({*table["measured_on"], card}),
        "rows": [row for row in table["rows"] if row["capability"] not in capabilities] + rows,
        "loss": loss,
    }


if __name__ == "__main__":
    main()
