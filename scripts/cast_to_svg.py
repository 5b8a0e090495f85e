#!/usr/bin/env python3
"""Make an animated SVG without scripts of a recorded terminal (asciicast v2): what a page shows as an image.

    pip install pyte
    python scripts/cast_to_svg.py docs/img/kill.cast > docs/img/kill.svg

pyte is the terminal. An animation (SMIL) changes which of the frames is referred to, so that a browser draws
that one only. What is shown again, in whatever row or frame, is in the file once.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

#: most frames a second. The recording has more; they would only make the file larger.
RATE = 6.0
#: seconds that the last frame stays, before it begins again
REST = 5.0
CELL_WIDTH, LINE_HEIGHT = 8.43, 17  # of a font of 14 px
MARGIN, BAR, BASELINE = 14, 34, 13
#: what separates the panes of tmux; text beside it is text of its own, so that the same line is the same in all panes
BORDERS = "─│┌┐└┘├┤┬┴┼"
COLORS = {
    "default": "#c9d1d9",
    "black": "#484f58",
    "brightblack": "#484f58",
    "red": "#ff7b72",
    "green": "#7ee787",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#a5d6ff",
    "white": "#f0f6fc",
}
CURSOR = f'<rect y="{-BASELINE}" width="{CELL_WIDTH}" height="{LINE_HEIGHT}" fill="#8b949e"/>'
# Fonts whose letters are as wide as the cells, or less wide. That the browser fits the text to the cells (textLength)
# made it several times as slow.
STYLE = """\
text{font:14px Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}
.still{display:none}
@media (prefers-reduced-motion:reduce){.film{display:none}.still{display:inline}}"""


@dataclass(frozen=True)
class Piece:
    """Text without gaps, in one colour."""

    column: int
    text: str
    color: str
    bold: bool


@dataclass(frozen=True)
class Frame:
    at: float
    rows: tuple[tuple[Piece, ...], ...]
    cursor: tuple[int, int] | None


def frames(header: dict, events: list) -> list[Frame]:
    """What the terminal shows, at most ``RATE`` times a second; the last is what it shows at the end."""
    import pyte  # the tests, which do not draw recordings, have none

    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    found: list[Frame] = []

    def take(at: float) -> None:
        rows = tuple(_pieces([screen.buffer[y][x] for x in range(screen.columns)]) for y in range(screen.lines))
        cursor = None if screen.cursor.hidden else (screen.cursor.x, screen.cursor.y)
        if not found or (found[-1].rows, found[-1].cursor) != (rows, cursor):
            found.append(Frame(at, rows, cursor))

    output = [(at, data) for at, kind, data in events if kind == "o"]
    shown = -1.0
    for (at, data), (following, _) in pairwise([*output, (float("inf"), "")]):
        stream.feed(data)
        # What comes next is later than a frame may be: this state is seen.
        if following >= shown + 1 / RATE:
            shown = max(at, shown + 1 / RATE)
            take(shown)
    return found


def _pieces(cells: list) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    column = 0
    for (color, bold, _), run in groupby(cells, lambda cell: (cell.fg, cell.bold, cell.data in BORDERS)):
        text = "".join(cell.data for cell in run)
        # Cut at gaps, so that columns of tables stand where they do whatever the width of the font.
        for part in re.finditer(r"\S+(?: \S+)*", text):
            pieces.append(Piece(column + part.start(), part.group(), color, bold))
        column += len(text)
    return tuple(pieces)


class Shared:
    """Parts of the picture that are drawn once and referred to, by what they are."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, markup: str) -> str:
        return self._names.setdefault(markup, f"i{len(self._names):x}")

    def refer(self, markup: str, x: float = 0, y: float = 0) -> str:
        place = "".join(f' {axis}="{value:.0f}"' for axis, value in (("x", x), ("y", y)) if value)
        return f'<use href="#{self.name(markup)}"{place}/>'

    def definitions(self) -> str:
        return "\n".join(f'<g id="{name}">{markup}</g>' for markup, name in self._names.items())


def draw(shown: list[Frame], columns: int, title: str) -> str:
    """``shown``: not empty, all with the same number of rows."""
    inner = len(shown[0].rows) * LINE_HEIGHT
    width, height = columns * CELL_WIDTH + 2 * MARGIN, inner + BAR + MARGIN
    seconds = shown[-1].at - shown[0].at + REST
    shared = Shared()
    names = [shared.name(_frame(each, shared)) for each in shown]
    times = [f"{(each.at - shown[0].at) / seconds:.5f}".rstrip("0").rstrip(".") for each in shown]
    values = ";".join(f"#{name}" for name in names)
    film = (
        f'<use class="film" href="#{names[-1]}"><animate attributeName="href" calcMode="discrete"'
        f' dur="{seconds:.2f}s" repeatCount="indefinite" values="{values}" keyTimes="{";".join(times)}"/></use>'
    )
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="{color}"/>'
        for i, color in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}"',
            f' height="{height}" fill="{COLORS["default"]}"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style><defs>{shared.definitions()}</defs>",
            f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>{dots}',
            f'<text x="{width / 2:.0f}" y="22" text-anchor="middle">{escape(title)}</text>',
            f'<svg x="{MARGIN}" y="{BAR}" width="{columns * CELL_WIDTH:.0f}" height="{inner}">',
            f'<g transform="translate(0,{BASELINE})">{film}<use class="still" href="#{names[-1]}"/></g></svg></svg>\n',
        )
    )


def _frame(frame: Frame, shared: Shared) -> str:
    """Pane by pane: while one changes the others are as they were."""
    panes: dict[tuple[int, int], list[str]] = {}
    borders: list[str] = []
    band = 0
    for y, row in enumerate(frame.rows):
        below = any("─" in piece.text and piece.text[0] in BORDERS for piece in row)
        band += below
        lines: dict[int, list[Piece]] = {}
        left = 0
        for piece in row:
            if piece.text[0] in BORDERS:
                left += 1
                borders.append(shared.refer(_text(piece), piece.column * CELL_WIDTH, y * LINE_HEIGHT))
            else:
                lines.setdefault(left, []).append(piece)
        for pane, pieces in lines.items():
            line = [(_text(piece), piece.column * CELL_WIDTH) for piece in pieces]
            whole = line if len(line) == 1 else [("".join(shared.refer(*each) for each in line), 0)]
            panes.setdefault((band, pane), []).extend(shared.refer(*each, y * LINE_HEIGHT) for each in whole)
    parts = ["".join(each) for each in (borders, *panes.values()) if each]
    if frame.cursor:
        x, y = frame.cursor
        parts.append(shared.refer(CURSOR, x * CELL_WIDTH, y * LINE_HEIGHT))
    return "".join(shared.refer(part) if part.count("<use") > 1 else part for part in parts)


def _text(piece: Piece) -> str:
    # pyte has names for the 16 colours and six digits for the others.
    fill = "" if piece.color == "default" else f' fill="{COLORS.get(piece.color, "#" + piece.color)}"'
    weight = ' font-weight="bold"' if piece.bold else ""
    return f"<text{fill}{weight}>{escape(piece.text, quote=False)}</text>"


def render(cast: Path) -> str:
    header, *events = map(json.loads, cast.read_text().splitlines())
    return draw(frames(header, events), header["width"], header.get("title", cast.stem))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: cast_to_svg.py FILE.cast > FILE.svg")
    sys.stdout.write(render(Path(sys.argv[1])))
