"""Pictures of a run, drawn from its metrics alone: `plots/loss.png`, `plots/gates.png`, `plots/expert_load.png`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from nsa_transformer.training.metrics import read_metrics

__all__ = ["write_plots"]

# Okabe and Ito's palette, which people with any common colour vision tell apart.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
BRANCHES = (("compressed", BLUE), ("selected", ORANGE), ("window", GREEN))
WIDTH, DPI = 10.0, 120  # inches and dots per inch: 1200 px

Rows = list[dict[str, Any]]


def write_plots(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Read `run_dir/metrics.jsonl`, write what it has data for into `run_dir/plots/`, and return the files written.

    `loss.png` needs a training or validation row, `gates.png` a validation row with `gate_means` ([[cmp, slc, win] per layer]),
    `expert_load.png` one of either kind with `expert_load` ([[share of the visits per expert] per MoE layer]). Raises
    `FileNotFoundError` without metrics.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    drawn = {"loss.png": _loss(rows), "gates.png": _gates(rows), "expert_load.png": _expert_load(rows)}
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            temporary = folder / f".tmp-{name}"
            figure.savefig(temporary, dpi=DPI)
            os.replace(temporary, folder / name)
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier run in this folder: not this run's
    return written


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def _tidy(axes: Any, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if xlabel == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 1.25
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number there."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _dot(steps: np.ndarray) -> str | None:
    """The marker of a curve: of a single point there is no line to be seen."""
    return "o" if len(steps) == 1 else None


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values around each, fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _loss(rows: Rows) -> Any:
    train, val = _series(rows, "loss"), _series(rows, "val_loss")
    if not len(train[0]) and not len(val[0]):
        return None
    figure = _figure(7.5)
    grid = figure.add_gridspec(2, 2, height_ratios=[2.2, 1])
    axes = figure.add_subplot(grid[0, :])
    _tidy(axes, "Loss", "step", "nats per token")
    if len(train[0]):
        window = len(train[0]) // 25 // 2 * 2 + 1  # odd: a value and as many on either side
        axes.plot(*train, color=BLUE, linewidth=0.8, alpha=0.35 if window > 1 else 1.0, marker=_dot(train[0]), label="training")
        if window > 1:
            axes.plot(train[0], _smooth(train[1], window), color=BLUE, linewidth=2, label=f"training, mean of {window} rows")
    if len(val[0]):
        axes.plot(*val, color=VERMILLION, linewidth=1, marker="o", markersize=5, label="validation")
        last = axes.annotate(f"{val[1][-1]:.3f}", (val[0][-1], val[1][-1]), xytext=(0, 11), textcoords="offset points", ha="center")
        last.set(color=VERMILLION, fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    values = np.concatenate([train[1], val[1]])
    _limits(axes, values)
    axes.legend(frameon=False, loc="upper right")

    bits = figure.add_subplot(grid[1, 0], sharex=axes)
    _tidy(bits, "Validation", "step", "bits per byte")
    bpb = _series(rows, "val_bpb")
    if not len(bpb[0]):
        bits.text(0.5, 0.5, "no validation", transform=bits.transAxes, ha="center", color=GREY)
    bits.plot(*bpb, color=VERMILLION, linewidth=1, marker="o", markersize=4)
    rate = figure.add_subplot(grid[1, 1], sharex=axes)
    _tidy(rate, "Learning rate", "step", "")
    rates = _series(rows, "lr")
    rate.plot(*rates, color=GREY, linewidth=1.5, marker=_dot(rates[0]))
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    return figure


def _limits(axes: Any, values: np.ndarray) -> None:
    """Room for every value but a few early spikes, which would flatten the rest of the curve."""
    low, high = float(values.min()), float(values.max())
    tail = values[len(values) // 10 :]
    if len(values) >= 50 and high - low > 4 * (np.quantile(tail, 0.99) - low):
        high = float(low + 2 * (np.quantile(tail, 0.99) - low))
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _steps_with(rows: Rows, key: str) -> Rows:
    return [row for row in rows if row.get(key)]


def _gates(rows: Rows) -> Any:
    rows = _steps_with(rows, "gate_means")
    if not rows:
        return None
    last = np.array(rows[-1]["gate_means"], dtype=float)  # [layers, 3]
    layers = np.arange(len(last))
    over_time = len(rows) > 1
    figure = _figure(7.5 if over_time else 4.5)
    grid = figure.add_gridspec(2 if over_time else 1, 3, height_ratios=[1.3, 1] if over_time else [1])
    bars = figure.add_subplot(grid[0, :])
    _tidy(bars, f"Mean gate per layer and branch, step {rows[-1]['step']}", "layer", "mean gate (0 … 1)")
    for index, (name, colour) in enumerate(BRANCHES):
        bars.bar(layers + (index - 1) * 0.27, last[:, index], width=0.25, color=colour, label=name)
    bars.set_ylim(0, max(1.0, float(np.nanmax(last))))
    bars.set_xlim(-0.6, len(layers) - 0.4)
    bars.set_xticks(layers if len(layers) <= 32 else layers[:: len(layers) // 16])
    bars.grid(False, axis="x")
    bars.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    if over_time:
        steps = np.array([row["step"] for row in rows])
        history = np.array([row["gate_means"] for row in rows], dtype=float)  # [rows, layers, 3]
        first = None
        for index, (name, colour) in enumerate(BRANCHES):
            axes = figure.add_subplot(grid[1, index], sharey=first)
            first = first or axes
            _tidy(axes, name, "step", "mean gate; thin: one layer" if index == 0 else "")
            axes.plot(steps, history[:, :, index], color=colour, linewidth=0.8, alpha=0.45)
            axes.plot(steps, history[:, :, index].mean(1), color=colour, linewidth=2.5)
            axes.set_ylim(0, 1)
    return figure


def _expert_load(rows: Rows) -> Any:
    with_load = _steps_with(rows, "expert_load")
    if not with_load:
        return None
    share = np.array(with_load[-1]["expert_load"], dtype=float)  # [MoE layers, experts]
    share = share / np.maximum(share.sum(1, keepdims=True), 1e-12)
    relative = share * share.shape[1]
    worst = _series(rows, "expert_load_max_over_mean")
    figure = _figure((4.2 if len(worst[0]) else 1.2) + min(max(0.28 * len(share), 1.8), 6))
    axes_list = figure.subplots(2 if len(worst[0]) else 1, 1, squeeze=False, height_ratios=[1.5, 1] if len(worst[0]) else [1])[:, 0]
    heat = axes_list[0]
    # Purple below and orange above an even share, white at it; a load beyond twice the mean keeps the darkest colour.
    image = heat.imshow(relative, aspect="auto", cmap="PuOr_r", vmin=0, vmax=2, interpolation="nearest")
    source = "validation" if "val_loss" in with_load[-1] else "training"
    title = f"Expert load of {source}, step {with_load[-1]['step']} (1 = even share, {share.shape[1]} experts)"
    if any(row.get("forced_balance") for row in rows):
        title += "\nforced balance: experts took turns, whatever the router said"
    heat.set_title(title, loc="left", fontsize=12, fontweight="bold")
    heat.set_xlabel("expert")
    heat.set_ylabel("MoE layer")
    heat.set_yticks(range(len(share)) if len(share) <= 24 else range(0, len(share), 4))
    if share.size <= 24 * 12 and share.shape[1] <= 24:
        for (row, column), value in np.ndenumerate(relative):
            heat.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(value - 1) > 0.7 else "black")
        heat.set_xticks(range(share.shape[1]))
    figure.colorbar(image, ax=heat, label="tokens / mean over experts", extend="max", pad=0.01)
    if len(worst[0]):
        axes = axes_list[1]
        layers = [(row["step"], row["expert_balance"]["max_over_mean"]) for row in rows if row.get("expert_balance")]
        _tidy(axes, f"Busiest expert over the mean (1 = balanced{'; thin: each layer' if layers else ''})", "step", "max / mean")
        if layers:
            steps, by_layer = zip(*layers, strict=True)
            axes.plot(steps, np.array(by_layer, dtype=float), color=BLUE, linewidth=0.8, alpha=0.45, marker=_dot(np.array(steps)))
        axes.plot(*worst, color=BLUE, linewidth=2, marker=_dot(worst[0]))
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        axes.set_ylim(0.9, max(1.5, 1.05 * float(worst[1].max())))
    return figure
