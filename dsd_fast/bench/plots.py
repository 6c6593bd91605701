"""Plots of records, as SVG files that carry the plotted numbers with them."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from dsd_fast.bench.case import Group, Suite
from dsd_fast.bench.records import Record
from dsd_fast.bench.tables import chosen, line_of

Panel = dict[str, Any]

_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
_WIDTH, _HEIGHT = 7.2, 4.2
# With the legend beside the axes.
_GROWTH_WIDTH = 9.0
# Line styles of levels.
_LEVELS = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 2)))
_MARKERS = "osD^vP*X"
# Neighbouring lines are this far apart, in doublings, so that their intervals do not cover each other.
_APART = 0.06


def plot_data(suite: Suite, group: Group, records: Sequence[Record]) -> dict[str, Any] | None:
    """What a group's plot shows, a panel for each machine, as plain numbers; None if there is nothing to plot."""
    if group.plot is None:
        return None
    make = {"latency": _latency, "waterfall": _waterfall, "quality": _quality, "growth": _growth}[group.plot]
    panels = []
    for (_, name, threads, environment), rows in chosen(suite, group, records).items():
        title = ", ".join(filter(None, (name, f"{threads} thread{'' if threads == '1' else 's'}", environment)))
        panels.append({"machine": title, **make(group, rows)})
    return {"title": group.title, "plot": group.plot, "panels": panels} if panels else None


def svg(data: dict[str, Any]) -> bytes:
    """The plot, the same bytes for the same data and versions of matplotlib.

    Raises:
        ImportError: matplotlib is not installed; says which extra brings it.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plots need matplotlib: pip install 'dsd-fast[bench]'") from error

    panels = data["panels"]
    # Ids in the file come from the salt, and would be random without it.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.hashsalt": "dsd-fast", "font.size": 9}):
        width = _GROWTH_WIDTH if data["plot"] == "growth" else _WIDTH
        figure = Figure(figsize=(width, _HEIGHT * len(panels)), layout="constrained")
        FigureCanvasSVG(figure)
        draw = _DRAW[data["plot"]]
        for panel, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True):
            draw(axes, panel)
            # From the left: a long title would leave the figure on both sides.
            axes.set_title(f"{data['title']}\n{panel['machine']}", fontsize=9, loc="left")
        out = io.BytesIO()
        description = json.dumps(data, sort_keys=True)
        metadata = {"Description": description, "Date": None, "Creator": None}
        figure.savefig(out, format="svg", metadata=metadata)
    return out.getvalue()


def data_of(content: bytes) -> dict[str, Any] | None:
    """The data that an SVG file of :func:`svg` carries, None if it carries none."""
    try:
        found = ElementTree.fromstring(content).find(f".//{_DESCRIPTION}")
        data = None if found is None or found.text is None else json.loads(found.text)
    except (ElementTree.ParseError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _latency(group: Group, rows: Sequence[Record]) -> Panel:
    """Milliseconds per item of subject and baseline against a size."""
    lines: dict[str, list[list[float]]] = {}
    for record in rows:
        for side in ("subject", "baseline"):
            value = record[side]
            per_item = [1e3 * value[key] / record["items"] for key in ("median", "p20", "p80")]
            line, point = lines.setdefault(value["name"], []), [value["sizes"][group.x], *per_item]
            # A side that several are measured against is in several records.
            if point not in line:
                line.append(point)
    return {"x": group.x, "y": f"ms per {rows[0]['item']}", "lines": {name: sorted(p) for name, p in lines.items()}}


def _waterfall(group: Group, rows: Sequence[Record]) -> Panel:
    """Seconds of the first rung's baseline and of each rung."""
    first = rows[0]["baseline"]
    bars = [[first["name"], first["median"], None]]
    bars += [[record["subject"]["name"], record["subject"]["median"], record["ratio"]["median"]] for record in rows]
    return {"x": f"seconds for {rows[0]['items']} {rows[0]['item']}s", "bars": bars}


def _quality(group: Group, rows: Sequence[Record]) -> Panel:
    """Figures with their intervals against the milliseconds an item costs, in a line for each name up to the last
    comma."""
    lines: dict[str, list[list[float]]] = {}
    for record in rows:
        if record["seconds"] is not None:
            point = [record[key] for key in ("value", "low", "high")]
            name = record["name"].rpartition(", ")[0] or record["name"]
            lines.setdefault(name, []).append([1e3 * record["seconds"], *point, record["sizes"][group.x]])
    chances = {record["chance"] for record in rows if record["chance"] is not None}
    return {
        "x": f"ms per {rows[0]['item']}",
        "y": rows[0]["unit"],
        "label": group.x,
        "chance": min(chances) if len(chances) == 1 else None,
        "lines": {name: sorted(points) for name, points in lines.items()},
    }


