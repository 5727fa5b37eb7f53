"""What MkDocs does beyond its configuration: pages from outside docs/, and one page a package of the API.

The same Markdown is read in a clone and on the site. A link that leaves docs/ leads to the page that the
site has of that file, and is plain text where it has none.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sqft"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
# Files outside docs/ that are pages of the site. The paths are as seen from docs/.
OUTSIDE = {
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../recipes/README.md": "recipes.md",
}


def packages() -> list[str]:
    """The packages of sqft that export names."""
    return sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


def exported(package: str) -> list[str]:
    """The names in a package's `__all__`, read without importing it."""
    tree = ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def api_page(package: str) -> str:
    """The page of one package, to be filled by mkdocstrings."""
    members = "".join(f"\n        - {name}" for name in exported(package))
    return f"# sqft.{package}\n\n::: sqft.{package}\n    options:\n      members:{members}\n"


def recipes_page() -> str:
    """recipes/README.md, followed by the recipes themselves."""
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text += f"\n## {path.name}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
    return text


def rewrite_links(text: str, origin: str) -> str:
    """Links of the file `origin` (its path as seen from docs/) as the site's page needs them."""
    page = OUTSIDE.get(origin, origin)

    def change(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        place = OUTSIDE.get(place, place)
        if place.startswith(".."):
            return label
        target = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"[{label}]({target}{'#' + anchor if anchor else ''})"

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(change, part) for part in blocks)


def on_config(config: Any) -> Any:
    """Complete the navigation: parts that list all files of a kind, and pages that it does not name yet."""
    fill(
        config.nav,
        {
            "Python API": ["api/index.md", *(f"api/{package}.md" for package in packages())],
            "Results": pages_of("results"),
            "Decisions": ["decisions/README.md", *pages_of("decisions")],
        },
    )
    listed = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    for title, folder in (("Tutorials", "tutorials"), ("How-to", "how-to"), ("Reference", "")):
        missing = [page for page in pages_of(folder) if page not in listed]
        for entry in config.nav:
            entry.get(title, []).extend(missing)
    return config


def pages_of(folder: str) -> list[str]:
    """The pages of a folder of docs/, its README apart."""
    found = (path for path in (ROOT / "docs" / folder).glob("*.md") if path.stem != "README")
    return sorted(path.relative_to(ROOT / "docs").as_posix() for path in found)


def fill(entries: list[Any], lists: dict[str, list[str]]) -> None:
    """Give every entry of the navigation that has a list its pages, at any depth."""
    for entry in entries:
        for title, inside in entry.items() if isinstance(entry, dict) else ():
            if title in lists:
                entry[title] = list(lists[title])
            elif isinstance(inside, list):
                fill(inside, lists)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/."""
    pages = {f"api/{package}.md": api_page(package) for package in packages()}
    for origin, page in OUTSIDE.items():
        text = recipes_page() if page == "recipes.md" else (ROOT / origin[3:]).read_text(encoding="utf-8")
        pages[page] = rewrite_links(text, origin)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Redirect links that leave docs/."""
    if page.file.generated_by:
        return markdown
    return rewrite_links(markdown, page.file.src_uri)
