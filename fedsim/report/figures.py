"""Figures as SVG text that takes its colours from the page.

matplotlib knows only fixed colours, so each role (ink, grid, first series …) is drawn in a colour that nobody would
choose, and that colour is replaced by a CSS variable afterwards. One picture then serves light, dark and paper.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.progress import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
ROLES = ("ink", "muted", "grid", *(f"s{i}" for i in range(SERIES)))
COLOUR = {role: f"#00{i:02x}fe" for i, role in enumerate(ROLES, 1)}
_LIGHT = "#1b1f24 #667080 #e3e7ec #2563eb #d9480f #0b8f63 #8b3fd9 #a87400 #0a86a3 #cf2673 #5c6b7f"
_DARK = "#e7eaef #97a1b0 #2b313b #7aa8ff #ff9a5c #4fd1a0 #c79bff #e6c35c #5cd0e6 #ff8fc0 #a9b5c6"
LIGHT = dict(zip(ROLES, _LIGHT.split(), strict=True))
DARK = dict(zip(ROLES, _DARK.split(), strict=True))
DASHES = ("-", "--", ":", "-.")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
POINTS = 600  # of one curve: more than the eye can tell apart, and a page of a million rounds stays small
BARS = 80  # clients shown one by one; above that, the shape of the distribution says more

RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "fedsim",  # ids do not depend on the run
    "font.family": "DejaVu Sans",  # for measuring only; it comes with matplotlib, so layouts are equal everywhere
    "font.size": 8.5,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.edgecolor": COLOUR["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": COLOUR["ink"],
    "axes.xmargin": 0.02,
    "figure.facecolor": "none",
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.major.pad": 5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


class Curve(NamedTuple):
    """One line of a chart. A y of None is a gap; ``band`` is drawn as ± around the line."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    band: Sequence[float] | None = None


def chart(
    ident: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x: str = "round",
    unit: str = "",
    wide: bool = False,
    fixed: bool = False,
) -> str:
    """Lines over rounds or bytes, as an SVG. ``unit`` is "", "bytes" or "seconds"; ``fixed``: a share of 1."""
    import matplotlib

    with matplotlib.rc_context(RC):
        figure, axes = _figure(wide)
        for i, curve in enumerate(curves):
            colour, dash = COLOUR[f"s{i % SERIES}"], DASHES[i // SERIES % len(DASHES)]
            all_ys = [math.nan if v is None else v for v in curve.y]
            keep = _thin(all_ys)
            xs, ys = [curve.x[i] for i in keep], [all_ys[i] for i in keep]
            alone = sum(map(math.isfinite, ys)) < 3  # a line through one point is invisible
            axes.plot(xs, ys, color=colour, linestyle=dash, label=curve.label, marker="o" if alone else "", ms=3.5)
            if curve.band is not None:
                half = [curve.band[i] for i in keep]
                low = [y - h for y, h in zip(ys, half, strict=True)]
                high = [y + h for y, h in zip(ys, half, strict=True)]
                axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        finite = [v for curve in curves for v in curve.y if v is not None]
        if not fixed and finite and min(finite) > 0 and max(finite) > 50 * min(finite) and unit != "bytes":
            axes.set_yscale("log")
        elif unit:
            axes.set_ylim(0, 1.06 * max(finite, default=1.0) or 1.0)
        if fixed:
            axes.set_ylim(*_unit_limits(finite))
        _units(axes, x, unit)
        axes.set_title(title)
        axes.set_xlabel(x)
        if len(curves) > 1:
            axes.legend(loc="best", ncols=1 if len(curves) < 6 else 2)
        return _svg(figure, ident, title)


def clients(ident: str, scores: Sequence[float], personal: Sequence[float] | None = None) -> str:
    """The accuracy of each client, from the worst to the best, with mean, 10th percentile and worst marked."""
    import matplotlib

    title = "Accuracy of each client" if len(scores) <= BARS else f"Accuracy of {len(scores):,} clients"
    ranked = sorted(scores)
    with matplotlib.rc_context(RC):
        figure, axes = _figure(wide=True)
        if len(ranked) <= BARS:
            axes.bar(range(1, len(ranked) + 1), ranked, width=0.72, color=COLOUR["s0"], alpha=0.75, lw=0)
            axes.set_xlabel("clients, sorted by accuracy")
            axes.set_ylabel("accuracy")
            axes.set_ylim(0, 1.02)
            if personal is not None:
                own = [p for _, p in sorted(zip(scores, personal, strict=True))]
                axes.plot(range(1, len(own) + 1), own, "o", ms=3.5, color=COLOUR["s1"], label="own model")
            line: Callable[..., object] = axes.axhline
            axes.grid(visible=False, axis="x")
        else:
            edges = [i / 40 for i in range(41)]
            axes.hist(ranked, bins=edges, color=COLOUR["s0"], alpha=0.6, lw=0, label="global model")
            if personal is not None:
                axes.hist(list(personal), bins=edges, histtype="step", color=COLOUR["s1"], lw=1.6, label="own model")
            axes.set_xlabel("accuracy")
            axes.set_ylabel("clients")
            axes.set_xlim(0, 1)
            line = axes.axvline
        marks = (("mean", sum(ranked) / len(ranked), "s2"), ("10th percentile", quantile(ranked, 0.1), "s3"))
        for (name, value, role), dash in zip((*marks, ("worst", ranked[0], "s6")), ("-", "--", ":"), strict=True):
            line(value, color=COLOUR[role], lw=1.4, linestyle=dash, label=f"{name} {value:.3f}")
        axes.set_title(title, pad=20)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5)
        return _svg(figure, ident, title)