def _growth(group: Group, rows: Sequence[Record]) -> Panel:
    """Figures with their intervals against a size, in a line for each name; those at 0 are levels."""
    lines: dict[str, list[list[float]]] = {}
    levels: dict[str, list[float]] = {}
    for record in rows:
        name, size, point = line_of(record), record["sizes"][group.x], [record[k] for k in ("value", "low", "high")]
        if size:
            lines.setdefault(name, []).append([size, *point])
        else:
            levels[name] = point
    chances = {record["chance"] for record in rows if record["chance"] is not None}
    return {
        "x": group.x,
        "y": rows[0]["unit"],
        "chance": min(chances) if len(chances) == 1 else None,
        "lines": {name: sorted(points) for name, points in lines.items()},
        "levels": levels,
    }


def _draw_latency(axes: Any, panel: Panel) -> None:
    for name, points in panel["lines"].items():
        x, middle, low, high = zip(*points, strict=True)
        axes.errorbar(x, middle, yerr=_bars(middle, low, high), marker="o", markersize=3, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _plain(axes.yaxis)
    axes.set(xlabel=panel["x"], ylabel=panel["y"])
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def _draw_waterfall(axes: Any, panel: Panel) -> None:
    names, seconds, ratios = zip(*panel["bars"], strict=True)
    axes.set_axisbelow(True)
    axes.barh(range(len(names)), seconds, color="tab:blue")
    for place, (value, ratio) in enumerate(zip(seconds, ratios, strict=True)):
        text = f" {value:.2f} s" + ("" if ratio is None else f", {ratio:.2f} times faster")
        axes.text(value, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(seconds))
    axes.set_xlabel(panel["x"])
    axes.grid(True, axis="x", alpha=0.3)


def _draw_quality(axes: Any, panel: Panel) -> None:
    for name, points in panel["lines"].items():
        x, value, low, high, labels = zip(*points, strict=True)
        axes.errorbar(x, value, yerr=_bars(value, low, high), marker="o", markersize=3, capsize=2, label=name)
        for place, height, label in zip(x, value, labels, strict=True):
            axes.annotate(f"{label}", (place, height), textcoords="offset points", xytext=(4, -10), fontsize=8)
    if panel["chance"] is not None:
        axes.axhline(panel["chance"], linestyle=":", color="grey", label="chance")
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set(xlabel=f"{panel['x']} (labels: {panel['label']})", ylabel=panel["y"])
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def _draw_growth(axes: Any, panel: Panel) -> None:
    drawn = []
    middle = (len(panel["lines"]) - 1) / 2
    for place, (name, points) in enumerate(panel["lines"].items()):
        x, value, low, high = zip(*points, strict=True)
        beside = [size * 2 ** (_APART * (place - middle)) for size in x]
        marker = _MARKERS[place % len(_MARKERS)]
        bars = _bars(value, low, high)
        drawn.append(axes.errorbar(beside, value, yerr=bars, marker=marker, markersize=4, capsize=2, label=name))
    for (name, (value, low, high)), style in zip(panel["levels"].items(), itertools.cycle(_LEVELS)):
        drawn.append(axes.axhline(value, linestyle=style, color="black", linewidth=1, label=name))
        axes.axhspan(low, high, color="black", alpha=0.06, linewidth=0)
    if panel["chance"] is not None:
        drawn.append(axes.axhline(panel["chance"], linestyle=":", color="grey", label="chance"))
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=panel["x"], ylabel=panel["y"])
    axes.grid(True, alpha=0.3)
    # In the order of drawing, the lines first; matplotlib would put the levels before them.
    axes.legend(handles=drawn, loc="center left", bbox_to_anchor=(1, 0.5))


def _plain(axis: Any) -> None:
    """Labels 1, 2, 5, 10, 20, … where a logarithmic axis would have powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")


def _bars(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Distances below and above."""
    below = [m - value for m, value in zip(middle, low, strict=True)]
    return [below, [value - m for m, value in zip(middle, high, strict=True)]]


_DRAW = {"latency": _draw_latency, "waterfall": _draw_waterfall, "quality": _draw_quality, "growth": _draw_growth}
