"""The page and the plot of an attention benchmark, made from its raw numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import counts
from benchmarks.record import machine_lines
from benchmarks.shapes import LONG, length_name

Row = dict[str, Any]
BOTH = ("forward", "forward+backward")
KINDS = ("iid", "drift")
# Okabe and Ito's palette, as in the plots of a run.
COLOURS = {"iid": "#D55E00", "drift": "#0072B2"}


def time_of(row: Row, side: str, what: str) -> float | None:
    """Milliseconds; where the blocks were given, with what choosing them takes."""
    ms = row.get("times", {}).get(side, {}).get(what, {}).get("ms")
    if ms is None or side not in KINDS:
        return ms
    return None if row.get("selection_ms") is None else ms + row["selection_ms"]


def speed_up(row: Row, side: str, baseline: str, what: str) -> float | None:
    mine, theirs = time_of(row, side, what), time_of(row, baseline, what)
    return None if mine is None or theirs is None else theirs / mine


def break_even(points: Iterable[tuple[int, float]]) -> str:
    """Where the speed-up passes 1, in words, from (tokens, speed-up); between two lengths a straight line in logarithms is assumed."""
    points = sorted(points)
    if not points:
        return "not measured"
    if all(ratio >= 1 for _, ratio in points):
        return f"faster at every measured length, from {length_name(points[0][0])} on"
    if all(ratio < 1 for _, ratio in points):
        return f"slower at every measured length, up to {length_name(points[-1][0])}"
    last = max(i for i, (_, ratio) in enumerate(points) if ratio < 1)
    if last == len(points) - 1:
        return f"slower at {length_name(points[last][0])} again"
    (t0, r0), (t1, r1) = points[last], points[last + 1]
    at = math.exp(math.log(t0) + (math.log(t1) - math.log(t0)) * math.log(r0) / (math.log(r0) - math.log(r1)))
    return f"at about {at / 1024:.0f}k tokens ({r0:.2f} × at {length_name(t0)}, {r1:.2f} × at {length_name(t1)})"


def one_line(row: Row) -> str:
    """What the screen shows of a row."""
    head = f"{row['shape']:>20}  "
    if row["status"] == "FAILED":
        return head + f"FAILED: {failure(row)}"
    if row["status"] != "ok":
        return head + row["status"]
    parts = []
    for what in BOTH:
        times = [f"{side} {_ms(time_of(row, side, what))}" for side in row["times"] if time_of(row, side, what) is not None]
        if times:
            parts.append(f"{what} ms: {', '.join(times)}")
    return head + "; ".join(parts) + f"  ({row.get('seconds', 0):.0f} s)"


def failure(row: Row) -> str:
    return "; ".join(f"{name}: {verdict['problem']}" for name, verdict in row["gate"].items() if not verdict["passed"])


# --------------------------------------------------------------------------------------------------------------------- the page


def render(results: dict[str, Any], picture: str | None) -> str:
    facts, config, rows = results["facts"], results["config"], _in_order(results["rows"])
    good = [row for row in rows if row["status"] == "ok" and row["length"] < LONG]
    rivals = list(dict.fromkeys(side for row in good for side in row["times"] if side not in (*KINDS, "own", "own, given")))
    text = [
        f"# Attention on {facts['gpu']}, {facts['date']}",
        machine_lines(facts),
        f"Backend `{results['backend']}`, {results['dtype']}, one causal document, normal random data, geometry l {config['compress_block']}, "
        f"d {config['compress_stride']}, l' {config['select_block']}, n {config['num_selected']}, w {config['window']}. "
        "Shapes are Hq/Hkv/Dk (/Dv where it differs) @ tokens. Milliseconds, CUDA events, L2 cache flushed before each call; "
        f"all sides in turn within one process, best of {results['rounds']} rounds' medians.",
        "**Selections.** What a trained model selects is not known. *iid*: every query draws its free blocks anew, so neighbours share only the forced "
        "ones. *drift*: the next query keeps each free block with probability 0.9. These are handed to the operator as `blocks=`, which skips "
        "choosing; **the time of scores and top-n, measured on a run that does choose, is added to every iid and drift time here**, forward and "
        "forward+backward. *own* is the operator from start to end with nothing added: it chooses for itself, on random data, which is close to iid.",
    ]
    if picture:
        text.append(f"![Speed-up over dense attention by length]({picture})")
    if any(row["status"] != "ok" for row in rows):
        text.append("## Not measured\n\n" + "\n".join(f"- {row['shape']}: {_why(row)}" for row in rows if row["status"] != "ok"))
    for what in BOTH:
        if any(time_of(row, "own", what) is not None for row in good):
            text.append(f"## {what.capitalize().replace('+b', ' + b')}\n\n" + _times(good, rivals, what))
    text.append("## Break-even with dense attention\n\n" + _break_even(good))
    text += [_details(good), "## Peak memory of one call above its inputs\n\n" + _memory(rows), "## Check before timing\n\n" + _gate(rows)]
    parts = [f"### {row['shape']}\n\n" + part_table(row) for row in good if row["kernels"].get("iid")]
    if parts:
        text.append(PARTS_NOTE)
        text += parts
    return "\n\n".join(part for part in text if part) + "\n"


PARTS_NOTE = """## Parts