def quantile(ranked: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values, as numpy does it."""
    at = q * (len(ranked) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def standalone(svg: str) -> str:
    """A file of its own: fixed colours on white instead of the page's."""
    for role, colour in LIGHT.items():
        svg = svg.replace(f"var(--{role})", colour)
    svg = svg.replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;font-family:{FONT}" ', 1
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'


def _figure(wide: bool) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 2.9) if wide else (5.2, 2.75), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: "Figure", ident: str, title: str) -> str:
    """The figure as one ``<svg>`` element for an HTML page; ``ident`` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib always writes a viewBox"
    head = f'<svg {box[0]} role="img" aria-label="{escape(title)}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"\s*<defs>\s*</defs>", "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{ident}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{ident}-\1)", text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{ident}-\1"', text)
    # The page says which font. matplotlib before 3.10 writes the shorthand, later ones the single properties.
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text)
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;\"]*", _font, text)
    for role, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", text)


def _font(match: re.Match[str]) -> str:
    weight = "600" if match[1] in ("bold", "700") else "400"
    return f"font-size: {match[2]}; font-weight: {weight}"


def _thin(ys: Sequence[float]) -> list[int]:
    """Which at most ``POINTS`` points to draw: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(ys) <= POINTS:
        return list(range(len(ys)))
    keep = {0, len(ys) - 1}
    step = 2 * len(ys) / POINTS
    for k in range(POINTS // 2):
        stretch = range(int(k * step), min(int((k + 1) * step), len(ys)))
        finite = [i for i in stretch if math.isfinite(ys[i])] or list(stretch[:1])
        keep |= {min(finite, key=lambda i: ys[i]), max(finite, key=lambda i: ys[i])}
    return sorted(keep)


def _unit_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits for a share: not more room than the values need, and never outside 0 and 1."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = max(0.06 * (high - low), 0.01)
    return max(-0.01, low - pad), min(1.01, high + pad)


def _units(axes: "Axes", x: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    in_bytes = FuncFormatter(lambda value, _: size(value).replace(".0 ", " "))
    if x.startswith("bytes"):
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(in_bytes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if unit == "bytes":
        axes.yaxis.set_major_formatter(in_bytes)
    elif unit:
        axes.set_ylabel(unit)
