"""Quality against size and against sparsity, one point a model with its interval."""

import math
from collections.abc import Callable
from typing import Any

from sqft.report.comparison import (
    ComparedRow,
    ComparisonData,
    is_share,
)
from sqft.report.plots import INK, PALETTE, Plot, render_plot

__all__ = ["draw_frontier"]

SAME = 0.01  # sizes and sparsities this near to each other are one
MOST_NAMES = 12  # points that carry their name; more would cover each other


def draw_frontier(data: ComparisonData) -> list[Plot]:
    """Every measure against bytes and against sparsity, where models differ in them."""
    sides: list[tuple[str, str, Callable[[ComparedRow], float | None]]] = [
        ("size", "MB on disk", lambda row: None if row.size_bytes is None else row.size_bytes / 1e6),
        ("sparsity", "% zeros", lambda row: None if row.sparsity is None else 100 * row.sparsity),
    ]
    plots = []
    for measure in data.measures:
        better = "higher" if is_share(measure) else "lower"
        for side, unit, value_of in sides:
            points = [(value_of(row), row) for row in data.rows if measure in row.figures]
            there = [(value, row) for value, row in points if value is not None]
            values = [value for value, _ in there]
            if not values or max(values) - min(values) < SAME * max(values):
                continue
            caption = f"With 95 % intervals; {better} is better. Dotted: {data.reference}."
            title = f"{measure[:1].upper()}{measure[1:]} against {side}"
            plots.append(
                render_plot(
                    title,
                    caption,
                    3.2,
                    lambda figure, there=there, measure=measure, unit=unit: _draw(  # type: ignore[misc]
                        figure, data, measure, unit, there
                    ),
                )
            )
    return plots


def _draw(
    figure: Any, data: ComparisonData, measure: str, unit: str, points: list[tuple[float, ComparedRow]]
) -> None:
    axes = figure.subplots()
    factor = 100.0 if is_share(measure) else 1.0
    for place, (x, row) in enumerate(points):
        found, colour = row.figures[measure], PALETTE[place % len(PALETTE)]
        if math.isfinite(found.low) and math.isfinite(found.high):
            axes.plot(
                [x, x], [factor * found.low, factor * found.high], color=colour, linewidth=2, alpha=0.55
            )
        axes.plot([x], [factor * found.value], "o", color=colour, markersize=6)
        if len(points) <= MOST_NAMES:
            axes.annotate(
                row.label,
                (x, factor * found.value),
                xytext=(6, 3),
                textcoords="offset points",
                fontsize=8,
            )
        if row.label == data.reference:
            axes.axhline(factor * found.value, color=INK, linestyle=":", linewidth=1)
    axes.set_xlabel(unit)
    axes.set_ylabel("% right" if is_share(measure) else data.loss_unit if measure == "loss" else "nats")
    axes.margins(x=0.18, y=0.12)
