"""Make `book/_static/fonts/maths.woff2`: what the book's formulas use of STIX Two Math.

    python .ci/maths_font.py STIXTwoMath-Regular.ttf     # needs fonttools and brotli

Run it again when a formula needs a sign that the font lacks: a test names it. Two of the font's
constants are changed, by which a browser moves scripts away from a base of one letter; TeX moves
them only away from larger ones.
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

OUT = Path(__file__).resolve().parents[1] / "book" / "_static" / "fonts" / "maths.woff2"
SIGNS = (
    "\u00a0¬¯°±´·×÷‐‑‒–—‖‘’“”†‡•…′″‴‵‶‷⁄⁗\u2061\u2062ℂℍℓℕℙℚℝℤℬℰℱℋℐℒℳℛ"
    "←↑→↓↔↕↖↗↘↙↤↦⇀⇁⇌⇐⇑⇒⇓⇔⟵⟶⟷⟸⟹⟺⌈⌉⌊⌋⏜⏝⏞⏟□■△⟨⟩⩽⩾⪯⪰★☆\ufe00"
    "∀∂∃∄∅∆∇∈∉∋∏∐∑−∓∔∗∘∙√∝∞∠∣∤∥∦∧∨∩∪∫∬∮∼∽≃≄≅≈≉≍≐≔≕≜≝≠≡≢≤≥≦≧≨≩≪≫≮≯≰≱"
    "≲≳≺≻≼≽⊂⊃⊄⊅⊆⊇⊈⊉⊊⊋⊎⊓⊔⊕⊖⊗⊘⊙⊢⊣⊤⊥⊨⋀⋁⋂⋃⋄⋅⋆⋮⋯⋰⋱"
    "\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308\u030a\u030c\u0332\u0338\u20d7ϑϕϖϰϱϵ"
)
RANGES = (
    (0x20, 0x7F),
    (0x391, 0x3CA),
    (0x1D400, 0x1D468),  # bold, italic
    (0x1D49C, 0x1D4B6),  # script capitals
    (0x1D538, 0x1D552),  # double-struck capitals
    (0x1D670, 0x1D6A6),  # monospace
    (0x1D6E2, 0x1D71C),  # Greek italic
    (0x1D7CE, 0x1D7E2),  # bold and double-struck digits
    (0x1D7F6, 0x1D800),
)


def main(source: str) -> None:
    options = subset.Options()
    options.layout_features = ["ssty"]
    options.hinting = False
    options.notdef_outline = True
    options.name_IDs = [0, 13, 14]
    font = TTFont(source)
    subsetter = subset.Subsetter(options)
    wanted = {code for start, stop in RANGES for code in range(start, stop)}
    subsetter.populate(unicodes=wanted | set(map(ord, SIGNS)))
    subsetter.subset(font)
    constants = font["MATH"].table.MathConstants
    constants.SubscriptBaselineDropMin.Value = -250
    constants.SuperscriptBaselineDropMax.Value = 400
    font["name"].setName("qstar maths", 1, 3, 1, 0x409)
    font.flavor = "woff2"
    font.save(OUT)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
