"""The plots of the page, as SVG that takes its text and line colours from the page.

Matplotlib draws with placeholder colours; they are replaced by CSS variables, so that one file suits light
and dark screens. No pyplot: nothing global is touched but rcParams, inside a context.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from sqft.report.content import LayerRow, ReportData
from sqft.report.summary import label_model, loss_unit

__all__ = ["Plot", "draw_plots", "render_plot"]

INK, RULE, FAINT = "#010203", "#040506", "#070809"
CSS = {INK: "var(--ink)", RULE: "var(--rule)", FAINT: "var(--faint)"}
PALETTE = ("#3f7fbf", "#d9822b", "#2f9e76", "#c2543c", "#8d6cb0", "#8a8d3b", "#b0678f", "#5b9fb5")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
WIDTH = 4.8  # inches: the page shows plots at this size, and a phone shrinks them by a fifth


class Plot:
    """A finished plot: its title, what it shows in words, and the SVG."""

    def __init__(self, title: str, caption: str, svg: str) -> None:
        self.title, self.caption, self.svg = title, caption, svg


def draw_plots(data: ReportData) -> list[Plot]:
    """Every plot that the data allows, in the order of the page."""
    accuracy = "Share of the held-out items answered right, with 95 % intervals."
    if data.chance_accuracy is not None:
        accuracy += f" Dotted: guessing ({100 * data.chance_accuracy:.0f} %)."
    unit = loss_unit(among_choices=data.among_choices)
    candidates: list[tuple[bool, str, str, float, Callable[[Any], None]]] = [
        (
            any(row.accuracy is not None for row in data.models),
            "Accuracy",
            accuracy,
            _stage_height(data),
            lambda figure: _draw_stages(figure, data, "accuracy"),
        ),
        (
            any(row.loss is not None for row in data.models),
            "Loss",
            f"{unit} (lower is better), with 95 % intervals.".capitalize(),
            _stage_height(data),
            lambda figure: _draw_stages(figure, data, "loss"),
        ),
        (
            len(data.training) > 1,
            "Training loss",
            "Thin: every optimizer step. Thick: running mean. Dots: the search items, which are not trained "
            "on. With elastic ranks each step trains another sub-adapter.",
            2.8,
            lambda figure: _draw_training(figure, data),
        ),
        (
            any(layer.sparsity is not None for layer in data.layers),
            "Sparsity per layer",
            "Share of zeros in every linear layer, block by block.",
            3.1,
            lambda figure: _draw_layers(figure, data.layers, "sparsity"),
        ),
        (
            any(layer.error is not None for layer in data.layers),
            "Compression error per layer",
            "Squared difference of a layer's output from the dense layer's, relative to that output.",
            3.1,
            lambda figure: _draw_layers(figure, data.layers, "error"),
        ),
        (
            bool(data.ranks),
            "Rank per layer",
            "The rank that each rank group has in the chosen sub-adapter.",
            2.3,
            lambda figure: _draw_ranks(figure, data.ranks),
        ),
    ]
    return [
        render_plot(title, caption, height, draw)
        for there, title, caption, height, draw in candidates
        if there
    ]


def render_plot(title: str, caption: str, height: float, draw: Callable[[Any], None]) -> Plot:
    """A plot of this height in inches, out of what `draw` puts on a Matplotlib figure."""
    return Plot(title, caption, _render(draw, height, f"{title}. {caption}"))


def _render(draw: Callable[[Any], None], height: float, description: str) -> str:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sqft",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.prop_cycle": cycler(color=list(PALETTE)),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _adapt(buffer.getvalue(), description)


def _adapt(svg: str, description: str) -> str:
    """Keep only the <svg> element, give it a label, and let the page choose its colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: (\d+px) [^;"]*', rf"font: \1 {FONT}", svg)
    svg = re.sub(r'font-family: [^;"]*', f"font-family: {FONT}", svg)
    for placeholder, variable in CSS.items():
        svg = svg.replace(placeholder, variable)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _stage_height(data: ReportData) -> float:
    return 0.9 + 0.36 * len(data.models)


def _draw_stages(figure: Any, data: ReportData, quantity: str) -> None:
    axes = figure.subplots()
    factor = 100.0 if quantity == "accuracy" else 1.0
    rows = [row for row in data.models if getattr(row, quantity) is not None]
    for place, row in enumerate(rows):
        value = getattr(row, quantity) * factor
        low, high = getattr(row, f"{quantity}_low"), getattr(row, f"{quantity}_high")
        colour = _stage_colour(row.name)
        if low is not None and high is not None:
            axes.plot([low * factor, high * factor], [place, place], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot([value], [place], "o", color=colour, markersize=7)
        axes.annotate(
            f"{value:.1f}" if quantity == "accuracy" else f"{value:.2f}",
            (value, place),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [label_model(row, data.recipe) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    if quantity == "accuracy":
        axes.set_xlabel("% right")
        if data.chance_accuracy is not None:
            axes.axvline(100 * data.chance_accuracy, color=INK, linestyle=":", linewidth=1)
        axes.set_xlim(left=0, right=min(103.0, axes.get_xlim()[1]))
    else:
        axes.set_xlabel(loss_unit(among_choices=data.among_choices))
        axes.set_xlim(left=0)


def _stage_colour(name: str) -> str:
    order = ("base", "tuned", "dense_tuned", "sparse", "quantized", "reconstructed", "merged", "adapted")
    colours = (*(PALETTE[number] for number in (0, 4, 4, 1, 3, 3, 2, 2)),)
    return dict(zip(order, colours, strict=True)).get(name, PALETTE[5])


def _draw_training(figure: Any, data: ReportData) -> None:
    axes = figure.subplots()
    steps = [step for step, _ in data.training]
    losses = [loss for _, loss in data.training]
    axes.plot(steps, losses, color=PALETTE[0], linewidth=0.8, alpha=0.45)
    axes.plot(steps, _running_mean(losses, len(losses) // 25), color=PALETTE[0], linewidth=2)
    if data.eval_losses and not data.among_choices:  # of choices it is another quantity
        axes.plot(
            *zip(*data.eval_losses, strict=True), color=PALETTE[1], marker="o", markersize=4, linewidth=1
        )
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and its neighbours, `width` to either side."""
    windows = (values[max(0, i - width) : i + width + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _draw_layers(figure: Any, layers: list[LayerRow], quantity: str) -> None:
    axes = figure.subplots()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        value = getattr(layer, quantity)
        if value is not None:
            block, kind = _split_name(layer.name)
            kinds.setdefault(kind.rsplit(".", 1)[-1], []).append((block, value))
    for kind, points in kinds.items():
        points.sort()
        scale = 100 if quantity == "sparsity" else 1
        axes.plot(
            [block for block, _ in points],
            [scale * value for _, value in points],
            marker="o",
            markersize=3.5,
            linewidth=1,
            alpha=0.85,
            label=kind,
        )
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if quantity == "sparsity":
        axes.set_ylabel("% zeros")
        axes.set_ylim(-3, 103)
    else:
        axes.set_ylabel("relative error")
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.2, columnspacing=1.2)


def _draw_ranks(figure: Any, ranks: dict[str, int]) -> None:
    """A heat map with a column for each block and a row for each kind of rank group."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    cells = {_split_name(group): rank for group, rank in ranks.items()}
    blocks = sorted({block for block, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    levels = sorted(set(ranks.values()))
    axes = figure.subplots()
    grid = [[levels.index(cells[b, k]) if (b, k) in cells else float("nan") for b in blocks] for k in kinds]
    ramp = ("#bcd7ee", "#86b6dd", "#3f7fbf", "#265a8f", "#143a61")
    shades = [ramp[round(i * (len(ramp) - 1) / max(1, len(levels) - 1))] for i in range(len(levels))]
    norm = BoundaryNorm([i - 0.5 for i in range(len(levels) + 1)], len(levels)) if len(levels) > 1 else None
    axes.pcolormesh(
        [b - 0.5 for b in [*blocks, blocks[-1] + 1]],
        range(len(kinds) + 1),
        grid,
        cmap=ListedColormap(shades),
        norm=norm,
        edgecolor=FAINT,
        linewidth=0.6,
    )
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], [kind.rsplit(".", 1)[-1] for kind in kinds])
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    from matplotlib.patches import Patch

    handles = [Patch(color=shade, label=f"rank {level}") for shade, level in zip(shades, levels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(levels)), handlelength=1)


def _split_name(name: str) -> tuple[int, str]:
    """'model.layers.3.self_attn.q_proj' → (3, 'self_attn.q_proj'); block 0 where there is no number."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[place + 1 :]) or name
    return 0, name
