"""The pages' templates, which escape everything that is not Markup."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from .formatting import FILTERS

SCRIPT = Path(__file__).parent / "script.js"


class Script(NamedTuple):
    """The page's own script, and what a Content-Security-Policy calls it: sha256-..."""

    text: Markup
    hash: str


def script() -> Script:
    text = SCRIPT.read_text(encoding="utf-8").strip()
    digest = hashlib.sha256(text.encode()).digest()
    return Script(Markup(text), f"sha256-{base64.b64encode(digest).decode()}")


def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(name)
