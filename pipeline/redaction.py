"""Make text safe to show: hide secrets of URLs, spell out control sequences.

URLs carry passwords and signatures, and names of files, classes and servers' messages carry
whatever somebody put there.  Both pass through here on their way to a terminal, a log, a report.
"""

from __future__ import annotations

import re
import unicodedata

HIDDEN = "***"
# NAME:PASSWORD@ or TOKEN@ in front of a host.
USER = re.compile(r"(?<=://)[^/\s@'\"?#]+@")
# Parameters of a URL that sign it or let in who knows them.
PARAMETER = re.compile(
    r"([?&;][\w.%-]*(?:signature|credential|token|secret|password|passwd|pwd|auth|sig|key)[\w.%-]*=)"
    r"[^&\s'\"#;]*[^&\s'\"#;:,.)]",  # a stop behind the URL is the sentence's
    re.IGNORECASE,
)
HEADER = re.compile(r"(\bauthorization['\"]?[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+", re.IGNORECASE)
# Joiners are letters' business in Persian, Indic scripts and emoji.
JOINERS = "\u200c\u200d"
INVISIBLE = ("Cc", "Cf", "Zl", "Zp")


def redacted(text: str) -> str:
    """The text with passwords and tokens of URLs replaced by `***`."""
    if "://" in text:
        text = USER.sub(f"{HIDDEN}@", text)
    if "=" in text:
        text = PARAMETER.sub(rf"\1{HIDDEN}", text)
    return HEADER.sub(rf"\1{HIDDEN}", text)


def printable(text: str, keep: str = "") -> str:
    """The text with control characters, invisible ones and undecodable bytes as escapes.

    keep: of these, what stays.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_hidden(c) else ascii(c)[1:-1] for c in text)


def _is_hidden(character: str) -> bool:
    """Whether a terminal would obey it, swallow it or fail at it."""
    category = unicodedata.category(character)
    return category == "Cs" or (category in INVISIBLE and character not in JOINERS)


def shown(text: str) -> str:
    """What a terminal, a log or a report gets of a text of several lines."""
    return printable(redacted(text), keep="\n\t")
