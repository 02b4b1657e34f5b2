"""report.html: one file, escaped, loading nothing."""

from __future__ import annotations

import re
from pathlib import Path

from sparring.launch.report import Section, Series, line_chart, png, write_page

ATTACK = "<script>alert('&')</script>"
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def page(path: Path, attack: str = ATTACK) -> str:
    chart = line_chart(
        [
            Series(attack, [0, 1, 2], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]),
            Series("plain", [0, 1, 2], [3, 2, 1]),
        ],
        x_label=attack,
        y_label=attack,
        caption=attack,
    )
    sections = [
        Section(attack, note=attack, charts=[chart], columns=[attack], rows=[[attack]]),
        Section("text", columns=["a"], rows=[[attack]], text=True, code=attack),
    ]
    write_page(path, title=attack, lead=attack, sections=sections)
    return path.read_text(encoding="utf-8")


def test_all_text_is_escaped(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html")
    assert "<script" not in text
    # title twice, lead, heading, note, caption, column, three cells, and the drawing's labels
    assert len(re.findall(r"&lt;script&gt;", text)) >= 10


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html")
    assert set(re.findall(r"https?://[^\"'<>\s)]+", text)) <= NAMESPACES
    targets = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)|url\(([^)]*)\)|@import", text)
    assert targets, "a drawing refers to its own parts"
    assert all((a or b).startswith("#") for a, b in targets)


def test_a_page_is_whole_and_has_its_drawing(tmp_path: Path) -> None:
    text = page(tmp_path / "r.html")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert text.count("<svg") == 1


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page(tmp_path / "1.html") == page(tmp_path / "2.html")


def test_a_picture_is_inside_the_page(tmp_path: Path) -> None:
    chart = png(b"bytes", caption='<"a">')
    path = write_page(
        tmp_path / "p.html", title="t", lead="", sections=[Section("s", charts=[chart])]
    )
    text = path.read_text()
    assert 'src="data:image/png;base64,Ynl0ZXM="' in text
    assert 'alt="&lt;&#34;a&#34;&gt;"' in text


def test_intervals_are_drawn(tmp_path: Path) -> None:
    def drawing(**options: list[float]) -> str:
        series = Series("s", [0.0, 1.0], [1.0, 2.0], **options)
        return str(line_chart([series], x_label="x", y_label="y", caption="c").svg)

    assert "LineCollection" in drawing(low=[0.5, 1.5], high=[1.5, 2.5])
    assert "LineCollection" not in drawing()
