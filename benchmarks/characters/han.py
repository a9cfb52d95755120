"""The 20,902 characters from U+4E00 to U+9FA5, rendered by the product from Debian's fonts.

    apt-get install fonts-noto-cjk fonts-hanazono fonts-wqy-zenhei fonts-wqy-microhei

Seven faces draw them all: Noto Sans and Noto Serif (simplified Chinese), regular and bold, HanaMin,
WenQuanYi's Zen Hei and Micro Hei.  They are the faces of the 3,755 characters.  Where two faces of
a collection differ in few characters, one is taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.papers import lab

FIRST, LAST = 0x4E00, 0x9FA5
FONTS = Path("/usr/share/fonts")
PACKAGES = "fonts-noto-cjk fonts-hanazono fonts-wqy-zenhei fonts-wqy-microhei"
# Below FONTS. FILE#2 is face 2 of a collection, of Noto's the simplified Chinese one.
FACES = [
    "opentype/noto/NotoSansCJK-Bold.ttc#2",
    "opentype/noto/NotoSansCJK-Regular.ttc#2",
    "opentype/noto/NotoSerifCJK-Bold.ttc#2",
    "opentype/noto/NotoSerifCJK-Regular.ttc#2",
    "truetype/hanazono/HanaMinA.ttf",
    "truetype/wqy/wqy-microhei.ttc#0",
    "truetype/wqy/wqy-zenhei.ttc#0",
]
MIN_FACES = 4
# Images of a class.
PER_CLASS = {"train": 56, "val": 14, "test": 7}
SIZE = 32


def make(out: Path, per_class: dict[str, int] = PER_CLASS) -> None:
    """Shards of every character, by `referral shards glyphs`. per_class: images of each split."""
    absent = [face for face in FACES if not (FONTS / face.partition("#")[0]).is_file()]
    if absent:
        message = f"{FONTS / absent[0]} is absent: apt-get install {PACKAGES}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(lab.MISTAKE)
    characters = out.with_name("characters.txt")
    characters.parent.mkdir(parents=True, exist_ok=True)
    letters = "".join(map(chr, range(FIRST, LAST + 1)))
    characters.write_text(letters, encoding="utf-8")
    words = ["--out", out, "--classes", characters, "--size", SIZE, "--min-faces", MIN_FACES]
    for face in FACES:
        words += ["--fonts", FONTS / face]
    for split, count in per_class.items():
        words += [f"--{split}", count]
    lab.referral("shards", "glyphs", *words)