Kernel times of torch's profiler, per call; score + top-n from a call that chooses its blocks. TFLOP are useful ones by definition (the backward's scores
and dP count once, with dq; what dk, dv computes again is not counted), GB compulsory ones. Floor: the FLOPs at the rate that dense attention reached
beside it in this run, forward or backward, or the bytes at 7 TB/s (L2), whichever is longer; share: floor over time. At that rate the selected
branch's keys are counted once, though every query reads its own blocks."""


def _in_order(rows: list[Row]) -> list[Row]:
    """By heads as they first appear, then by length, whatever order they were measured in."""
    heads = list(dict.fromkeys(row["heads"] for row in rows))
    return sorted(rows, key=lambda row: (heads.index(row["heads"]), row["length"]))


def _times(rows: list[Row], rivals: list[str], what: str) -> str:
    dense = [side for side in ("cuDNN", "FA2") if side in rivals]
    head = ["shape", "iid", "drift", "own", *rivals, *(f"× {side}, iid / drift" for side in dense)]
    table = []
    for row in rows:
        if time_of(row, "own", what) is None:
            continue
        cells = [row["shape"], *(_ms(time_of(row, side, what)) for side in (*KINDS, "own", *rivals))]
        cells += [" / ".join(_number(speed_up(row, kind, side, what), "{:.2f}") for kind in KINDS) for side in dense]
        table.append(cells)
    return markdown_table(head, table)


def _break_even(rows: list[Row]) -> str:
    lines = []
    for heads in dict.fromkeys(row["heads"] for row in rows):
        for what in BOTH:
            for kind in KINDS:
                points = [
                    (row["length"], ratio) for row in rows if row["heads"] == heads and (ratio := speed_up(row, kind, dense_side(row, what), what)) is not None
                ]
                if points:
                    lines.append(f"- {heads}, {what}, {kind}: {break_even(points)}")
    return "\n".join(lines) or "Not measured."


def dense_side(row: Row, what: str) -> str:
    """The dense attention that a row is compared with: cuDNN's, or where it has no time FlashAttention-2's."""
    return "FA2" if time_of(row, "cuDNN", what) is None else "cuDNN"


