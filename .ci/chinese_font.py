"""Make the two fonts of the book's Chinese: what its pages show of Noto Sans CJK SC.

    python .ci/chinese_font.py NotoSansCJK-Regular.ttc   # Debian: fonts-noto-cjk

Run it again, on built pages, when a translation uses a character that the font lacks: a test names
it. `chinese-quoted.woff2` holds the characters that English pages quote from the source, and the
punctuation; `chinese.woff2` those that only Chinese pages show. `chinese.css` says which are where,
so that an English page loads no more than it shows; and it holds a third font, of empty squares as
wide as the characters, which have their place on machines without a Chinese font until those are
loaded.
"""

import base64
import io
import re
import sys
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path

from fontTools import subset
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont
from fontTools.ttLib.tables._c_m_a_p import CmapSubtable
from fontTools.ttLib.tables._g_l_y_f import Glyph

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGES = BOOK / "_build" / "html"
FONTS = BOOK / "_static" / "fonts"
CSS = BOOK / "_static" / "chinese.css"
NAME = "Noto Sans CJK SC"
CORNERS = [(-1, -1), (-1, 1), (1, 1), (1, -1)]
PUNCTUATION = "“”‘’—…·、。〈〉《》「」『』【】，；：？！（）％～"
WIDE = (0x3000, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF)
SHOWN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in WIDE) + "]")


class Shown(HTMLParser):
    """Every character of a page, of its attributes too: some are shown when one asks for them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.signs: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.signs.update(*(value or "" for _, value in attributes))

    def handle_data(self, data: str) -> None:
        self.signs.update(data)


def shown(pages: Path) -> tuple[set[str], set[str]]:
    """The Chinese characters of built pages: of the English ones, and of the others alone.

    With what the scripts say.
    """
    quoted, others = set(PUNCTUATION), set[str]()
    for file in pages.rglob("*.html"):
        signs = Shown(file.read_text(encoding="utf8")).signs
        if pages / "zh" in file.parents:
            others |= signs
        else:
            quoted |= signs
    for name in ("translations.js", "words.js"):
        text = (pages / "zh" / "_static" / name).read_text(encoding="utf8")
        others |= set(re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), text))
    first, second = (
        {sign for sign in signs if SHOWN.match(sign) or sign in PUNCTUATION}
        for signs in (quoted, others)
    )
    return first, second - first


def regular(source: str) -> TTFont:
    """The simplified Chinese face of a file, which may hold several."""
    fonts = TTCollection(source).fonts if source.endswith(".ttc") else [TTFont(source)]
    return next(font for font in fonts if font["name"].getDebugName(1) == NAME)


def ranges(signs: set[str]) -> str:
    """The characters as CSS says them, those that follow each other as one range."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, signs)):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return ", ".join(f"U+{a:X}" if a == b else f"U+{a:X}-{b:X}" for a, b in runs)


def write_font(source: str, signs: set[str], out: Path) -> None:
    options = subset.Options()
    options.layout_features = ["halt", "locl", "palt", "ccmp"]
    options.hinting = False
    options.desubroutinize = True
    options.name_IDs = [0, 13, 14]
    options.drop_tables += ["VORG", "vhea", "vmtx", "BASE", "DSIG"]
    font = regular(source)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(signs))
    subsetter.subset(font)
    font["name"].setName("qstar chinese", 1, 3, 1, 0x409)
    font.flavor = "woff2"
    font.save(out)
    print(f"{out}: {len(font.getBestCmap())} characters, {out.stat().st_size} bytes")


def widths(files: Iterable[Path]) -> dict[int, int]:
    """Code -> advance, in thousandths of the font's size, of all characters of some fonts."""
    found = {}
    for font in map(TTFont, files):
        for code, name in font.getBestCmap().items():
            found[code] = round(1000 * font["hmtx"][name][0] / font["head"].unitsPerEm)
    return found


def square(advance: int) -> Glyph:
    pen = TTGlyphPen(None)
    for side, turn in ((0.9, 1), (0.86, -1)):
        corners = [(advance * (1 + x * side) / 2, 380 + 500 * y * side) for x, y in CORNERS[::turn]]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
    return pen.glyph()


def squares(known: Mapping[int, int]) -> str:
    """A font in which each character is an empty square as wide as it is, as an address.

    Args:
        known: Code -> advance; other Chinese characters are as wide as the font's size.
    """
    wide = {c: 1000 for first, last in WIDE for c in range(first, last + 1)} | dict(known)
    names = {advance: f"square{advance}" for advance in sorted(set(wide.values()))}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord("、"): names[1000]})
    empty = {".notdef": TTGlyphPen(None).glyph()}
    builder.setupGlyf(empty | {name: square(advance) for advance, name in names.items()})
    given = {name: (advance, round(advance / 20)) for advance, name in names.items()}
    builder.setupHorizontalMetrics({".notdef": (1000, 0)} | given)
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": "qstar squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=880, sTypoDescender=-120, usWinAscent=880, usWinDescent=120)
    builder.setupPost(keepGlyphNames=False)
    many_to_one = CmapSubtable.newSubtable(13)
    many_to_one.platformID, many_to_one.platEncID, many_to_one.language = 3, 10, 0
    many_to_one.format, many_to_one.reserved, many_to_one.length = 13, 0, 0
    many_to_one.cmap = {code: names[wide[code]] for code in sorted(wide)}
    builder.font["cmap"].tables.append(many_to_one)
    builder.font.flavor = "woff2"
    builder.font.recalcTimestamp = False  # the same bytes every time
    builder.font["head"].created = builder.font["head"].modified = 3_800_000_000
    out = io.BytesIO()
    builder.font.save(out)
    return f"data:font/woff2;base64,{base64.b64encode(out.getvalue()).decode()}"


def main(source: str) -> None:
    quoted, others = shown(PAGES)
    write_font(source, quoted, FONTS / "chinese-quoted.woff2")
    write_font(source, others, FONTS / "chinese.woff2")
    css = CSS.read_text(encoding="utf8")
    face = r'(url\("fonts/chinese-quoted\.woff2"\)[^}]*unicode-range: )[^;]*'
    css = re.sub(face, rf"\g<1>{ranges(quoted)}", css)
    css = re.sub(r'data:font/woff2;base64,[^"]*', squares(widths(FONTS.glob("chinese*"))), css)
    CSS.write_text(css, encoding="utf8")


if __name__ == "__main__":
    main(sys.argv[1])
