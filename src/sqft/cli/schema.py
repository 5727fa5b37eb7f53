"""`sqft schema`."""

__all__ = ["schema"]


def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    import json

    from sqft.pipeline.recipe_file import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
