"""The recorded session in the README: what is cut takes no time, and the picture shows what the terminal showed."""

from __future__ import annotations

import json
import re
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

from cast_to_svg import CELL_WIDTH, LINE_HEIGHT, REST, Frame, Piece, draw  # noqa: E402
from record_session import Recording  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
#: column, row, text
Shown = set[tuple[int, int, str]]


def _piece(column: int, text: str, color: str = "default") -> Piece:
    return Piece(column, text, color, False)


def _session() -> list[Frame]:
    """Two panes above a shell; a line that moves up, one that stays, one that is there again."""
    border, line = _piece(10, "│"), _piece(0, "─" * 20)
    prompt, output = (_piece(0, "$", "green"), _piece(2, "ls <&>")), (_piece(0, "a"), _piece(8, "b"))
    return [
        Frame(1.0, ((border,), (_piece(0, "one"), border, _piece(11, "one")), (line,), prompt, ()), (8, 3)),
        Frame(1.5, ((_piece(0, "one"), border), (_piece(2, "two"), border), (line,), prompt, output), None),
        Frame(3.0, ((border,), (_piece(0, "one"), border, _piece(11, "one")), (line,), prompt, output), (0, 4)),
    ]


def _read(picture: ET.Element) -> list[Shown]:
    """What is seen in each step of the animation."""
    parts = {part.get("id"): part for part in picture.iterfind(f"{SVG}defs/{SVG}g")}
    texts: Shown = set()

    def walk(element: ET.Element, x: float, y: float) -> None:
        x, y = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        if element.tag == f"{SVG}text":
            texts.add((round(x / CELL_WIDTH), round(y / LINE_HEIGHT), element.text or ""))
        for child in [parts[element.get("href", "")[1:]]] if element.tag == f"{SVG}use" else element:
            walk(child, x, y)

    steps = []
    for name in _animation(picture)["values"].split(";"):
        texts.clear()
        walk(parts[name[1:]], 0, 0)
        steps.append(set(texts))
    return steps


def _animation(picture: ET.Element) -> dict[str, str]:
    (animation,) = picture.iter(f"{SVG}animate")
    return animation.attrib


def test_each_step_shows_what_the_terminal_showed() -> None:
    frames = _session()
    shown = _read(ET.fromstring(draw(frames, 20, "a <title>")))
    assert shown == [
        {(piece.column, y, piece.text) for y, row in enumerate(frame.rows) for piece in row} for frame in frames
    ]


def test_each_step_lasts_as_long_as_it_was_seen() -> None:
    animation = _animation(ET.fromstring(draw(_session(), 20, "title")))
    seconds = 2.0 + REST
    assert animation["dur"] == f"{seconds:.2f}s" and animation["calcMode"] == "discrete"
    shares = [float(share) for share in animation["keyTimes"].split(";")]
    assert shares == pytest.approx([0, 0.5 / seconds, 2.0 / seconds], abs=1e-5)


def test_colours_are_kept() -> None:
    picture = ET.fromstring(draw(_session(), 20, "title"))
    prompts = [text for text in picture.iter(f"{SVG}text") if text.text == "$"]
    assert [prompt.get("fill") for prompt in prompts] == ["#7ee787"]


def test_what_is_cut_takes_no_time(tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"until [ -e {go} ]; do sleep 0.02; done; rm {go}"
    waits = f"echo before; {wait}; echo within; {wait}; echo behind; exec sleep 60"
    recording = Recording(["sh", "-c", waits], {"PATH": "/usr/bin:/bin"})
    try:
        _wait_for(recording, "before")
        with recording.cut("a wait") as said:
            time.sleep(0.6)
            go.touch()
            _wait_for(recording, "within")
            ends = time.monotonic()
        go.touch()
        _wait_for(recording, "behind")
        since = time.monotonic() - ends
        assert re.fullmatch(r"# a wait: \d+ s, cut", said())
    finally:
        recording.stop()
    recording.write(tmp_path / "it.cast")
    header, *events = map(json.loads, (tmp_path / "it.cast").read_text().splitlines())
    assert header["version"] == 2
    times = [at for at, _, _ in events]
    assert times == sorted(times)
    marker = next(at for at, kind, _ in events if kind == "m")
    assert [at for at, _, data in events if "within" in data] == [marker]
    assert marker <= times[-1] <= marker + since + 0.001  # times are rounded


def _wait_for(recording: Recording, text: str) -> None:
    deadline = time.monotonic() + 20
    while not any(text in data for _, _, data in list(recording.events)):
        assert time.monotonic() < deadline, recording.events
        time.sleep(0.02)


def test_the_picture_of_the_readme_needs_nothing_else() -> None:
    """Pages show it as an image: without scripts, and without whatever it would load."""
    text = (ROOT / "docs/img/kill.svg").read_text()
    assert len(text) < 400_000
    elements = list(ET.fromstring(text).iter())
    drawn = {"svg", "title", "style", "defs", "g", "use", "animate", "text", "rect", "circle"}
    assert {element.tag.removeprefix(SVG) for element in elements} <= drawn
    assert all(href.startswith("#") for element in elements if (href := element.get("href")))
    assert "url(" not in text and "@import" not in text
