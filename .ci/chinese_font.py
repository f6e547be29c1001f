"""Make the two fonts of the book's Chinese: what its pages show of Noto Sans CJK SC.

    python .ci/chinese_font.py NotoSansCJK-Regular.ttc   # Debian: fonts-noto-cjk

Run it again, on built pages, when a translation uses a character that the font lacks: a test names
it. `chinese-quoted.woff2` holds the characters that English pages quote from the source, and the
punctuation; `chinese.woff2` those that only Chinese pages show. `chinese.css` says which are where,
so that an English page loads no more than it shows.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGES = BOOK / "_build" / "html"
FONTS = BOOK / "_static" / "fonts"
CSS = BOOK / "_static" / "chinese.css"
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


def main(source: str) -> None:
    quoted, others = shown(PAGES)
    write_font(source, quoted, FONTS / "chinese-quoted.woff2")
    write_font(source, others, FONTS / "chinese.woff2")
    css = CSS.read_text(encoding="utf8")
    face = r'(url\("fonts/chinese-quoted\.woff2"\)[^}]*unicode-range: )[^;]*'
    CSS.write_text(re.sub(face, rf"\g<1>{ranges(quoted)}", css), encoding="utf8")


if __name__ == "__main__":
    main(sys.argv[1])
