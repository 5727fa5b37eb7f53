"""Recipes, and running them: the only place where packages meet and directories have meaning."""

from sqft.pipeline.plan import Plan, plan_recipe
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.recipe_file import load_recipe, parse_recipe, recipe_schema
from sqft.pipeline.results import RunResult
from sqft.pipeline.run import run_recipe, workspace_status

__all__ = [
    "Plan",
    "Recipe",
    "RunResult",
    "load_recipe",
    "parse_recipe",
    "plan_recipe",
    "recipe_schema",
    "run_recipe",
    "workspace_status",
]
