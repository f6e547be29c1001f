"""Make `book/_static/fonts/chinese.woff2`: what the book's pages show of Noto Sans CJK SC.

    python .ci/chinese_font.py NotoSansCJK-Regular.ttc   # Debian: fonts-noto-cjk

Run it again, on built pages, when a translation uses a character that the font lacks: a test names
it. It holds the characters that any page shows in Chinese, and their punctuation.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGES = BOOK / "_build" / "html"
OUT = BOOK / "_static" / "fonts" / "chinese.woff2"
NAME = "Noto Sans CJK SC"
PUNCTUATION = "“”‘’—…·、。〈〉《》「」『』【】，；：？！（）％～"
SHOWN = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


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


def shown(pages: Path) -> set[str]:
    """The Chinese characters of built pages, and of what their scripts say."""
    signs = set(PUNCTUATION)
    for file in pages.rglob("*.html"):
        signs |= Shown(file.read_text(encoding="utf8")).signs
    for name in ("translations.js", "words.js"):
        text = (pages / "zh" / "_static" / name).read_text(encoding="utf8")
        signs |= set(re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), text))
    return {sign for sign in signs if SHOWN.match(sign) or sign in PUNCTUATION}


def regular(source: str) -> TTFont:
    """The simplified Chinese face of a file, which may hold several."""
    fonts = TTCollection(source).fonts if source.endswith(".ttc") else [TTFont(source)]
    return next(font for font in fonts if font["name"].getDebugName(1) == NAME)


def main(source: str) -> None:
    options = subset.Options()
    options.layout_features = ["halt", "locl", "palt", "ccmp"]
    options.hinting = False
    options.desubroutinize = True
    options.name_IDs = [0, 13, 14]
    options.drop_tables += ["VORG", "vhea", "vmtx", "BASE", "DSIG"]
    font = regular(source)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(shown(PAGES)))
    subsetter.subset(font)
    font["name"].setName("qstar chinese", 1, 3, 1, 0x409)
    font.flavor = "woff2"
    font.save(OUT)
    print(f"{OUT}: {len(font.getBestCmap())} characters, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
