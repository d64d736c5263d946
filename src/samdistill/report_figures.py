"""Figures of a report as text to be put inside its page: curves as SVG, pictures as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

# drawn with these, replaced by what the page's light or dark style says
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
    """One quantity over the steps of a run. ``last`` is its final value, smoothed as drawn."""

    name: str
    svg: Markup
    last: float


def curves(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A chart for each loss term, each validation figure and the learning rate of a ``metrics.jsonl``.

    A term's weight stands in its name. Values that were not finite are null in the file and are gaps here.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        step = float(record["step"])
        for name, value in record.get("terms", {}).items():
            weight = record.get("weights", {}).get(name)
            series.setdefault(name if weight in (None, 1) else f"{name} (weight {weight:g})", []).append((step, value))
        for name, value in record.get("validate", {}).items():
            series.setdefault(f"validation: {name}", []).append((step, value))
    rates = [(float(record["step"]), record["lr"]) for record in records if record.get("lr") is not None]
    if rates:
        series["learning rate"] = rates
    drawn = []
    for name, points in series.items():
        known = np.array([(x, y) for x, y in points if y is not None], dtype=np.float64).reshape(-1, 2)
        if len(known) > 1:
            drawn.append(_curve(name, known, smooth=name != "learning rate" and not name.startswith("validation: ")))
    return drawn


def _curve(name: str, points: Float[np.ndarray, "n 2"], smooth: bool) -> Curve:
    step, value = points[:, 0], points[:, 1]
    mean = _running_mean(value, max(1, len(value) // 40)) if smooth else value
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True)
        thin = slice(None, None, max(1, len(step) // MOST_POINTS))
        if smooth:
            axes.plot(step[thin], value[thin], color=_LINE, alpha=0.3, linewidth=0.8)
        few = {"marker": "o", "markersize": 3} if len(step) <= 12 else {}
        axes.plot(step[thin], mean[thin], color=_LINE, linewidth=1.8, **few)
        if smooth and value.min() > 0 and value.max() / value.min() > 30:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        return Curve(name, _to_svg(figure), float(mean[-1]))


def _running_mean(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """Mean over ``width`` values on either side, over fewer at the ends: centred, so that the line does not lag."""
    total = np.concatenate([[0.0], values.cumsum()])
    at = np.arange(len(values))
    start, stop = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _to_svg(figure: Figure) -> Markup:
    """The bare ``svg`` element in the page's own colours and font, without any reference to the outside."""
    raw = io.StringIO()
    figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    svg = raw.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # implied inside HTML
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return Markup(svg.replace(_INK, "currentColor").replace(_LINE, "var(--accent)"))


def data_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """A JPEG that needs no file beside the page."""
    raw = io.BytesIO()
    Image.fromarray(image).save(raw, format="JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(raw.getvalue()).decode()
