"""Embed figures in a report's page: curves as SVG and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from .ops.images import encoded

# placeholder colours, which are replaced by the page's so that charts fit its light and dark style
_INK, _LINE = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none", "font.size": 9, "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "text.color": _INK, "axes.labelcolor": _INK, "grid.color": _INK, "grid.alpha": 0.15, "grid.linewidth": 0.6,
    "axes.formatter.use_mathtext": False, "axes.formatter.limits": (-3, 4), "svg.hashsalt": "samdistill",
}  # fmt: skip
MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """Chart of one quantity over the steps of a run.

    Attributes:
        name: Name of the quantity.
        svg: The chart.
        last: Final value, smoothed as drawn.
        validated: Final value of the validation, or None.
    """

    name: str
    svg: Markup
    last: float
    validated: float | None = None


def curves(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Draw a chart for each loss term, each validation figure and the learning rate.

    All charts have the same range of steps. A validation figure with the name of a term is drawn into the term's chart.
    The weighted total has a chart only if it is validated. If a term's weight is not 1, the title states it. A line has
    a gap where its term was not finite (null in the file) or was not trained (in another phase).

    Args:
        records: Records of a run's ``metrics.jsonl``.

    Returns:
        The charts. A quantity with fewer than two finite values has none.
    """
    trained = [record for record in records if "terms" in record]
    checked = [record for record in records if "validate" in record]
    weights = {name: weight for record in trained for name, weight in record.get("weights", {}).items()}
    terms = list(dict.fromkeys(name for record in trained for name in record["terms"]))
    figures = list(dict.fromkeys(name for record in checked for name in record["validate"]))
    drawn = []
    for name in terms:
        weight = weights.get(name, 1)
        title = name if weight == 1 else f"{name} (weight {weight:g})"
        line = _points(trained, lambda record, n=name: record["terms"].get(n))
        drawn.append((title, line, _points(checked, lambda record, n=name: record["validate"].get(n)), True))
    for name in figures:
        dots = _points(checked, lambda record, n=name: record["validate"].get(n))
        if name == "total" and name not in terms:
            drawn.append((name, _points(trained, lambda record: record.get("total")), dots, True))
        elif name not in terms:
            drawn.append((f"validation: {name}", dots, dots[:0], False))
    rates = _points(trained, lambda record: record.get("lr"))
    drawn.append(("learning rate", rates, rates[:0], False))
    steps = [float(record["step"]) for record in records]
    return [
        _curve(name, line, dots, smooth, (min(steps), max(steps)))
        for name, line, dots, smooth in drawn
        if np.isfinite(line[:, 1]).sum() > 1
    ]


def _points(
    records: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> Float[np.ndarray, "n 2"]:
    """Return step and value of every record, NaN for a record without the value, of shape (n, 2)."""
    found = [(record["step"], math.nan if (v := value(record)) is None else v) for record in records]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def _curve(
    name: str,
    line: Float[np.ndarray, "n 2"],
    dots: Float[np.ndarray, "m 2"],
    smooth: bool,
    steps: tuple[float, float],
) -> Curve:
    (step, value), dots = line.T, dots[np.isfinite(dots[:, 1])]
    mean = _running_mean(value, max(1, len(value) // 40)) if smooth else value
    known = mean[np.isfinite(mean)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True)
        thin = slice(None, None, max(1, len(step) // MOST_POINTS))
        if smooth:
            axes.plot(step[thin], value[thin], color=_LINE, alpha=0.3, linewidth=0.8)
        few = {"marker": "o", "markersize": 3} if len(known) <= 12 else {}
        axes.plot(step[thin], mean[thin], color=_LINE, linewidth=1.8, **few)
        if len(dots):
            axes.plot(*dots.T, color=_INK, linestyle="", marker="o", markersize=3.5)
        both = np.concatenate([value[np.isfinite(value)], dots[:, 1]])
        if smooth and both.min() > 0 and both.max() / both.min() > 30:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        room = 0.02 * (steps[1] - steps[0])
        axes.set_xlim(steps[0] - room, steps[1] + room)
        return Curve(name, _to_svg(figure), float(known[-1]), float(dots[-1, 1]) if len(dots) else None)


def _running_mean(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """Compute the mean of the finite values within ``width`` values on either side.

    At the ends there are fewer values. NaN stays NaN. The window is centred, so the line does not lag.
    """
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.where(known, values, 0.0).cumsum()])
    count = np.concatenate([[0], known.cumsum()])
    at = np.arange(len(values))
    start, stop = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    return np.where(known, (total[stop] - total[start]) / np.maximum(count[stop] - count[start], 1), np.nan)


def _to_svg(figure: Figure) -> Markup:
    """Convert a figure to an ``svg`` element with the page's colours and font and without external references."""
    raw = io.StringIO()
    figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    svg = raw.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML does not need namespaces
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return Markup(svg.replace(_INK, "currentColor").replace(_LINE, "var(--accent)"))


def data_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Encode an image as a JPEG data URI, so that the page needs no other file."""
    content = encoded(Image.fromarray(image), "JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
