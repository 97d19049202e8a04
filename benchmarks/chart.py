"""Draws results as horizontal bars, how many times as fast as raw urllib3: `docs/_static/benchmarks.svg`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from math import ceil

from attrs import frozen
from figures import Figure, number
from runs import Results, Run

WIDTH = 860
LABELS_END, BARS_END = 345, 790
TOP, ROW, BAR = 64, 28, 16
HEADING = 34
MOST_TICKS = 8

# A card of its own, so that it can be read on dark pages, too.
_STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2933; }
    .title { font-weight: 600; }
    .small { font-size: 11.5px; fill: #52606d; }
    .end { text-anchor: end; }
    .over { paint-order: stroke; stroke: #ffffff; stroke-width: 5px; }
    .middle { text-anchor: middle; }
    .raw { fill: #9aa5b1; }
    .callbackq { fill: #2f9e5b; }
    .peer { fill: #cb8a0c; }
    .spread { stroke: #1f2933; stroke-opacity: 0.6; fill: none; }
    .one { stroke: #7b8794; stroke-dasharray: 3 3; }
"""


@frozen
class Bar:
    """
    Attributes:
        kind: ``raw``, ``callbackq`` or ``peer``.
        spread: least and most of the rounds.
    """

    label: str
    kind: str
    ratio: float
    spread: tuple[float, float]


_RAW = Bar("urllib3 in a loop, nothing stored", "raw", 1.0, (1.0, 1.0))


@frozen
class Group:
    heading: str
    bars: list[Bar]


def groups_of(results: Results) -> list[Group]:
    """Choose what the chart shows: drains, and peers beside them."""
    groups = []
    if results.speed:
        drains = [_bar(one) for one in results.speed.figures if one.unit == "x raw" and one.name.startswith("drain, ")]
        groups.append(Group(f"callbackq ({_about(results.speed)})", [_RAW, *drains]))
    if results.peers:
        peers = [_bar(one) for one in results.peers.figures if one.unit == "x raw"]
        groups.append(Group(f"Side by side ({_about(results.peers)})", [_RAW, *peers]))
    return groups


def _about(run: Run) -> str:
    return f"{run.machine.cores} cores, receiver: {run.machine.receiver}, {run.date}"


def _bar(figure: Figure) -> Bar:
    label = figure.name.removeprefix("drain, ")
    kind = "callbackq" if figure.name.startswith(("drain, ", "callbackq")) else "peer"
    return Bar(label, kind, figure.value, figure.spread or (figure.value, figure.value))


def draw(results: Results) -> str:
    """Draw the chart as an SVG document."""
    groups = groups_of(results)
    bars = [bar for group in groups for bar in group.bars]
    most = ceil(max(bar.spread[1] for bar in bars) * 2) / 2
    height = TOP + sum(HEADING + ROW * len(group.bars) for group in groups) + 8
    scale = (BARS_END - LABELS_END) / most
    parts = [*_head(height, bars), *_axis(most, scale, height)]
    top = TOP
    for group in groups:
        parts.append(f'  <text class="title" x="20" y="{top + 20}">{escape(group.heading)}</text>')
        top += HEADING
        for bar in group.bars:
            parts += _draw(bar, top, scale)
            top += ROW
    return "\n".join([*parts, "</svg>", ""])


def _head(height: int, bars: Iterable[Bar]) -> list[str]:
    told = "; ".join(f"{bar.label} {number(bar.ratio)}" for bar in bars)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc">',
        '  <title id="title">How fast callbacks are delivered, as a multiple of urllib3 in a loop</title>',
        f'  <desc id="desc">Horizontal bars: {escape(told)}.</desc>',
        f"  <style>{_STYLE}  </style>",
        f'  <rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="#d9e2ec"/>',
        '  <text class="title" x="20" y="28">Callbacks delivered and recorded, × urllib3 in a loop</text>',
        '  <text class="small" x="20" y="48">POSTs of 1 KiB; median of the rounds, and their least and most</text>',
    ]


def _axis(most: float, scale: float, height: int) -> list[str]:
    step = ceil(most / MOST_TICKS * 2) / 2
    ticks = [step * place for place in range(int(most / step) + 1)]
    x = LABELS_END + scale
    return [
        *(
            f'  <text class="small middle" x="{LABELS_END + tick * scale:.1f}" y="{TOP}">{tick:.1f}</text>'
            for tick in ticks
        ),
        f'  <line class="one" x1="{x:.1f}" y1="{TOP + 6}" x2="{x:.1f}" y2="{height - 10}"/>',
    ]


def _draw(bar: Bar, top: int, scale: float) -> list[str]:
    middle = top + BAR / 2
    left, right = (LABELS_END + ratio * scale for ratio in bar.spread)
    size = f'width="{bar.ratio * scale:.1f}" height="{BAR}"'
    drawn = [
        f'  <text class="end" x="{LABELS_END - 10}" y="{middle + 4.5:g}">{escape(bar.label)}</text>',
        f'  <rect class="{bar.kind}" x="{LABELS_END}" y="{top}" {size} rx="2"/>',
        f'  <text class="over" x="{right + 8:.1f}" y="{middle + 4.5:g}">{bar.ratio:.2f}</text>',
    ]
    if left < right:
        drawn.append(f'  <path class="spread" d="M{left:.1f},{middle - 3:g} v6 m0,-3 H{right:.1f} m0,-3 v6"/>')
    return drawn
