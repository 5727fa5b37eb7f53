"""Rewrite the parts of the documentation that are made from the code and from measured reports.

python docs/generate.py           docs/recipe.md; the diagram of packages in docs/architecture.md; the
                                  tables of docs/families.md and docs/results/paper-small.md, the latter
                                  with what `sqft reproduce --scale small` measured in runs/; the demo's
                                  table in README.md if runs/demo-full or runs/demo holds a report
python docs/generate.py --check   exit with 1 if all but the last are not what the code says
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

from sqft.pipeline.recipe_file import recipe_schema
from sqft.pipeline.reproduction import experiment_names, experiment_table, load_experiment
from sqft.report import ReportData, markdown_table, read_report
from sqft.report import comparison as comparisons
from sqft.report.summary import format_seconds

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sqft"
BEGIN, END = "<!-- demo table: begin -->", "<!-- demo table: end -->"
PACKAGES = "<!-- packages: begin -->", "<!-- packages: end -->"
INTRODUCTION = """\
# Recipe

<!-- Written by docs/generate.py (make docs) from the schema; edit the sections in src/sqft/sections/. -->

A recipe is one YAML file. Only `model` is required; a section that is not there is a step that is not made.
Unknown keys are refused, and every error is told at once, with its path. `sqft schema` prints the JSON
schema, with which editors complete and check recipes. On the command line, `section.key=value` changes a
setting: `sqft run recipe.yaml sparsify.sparsity=0.6`.

Steps always run in this order: tune, sparsify, quantize, reconstruct, train, search, merge, evaluate, export,
report.
"""

FAMILIES = """\
# Model families

<!-- Written by docs/generate.py (make docs) from docs/results/families.json. -->

Tiny random models of each family, by transformers' model type: Wanda to 50 % zeros, GPTQ to INT4 in groups of
32, 5 steps of `qa_sparse_peft` on all linears, search, merge with its certificate. *In transformers*: the
largest difference of the merged model's logits between transformers' own reading and float32 here, as a share
of the largest logit. *In llama.cpp*: the GGUF file holds every code unchanged, and the divergence of its
probabilities in nats, which float16 activations and caches leave even of a Llama.

`python -m benchmarks.families` measures it; `make test-slow` runs every family again. Another family
whose blocks are one uniform list of modules with linears may work too; what `sqft plan` refuses, it
refuses with the reason.
"""


def render_recipe() -> str:
    """docs/recipe.md."""
    schema = recipe_schema()
    sections: list[tuple[str, dict[str, Any]]] = []
    lines = [INTRODUCTION, "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        section = _section(field, schema)
        if section is not None:
            sections.append((name, section))
            required = "required" if name in schema.get("required", []) else "none"
            default = "see below" if name == "runtime" else required
            lines.append(f"| `{name}` | [section](#{name}) | {default} | {_text(section)} |")
        else:
            lines.append(_row(name, field, schema))
    for name, section in sections:
        lines += ["", f"## {name}", "", str(section.get("description", "")), ""]
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in section["properties"].items():
            lines.append(_row(key, field, section))
    return "\n".join(lines) + "\n"


def package_imports() -> dict[str, set[str]]:
    """What every package, and every module beside them, imports of the others."""
    graph: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        mine = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if mine.startswith("__"):
            continue
        names = graph.setdefault(mine, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                from_top = node.module == "sqft"
                modules = [f"sqft.{alias.name}" for alias in node.names] if from_top else [node.module]
            else:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names |= {module.split(".")[1] for module in modules if module.startswith("sqft.")}
    return {name: found & graph.keys() - {name} for name, found in graph.items()}


def render_packages(graph: dict[str, set[str]]) -> str:
    """A diagram with an arrow from each package to those it imports, if not through another one already."""

    def reached(name: str) -> set[str]:
        return graph[name].union(*(reached(other) for other in graph[name]))

    lines = [PACKAGES[0], "```mermaid", "flowchart TD"]
    for name in sorted(graph):
        through = set().union(*(reached(other) for other in graph[name]))
        direct = sorted(graph[name] - through)
        lines += [f"    {name} --> {' & '.join(direct)}"] if direct else []
    return "\n".join([*lines, "```", PACKAGES[1]])


def render_demo(data: ReportData) -> str:
    """The table of the demo, with what a reader needs to judge it."""
    verdict = {None: "no certificate", True: "certificate passed", False: "certificate FAILED"}[data.passed]
    facts = [
        f"`{data.name}`, seed {data.recipe.get('seed', 0)}",
        "in brackets 95 % intervals over the held-out items",
        verdict,
        f"{format_seconds(data.elapsed_seconds)} in all",
        *(f"{name} {data.versions[name]}" for name in ("torch", "transformers") if name in data.versions),
    ]
    return "\n".join([BEGIN, markdown_table(data), "", "; ".join(facts) + ".", END])


def _section(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    for option in [field, *field.get("anyOf", []), *field.get("allOf", [])]:
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            return found if "properties" in found else None
    return None


def _row(name: str, field: dict[str, Any], parent: dict[str, Any]) -> str:
    default = "required" if name in parent.get("required", []) else f"`{_yaml(field.get('default'))}`"
    return f"| `{name}` | {_kind(field)} | {default} | {_text(field)} |"


def _kind(field: dict[str, Any]) -> str:
    """A JSON schema type in words."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type", "value")
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in bounds.items() if key in field]
    return " ".join([words.get(kind, "mapping"), *limits])


