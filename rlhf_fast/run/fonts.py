"""Fonts for pictures: names of runs and rewards may be Korean, and the font that matplotlib brings along is not."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)
# installed fonts with what matplotlib's own lacks, asked in this order before all the others
KNOWN = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "NanumBarunGothic", "Malgun Gothic", "Apple SD Gothic Neo")
KNOWN += ("UnDotum", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei")
EMPTY = ("Last Resort", ".LastResort", "Adobe Blank")  # begin the names of fonts that have a box for every character


@contextlib.contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Draw inside this: behind matplotlib's font stands an installed one that has what the texts need and it lacks.

    Characters that no installed font has become boxes; one line says so, and matplotlib does not warn of each of them.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont

    usual = list(matplotlib.rcParams["font.family"])
    lacking = {c for text in texts for c in text if not c.isascii()}
    lacking -= lacking and _characters(findfont(FontProperties(family=usual)))
    if not lacking:
        yield
        return
    found, path = _font_with(lacking) or (None, None)
    if boxes := sorted(lacking - (_characters(path) if path else frozenset())):
        logger.warning("plots: no installed font has %s; install one, such as Noto Sans CJK", "".join(boxes[:20]))
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": usual + [found] * (found is not None)}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _font_with(needed: set[str]) -> tuple[str, str] | None:
    """Name and file of the font with the most of ``needed``, among the known ones first; None when none has any."""
    from matplotlib.font_manager import fontManager

    for look in (lambda: None, _look_again):
        look()
        paths = {entry.name: entry.fname for entry in fontManager.ttflist if not entry.name.startswith(EMPTY)}
        for names in ([name for name in KNOWN if name in paths], sorted(set(paths) - set(KNOWN))):
            counts = {name: len(needed & _characters(paths[name])) for name in names}
            best = max(counts, key=counts.__getitem__, default=None)
            if best is not None and counts[best]:
                return best, paths[best]
    return None


@functools.cache
def _look_again() -> None:
    """Add the fonts that were installed since matplotlib listed them, which it does once and for all."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a bitmap font, or a broken file
            fontManager.addfont(path)


@functools.lru_cache(maxsize=1024)
def _characters(path: str) -> frozenset[str]:
    """What a font file can draw."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # a bitmap font, or a broken file
        return frozenset()
