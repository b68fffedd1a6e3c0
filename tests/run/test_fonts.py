"""Korean in pictures, with a font that has it and without any. The font is made here: boxes of its own for a few syllables."""

from __future__ import annotations

import json
import warnings

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf_fast.run import fonts
from rlhf_fast.run.fonts import KNOWN, fonts_for
from rlhf_fast.run.plots import plot_bars, plot_run


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(family, characters, listed=True): a font for this test, beside matplotlib's own; no others are there."""
    own = [entry for entry in font_manager.fontManager.ttflist if "matplotlib" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    files = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    fonts._look_again.cache_clear()

    def add(family: str, characters: str, listed: bool = True) -> None:
        pen = TTGlyphPen(None)
        for step, point in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
            (pen.lineTo if step else pen.moveTo)(point)
        pen.closePath()
        glyph = pen.glyph()
        names = {c: f"uni{ord(c):04X}" for c in characters}
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder([".notdef", *names.values()])
        font.setupCharacterMap({ord(c): name for c, name in names.items()})
        font.setupGlyf(dict.fromkeys([".notdef", *names.values()], glyph))
        font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 100)))
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable({"familyName": family, "styleName": "Regular"})
        font.setupOS2()
        font.setupPost()
        path = tmp_path / f"{family}.ttf"
        font.save(path)
        files.append(str(path))
        if listed:
            font_manager.fontManager.addfont(path)

    yield add
    font_manager.fontManager._findfont_cached.cache_clear()
    fonts._look_again.cache_clear()


def picture(text):
    """Pixels, and what was warned of."""
    with fonts_for([text]), warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", message="(?!Glyph)")
        figure = Figure(figsize=(2, 1))
        FigureCanvasAgg(figure)
        figure.suptitle(text)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba()).copy(), [str(w.message) for w in said]


def test_an_installed_font_stands_in_where_matplotlibs_own_has_no_glyph(install):
    before = matplotlib.rcParams["font.family"]
    boxes, said = picture("정답 reward")
    install("Some Hangul", "정답")
    drawn, also_said = picture("정답 reward")
    assert said == also_said == []
    assert (boxes != drawn).any()
    assert matplotlib.rcParams["font.family"] == before


def test_a_known_font_is_taken_before_one_that_happens_to_have_the_glyphs(install):
    install("A Decorative Font", "정답률")
    install(KNOWN[2], "정답")
    with fonts_for(["정답률"]):
        assert matplotlib.rcParams["font.family"][-1] == KNOWN[2]
    with fonts_for(["률"]):
        assert matplotlib.rcParams["font.family"][-1] == "A Decorative Font"


def test_a_font_installed_since_matplotlib_made_its_list_is_found(install, tmp_path):
    install("New Hangul", "정답", listed=False)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    font_manager.findSystemFonts().append(str(tmp_path / "broken.ttf"))
    with fonts_for(["정답"]):
        assert matplotlib.rcParams["font.family"][-1] == "New Hangul"


def test_latin_text_changes_nothing(install):
    install(KNOWN[0], "정답é")
    with fonts_for(["reward", "naïve café"]):
        assert KNOWN[0] not in matplotlib.rcParams["font.family"]


def test_without_any_font_one_line_says_so_and_the_pictures_are_drawn(install, tmp_path, caplog):
    run = tmp_path / "한국어 실행"
    run.mkdir()
    rows = [{"step": s, "rewards/정답/mean": s / 10, "loss": 1.0} for s in range(1, 4)]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = plot_run(run, headline="rewards/정답/mean")
        bars = plot_bars(tmp_path / "막대.png", "비교", ["앞", "뒤"], [1.0, 2.0], [0.1, 0.1])
    assert [f.name for f in files] == ["curves.png", "rewards-정답-mean.png"] and all(f.is_file() for f in files)
    assert bars.is_file()
    assert len([r for r in caplog.records if "no installed font has" in r.message]) == 2  # a line for each call
