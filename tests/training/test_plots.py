from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_transformer.training.plots import _expert_load, _limits, _loss, _smooth, write_plots

pytest.importorskip("matplotlib")


def rows(steps: int, layers: int = 3, experts: int = 4) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append({"step": step, "loss": 5.0 / step + 2, "lr": 1e-3, "mfu": None} | ({"expert_load_max_over_mean": 1.5} if experts else {}))
    val: dict[str, Any] = {"step": steps, "val_loss": 2.0, "val_bpb": 1.0, "gate_means": [[0.2, 0.5, 0.7]] * layers}
    return [*found, val | ({"expert_load": [[1 / experts] * experts] * (layers - 1)} if experts else {})]


def plot(folder: Path, data: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Width and height in pixels of each file, from its PNG header."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    found = {}
    for path in write_plots(folder):
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        found[path.name] = (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big"))
    assert sorted(found) == sorted(path.name for path in (folder / "plots").iterdir())
    return found


def test_a_run_with_experts_has_three_plots(tmp_path: Path) -> None:
    sizes = plot(tmp_path, rows(60) + rows(70)[-1:])
    assert list(sizes) == ["loss.png", "gates.png", "expert_load.png"]
    assert all(width == 1200 for width, _ in sizes.values())


def test_the_heat_map_is_of_the_newest_load(tmp_path: Path) -> None:
    """Rows of training bring a load and the balance of each layer as well."""
    train = [{"step": s, "loss": 2.0, "expert_load_max_over_mean": 2.0, "expert_load": [[0.5, 0.5]] * 2} for s in (1, 2)]
    train[0]["expert_balance"] = {"max_over_mean": [1.0, 2.0]}
    titles = [_expert_load(data).axes[0].get_title(loc="left") for data in (train, rows(3) + train, train + rows(3))]
    assert titles == [
        f"Expert load of {kind}, step {s} (1 = even share, {e} experts)" for kind, s, e in (("training", 2, 2), ("training", 2, 2), ("validation", 3, 4))
    ]
    assert len(_expert_load(train).axes[1].lines) == 4, "two layers, the worst, and the even share"


def test_a_forced_balance_is_called_so() -> None:
    """Else the picture of a benchmark would be that of a well-balanced router."""
    train = [{"step": s, "loss": 2.0, "expert_load_max_over_mean": 1.0, "expert_load": [[0.5, 0.5]] * 2} for s in (1, 2)]
    forced = [row | {"forced_balance": True} for row in train]
    for data, said in ((train, False), (forced, True), (forced + rows(3), True)):
        assert ("forced balance" in _expert_load(data).axes[0].get_title(loc="left")) == said


def test_steps_are_whole_numbers() -> None:
    for axes in (_expert_load(rows(3)).axes[1], *_loss(rows(3)).axes):
        axes.figure.canvas.draw()
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_a_single_row_is_seen() -> None:
    """As dots, since it has no line; two have one."""
    balance = {"expert_balance": {"max_over_mean": [1.0, 1.5]}}
    for count in (1, 2):
        data = [row | balance if "loss" in row else row for row in rows(count)]
        loss, _, rate = _loss(data).axes
        curves = [loss.lines[0], *rate.lines, *_expert_load(data).axes[1].lines[:-1]]  # the last is the even share
        assert [curve.get_marker() for curve in curves] == ["o" if count == 1 else "None"] * 5


def test_what_has_no_data_is_not_drawn(tmp_path: Path) -> None:
    plot(tmp_path, rows(5))
    assert list(plot(tmp_path, rows(5, experts=0))) == ["loss.png", "gates.png"]  # and the old expert_load.png is gone
    assert list(plot(tmp_path, [{"step": 1, "loss": 2.0, "lr": 1e-3}])) == ["loss.png"]
    assert list(plot(tmp_path, [{"step": 1, "val_loss": 2.0, "val_bpb": 1.0}])) == ["loss.png"]
    assert plot(tmp_path, []) == {}


def test_nulls_are_gaps(tmp_path: Path) -> None:
    data = rows(5)
    data[2]["loss"] = None
    data[-1]["gate_means"][0] = [None, 0.5, 0.5]
    data[-1]["expert_load"][0] = [None, 0.5, 0.2, 0.3]
    assert len(plot(tmp_path, data)) == 3


def test_large_models_fit(tmp_path: Path) -> None:
    assert all(height < 1500 for _, height in plot(tmp_path, rows(3, layers=60, experts=256)).values())


def test_no_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_plots(tmp_path)


def test_smoothing_keeps_a_line_and_its_ends() -> None:
    import numpy as np

    values = np.arange(9.0)
    np.testing.assert_allclose(_smooth(values, 3)[1:-1], values[1:-1])
    np.testing.assert_allclose(_smooth(values, 3)[[0, -1]], [0.5, 7.5])
    np.testing.assert_allclose(_smooth(values, 1), values)


def test_an_early_spike_does_not_flatten_the_curve() -> None:
    import numpy as np
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _limits(axes, np.concatenate([[1000.0], np.linspace(4, 2, 100)]))
    assert axes.get_ylim()[1] < 10
