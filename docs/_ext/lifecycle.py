"""
Draws the life of a callback from `callbackq.core.lifecycle.TABLE`, so that the picture can't say anything else.

``{lifecycle-diagram}`` is an SVG in the page, ``{lifecycle-table}`` the same as a table. A new event shows up by
itself; a new state must be given a place in `PLACES`, and the build fails until it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

from docutils import nodes
from docutils.parsers.rst import Directive

from callbackq.core.lifecycle import TABLE, Event
from callbackq.core.models import CallbackState

Table = Mapping[tuple[CallbackState, Event], CallbackState]

WIDTH, HEIGHT = 780, 390
BOX_WIDTH, BOX_HEIGHT = 130, 44
LINE_HEIGHT: Final = 15
PLACES: Final = {
    CallbackState.WAITING: (80, 120),
    CallbackState.LOCKED: (390, 120),
    CallbackState.SUCCEEDED: (700, 60),
    CallbackState.FAILED: (700, 230),
    CallbackState.CANCELLED: (390, 260),
}
"""Where each state's box has its centre."""
BEND: Final = 0.22
OTHER_BENDS: Final = {
    (CallbackState.WAITING, CallbackState.CANCELLED): -0.2,
    (CallbackState.FAILED, CallbackState.WAITING): 0.6,
}
"""How far a way leaves the straight line to its left, as a share of its length; others where ways would cross."""

STYLE: Final = """
.lifecycle { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.lifecycle rect { fill: none; stroke: currentColor; stroke-width: 1.5; }
.lifecycle .finished rect { stroke-width: 3; }
.lifecycle path { fill: none; stroke: currentColor; opacity: .65; }
.lifecycle marker path { fill: currentColor; opacity: 1; stroke: none; }
.lifecycle text { fill: currentColor; text-anchor: middle; dominant-baseline: central; }
.lifecycle .state text { font-weight: 600; }
.lifecycle .event { paint-order: stroke; stroke: var(--color-background-primary, white); stroke-width: 8px; }
"""

TIP: Final = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
)


def draw(table: Table) -> str:
    """Draw a lifecycle table as an SVG element."""
    events: dict[tuple[CallbackState, CallbackState], list[str]] = {}
    for (state, event), following in table.items():
        events.setdefault((state, following), []).append(event.value)
    head = (
        f'<svg class="lifecycle" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" aria-label="States of a callback and what leads from one to the other">\n'
        f"<style>{STYLE}</style>\n{TIP}"
    )
    edges = [_draw_edge(state, following, names) for (state, following), names in events.items()]
    return "\n".join([head, *edges, *map(_draw_state, CallbackState), "</svg>"])


def _draw_state(state: CallbackState) -> str:
    x, y = PLACES[state]
    kind = "state" if state.is_open else "state finished"
    return (
        f'<g class="{kind}"><rect x="{x - BOX_WIDTH / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="8"/><text x="{x}" y="{y}">{state.name}</text></g>'
    )


def _draw_edge(state: CallbackState, following: CallbackState, names: list[str]) -> str:
    path, (x, y) = _loop(state) if state is following else _arc(state, following)
    top = y - LINE_HEIGHT * (len(names) - 1) / 2
    lines = "".join(
        f'<text class="event" x="{x:.0f}" y="{top + LINE_HEIGHT * number:.0f}">{escape(name)}</text>'
        for number, name in enumerate(names)
    )
    return (
        f'<g class="edge" data-from="{state.name}" data-to="{following.name}">'
        f'<path d="{path}" marker-end="url(#tip)"/>{lines}</g>'
    )


def _loop(state: CallbackState) -> tuple[str, tuple[float, float]]:
    """From the top of a box back to it; the words stand above."""
    x, y = PLACES[state]
    top = y - BOX_HEIGHT / 2
    return f"M{x - 18},{top:g} C{x - 30},{top - 42:g} {x + 30},{top - 42:g} {x + 18},{top:g}", (x, top - 38)


def _arc(state: CallbackState, following: CallbackState) -> tuple[str, tuple[float, float]]:
    """A curve that bends to its own left, so that the way there and the way back lie apart; words in its middle."""
    (x1, y1), (x2, y2) = PLACES[state], PLACES[following]
    bend = OTHER_BENDS.get((state, following), BEND)
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    aside_x, aside_y = bend * (y2 - y1), bend * (x1 - x2)
    control = (middle_x + aside_x, middle_y + aside_y)
    start, end = _edge_of_box((x1, y1), control), _edge_of_box((x2, y2), control)
    path = f"M{start[0]:.0f},{start[1]:.0f} Q{control[0]:.0f},{control[1]:.0f} {end[0]:.0f},{end[1]:.0f}"
    words = tuple((one + 2 * two + three) / 4 for one, two, three in zip(start, control, end, strict=True))
    return path, (words[0], words[1])


def _edge_of_box(centre: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from the centre of a box leaves it."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    reach = min(BOX_WIDTH / 2 / abs(dx) if dx else 9e9, BOX_HEIGHT / 2 / abs(dy) if dy else 9e9)
    return centre[0] + dx * reach, centre[1] + dy * reach


class LifecycleDiagram(Directive):
    def run(self) -> list[nodes.Node]:
        return [nodes.raw("", draw(TABLE), format="html")]


class LifecycleTable(Directive):
    def run(self) -> list[nodes.Node]:
        rows = [("state", "event", "next state")]
        rows += [(state.name, event.value, following.name) for (state, event), following in TABLE.items()]
        head, *body = (
            nodes.row("", *(nodes.entry("", nodes.paragraph(text=text)) for text in texts)) for texts in rows
        )
        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in rows[0]), cols=len(rows[0]))
        group += [nodes.thead("", head), nodes.tbody("", *body)]
        return [nodes.table("", group)]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("lifecycle-diagram", LifecycleDiagram)
    app.add_directive("lifecycle-table", LifecycleTable)
    return {"parallel_read_safe": True}