def _yaml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return str(value) if value != "" else "''"


def _text(field: dict[str, Any]) -> str:
    return " ".join(str(field.get("description", "")).split()).replace("|", "\\|")


def replace_demo(readme: str, table: str) -> str:
    """The README with its generated block exchanged."""
    return replace_block(readme, table, BEGIN, END)


def replace_block(text: str, block: str, begin: str, end: str) -> str:
    """A text with what stands between two marks exchanged, the marks included."""
    before, rest = text.split(begin)
    return before + block + rest.split(end)[1]


def render_architecture(current: str) -> str:
    """docs/architecture.md with the diagram of the packages as they are."""
    return replace_block(current, render_packages(package_imports()), *PACKAGES)


def render_families(report: dict[str, Any]) -> str:
    """docs/families.md, from what `benchmarks.families` measured."""
    lines = [
        FAMILIES,
        "| family | through the pipeline | in transformers | in llama.cpp |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        through = "yes" if row.get("certificate") else f"no: {row['refused']}"
        served = f"{row['transformers']:.1e}" if "transformers" in row else ""
        runs = f"KL {row['llama.cpp']:.0e}" if "llama.cpp" in row else row.get("gguf", "").partition(" (")[0]
        lines.append(f"| `{row['family']}` | {through} | {served} | {runs} |")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join([*lines, "", f"Measured with {versions}."]) + "\n"


def collect_experiments(measured: dict[str, Any]) -> dict[str, Any]:
    """The tables of the small experiments: as they were kept, and anew where runs/ has the experiment."""
    tables = {}
    for name in experiment_names("small"):
        made = ROOT / "runs" / f"{name}-small" / "table.json"
        empty = experiment_table(name, "small", load_experiment(name, "small", Path("data")), ROOT / "none")
        kept = json.loads(made.read_text(encoding="utf-8"))["table"] if made.is_file() else measured.get(name)
        tables[name] = kept or empty
    return tables


def render_experiments(page: str, tables: dict[str, Any]) -> str:
    """docs/results/paper-small.md with the tables of the experiments."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        block = f"{begin}\n{comparisons.markdown_table(table)}\n{end}"
        page = replace_block(page, block, begin, end)
    return page


def main(arguments: list[str]) -> int:
    """Write, or with --check compare."""
    architecture = ROOT / "docs" / "architecture.md"
    families = ROOT / "docs" / "results" / "families.json"
    paper = ROOT / "docs" / "results" / "paper-small.md"
    kept = json.loads(paper.with_suffix(".json").read_text(encoding="utf-8"))
    tables = kept if "--check" in arguments else collect_experiments(kept)
    documents = {
        ROOT / "docs" / "families.md": render_families(json.loads(families.read_text(encoding="utf-8"))),
        ROOT / "docs" / "recipe.md": render_recipe(),
        architecture: render_architecture(architecture.read_text(encoding="utf-8")),
        paper: render_experiments(paper.read_text(encoding="utf-8"), tables),
        paper.with_suffix(".json"): json.dumps(tables, indent=1, ensure_ascii=False) + "\n",
    }
    if "--check" in arguments:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in documents.items()))
    for path, text in documents.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    readme = ROOT / "README.md"
    for results in (ROOT / "runs" / "demo-full", ROOT / "runs" / "demo"):
        if (results / "report.json").exists():
            text = replace_demo(readme.read_text(encoding="utf-8"), render_demo(read_report(results)))
            readme.write_text(text, encoding="utf-8")
            print(f"wrote the table in README.md from {results.relative_to(ROOT)}")
            break
    else:
        print("no report of the demo; README.md keeps its table")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
