"""The pages' templates, found inside the package."""

from typing import Any

__all__ = ["render_template"]


def render_template(name: str, **values: Any) -> str:
    """An HTML page that needs no other file and no network; every text in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sqft", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(f"{name}.html.jinja").render(**values)