def _details(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        notes = [f"{side}: {way}" for side, way in row.get("ways", {}).items() if way]
        notes += [f"{side} refused ({problem})" for side, problem in row.get("refused", {}).items()]
        notes += [f"{side}, {what}: {found['problem']}" for side, times in row["times"].items() for what, found in times.items() if found["problem"]]
        if row.get("selection_from") == "difference":
            notes.append("score + top-n taken as a difference of two calls, since the profiler did not show its kernel")
        if row.get("selection_ms") is None:
            notes.append("score + top-n could not be measured, so iid and drift have no time")
        if notes:
            lines.append(f"- {row['shape']}: {'; '.join(notes)}")
    union = [f"{row['shape']} {row['union_of_4']['iid']:.1f} / {row['union_of_4']['drift']:.1f}" for row in rows if row.get("union_of_4")]
    if union:
        lines.append(f"- Different blocks that 4 neighbouring queries choose together, iid / drift: {', '.join(union)}")
    chosen = [f"{row['shape']} {_ms(row['selection_ms'])}" for row in rows if row.get("selection_ms") is not None]
    if chosen:
        lines.append(f"- Score + top-n, in ms: {', '.join(chosen)}")
    return "## Notes\n\n" + "\n".join(lines) if lines else ""


def _memory(rows: list[Row]) -> str:
    sides = list(dict.fromkeys(side for row in rows for side in row.get("peak_bytes", {})))
    table = []
    for row in rows:
        if row.get("peak_bytes"):
            what = BOTH[row["backward"]]
            cells = [_number(row["peak_bytes"].get(side), "{:.2f}", 2**30) for side in sides]
            table.append([row["shape"], what, *cells, _ms(time_of(row, "own", what))])
    if not table:
        return "Not measured."
    return (
        markdown_table(["shape", "call", *(f"{side}, GiB" for side in sides), "NSA's own ms"], table)
        + "\n\nNSA chooses its blocks here. The upstream gradient is an input."
    )


def _gate(rows: list[Row]) -> str:
    table = []
    for row in rows:
        for name, verdict in row.get("gate", {}).items():
            agreement = "–" if verdict["agreement"] is None else f"{verdict['agreement']:.4f}"
            said = "passed" if verdict["passed"] else f"**FAILED**: {verdict['problem']}"
            where = "2,048 tokens in five documents" if name == "documents" else "the timed tensors, at a few queries"
            table.append([row["shape"], where, f"{verdict['worst']:.2f} ({verdict['worst_of']})", agreement, said])
    note = (
        "Output and all eight gradients against the float64 reference on the same blocks: RMS and largest error at most twice those of plain PyTorch "
        "(masks over all keys, products in bf16, softmax in float32). The worst of these ratios, and the share of selections that are the reference's own:"
    )
    return f"{note}\n\n" + markdown_table(["shape", "on", "worst error / plain", "same selection", ""], table) if table else "Not made."


def dense_rates(row: Row) -> tuple[float | None, float | None]:
    """FLOP/s of dense attention in this row, forward and backward."""
    flops, forward = row["dense_flops"], time_of(row, dense_side(row, "forward"), "forward")
    rate = None if forward is None else flops[0] / forward * 1e3
    side = dense_side(row, "forward+backward")
    alone, both = (time_of(row, side, what) for what in BOTH)
    return rate, rate if alone is None or both is None or both <= alone else flops[1] / (both - alone) * 1e3


def part_table(row: Row) -> str:
    """Parts of one shape: time, work, rate, floor."""
    rates = dense_rates(row)
    parts = {kind: counts.by_part(row["kernels"][kind])[0] for kind in KINDS if kind in row["kernels"]}
    own, _ = counts.by_part(row["kernels"]["own"])
    if "score + top-n" in own:
        for kind in parts:
            parts[kind]["score + top-n"] = own["score + top-n"]
    table, floors, known = [], 0.0, dict.fromkeys(parts, 0.0)
    for part in (*counts.PARTS, counts.OTHER):
        times = {kind: parts[kind].get(part) for kind in parts}
        if all(ms is None for ms in times.values()):
            continue
        flops, floor = row["flops"].get(part), counts.floor_ms(part, row["flops"], row["bytes"], *rates)
        if floor is not None:
            floors += floor
        for kind, ms in times.items():
            known[kind] += ms or 0.0
        per_second = " / ".join("–" if flops is None or not ms else f"{flops / ms / 1e9:.0f}" for ms in times.values())
        shares = " / ".join("–" if floor is None or not ms else f"{floor / ms:.0%}" for ms in times.values())
        moved = row["bytes"].get(part)
        table.append([part, *(_ms(ms) for ms in times.values()), _number(flops, "{:.2f}", 1e12), per_second, _number(moved, "{:.2f}", 1e9), _ms(floor), shares])
    shares = " / ".join(f"{floors / ms:.0%}" if ms else "–" for ms in known.values())
    table.append(["**sum**", *(_ms(ms) for ms in known.values()), "", "", "", _ms(floors), shares])
    what = BOTH[row["backward"]]
    table.append([f"{what}, by CUDA events", *(_ms(time_of(row, kind, what)) for kind in parts), "", "", "", "", ""])
    both = " / ".join(parts)
    text = markdown_table(["part", *(f"{kind}, ms" for kind in parts), "TFLOP", f"TFLOP/s, {both}", "GB", "floor, ms", f"share, {both}"], table)
    others = counts.by_part(row["kernels"]["iid"])[1]
    sides = " and ".join(dict.fromkeys(dense_side(row, w) for w in BOTH[: 1 + row["backward"]]))
    rate = " and ".join(f"{rate / 1e12:.0f}" for rate in rates[: 1 + row["backward"]] if rate is not None)
    text += f"\n\n{sides} in this run: {rate} TFLOP/s{' forward and backward' if row['backward'] else ' forward'}." if rate else ""
    return text + (f" Other kernels: {', '.join(f'`{_short(name)}`' for name in others[:6])}{', …' if len(others) > 6 else ''}." if others else "")


# ------------------------------------------------------------------------------------------------------------------------ pieces


def _why(row: Row) -> str:
    return f"**FAILED**, so no speed is given: {failure(row)}" if row["status"] == "FAILED" else row["status"]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def _short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return name.replace("void ", "").split("<")[0].split("(")[0].replace("`", "").replace("|", "/")[:70] or name[:70].replace("|", "/")


# -------------------------------------------------------------------------------------------------------------------------- plot


def draw(results: dict[str, Any], path: Path) -> bool:
    """Speed-up over dense attention by length, one panel for forward and one for forward+backward; False without matplotlib or data."""
    rows = [row for row in _in_order(results["rows"]) if row["status"] == "ok" and row["length"] < LONG]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained", facecolor="white")
    lengths = sorted({row["length"] for row in rows})
    shared = None
    for axes_index, what in enumerate(BOTH):
        axes = figure.add_subplot(1, 2, axes_index + 1, sharey=shared)
        shared = shared or axes
        axes.set_title(what.replace("+", " + "), loc="left", fontsize=12, fontweight="bold")
        for style, heads in zip(("-", "--", ":", "-."), dict.fromkeys(row["heads"] for row in rows), strict=False):
            for kind in KINDS:
                line = [(r["length"], x) for r in rows if r["heads"] == heads and (x := speed_up(r, kind, dense_side(r, what), what)) is not None]
                if line:
                    axes.plot(*zip(*line, strict=True), color=COLOURS[kind], linestyle=style, marker="o", markersize=5, label=f"{heads}, {kind}")
        axes.axhline(1.0, color="#6E6E6E", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [length_name(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens in one document")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    sides = " or ".join(dict.fromkeys(dense_side(row, what) for row in rows for what in BOTH if time_of(row, "own", what) is not None))
    figure.axes[0].set_ylabel(f"times as fast as dense attention ({sides})")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{results['facts']['gpu']}, {results['dtype']}, Hq/Hkv/D", x=0.01, ha="left", fontsize=9, color="#6E6E6E")
    figure.savefig(path, dpi=120)
    return True
