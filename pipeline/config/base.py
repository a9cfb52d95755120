"""What every section of the config is made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from ..redaction import redacted

MODULE_FUNCTION = r"[\w.]+:\w+"  # how a user names code of his own


class UserError(Exception):
    """The user's mistake: printed as one line, exit code 2, no traceback.

    Its text is for logs and reports, too, and holds no secret of a URL.
    """

    def __init__(self, *words: object):
        super().__init__(*(redacted(word) if isinstance(word, str) else word for word in words))


class Section(BaseModel):
    """A table of the config.  An unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",
        allow_inf_nan=False,
    )


def each_of(values: Iterable[str], names: Iterable[str]) -> list[str]:
    """The values, each once, if all are among `names`.  Raises as `one_of` does."""
    names = list(names)
    return [one_of(value, names) for value in dict.fromkeys(values)]


def one_of(value: str, names: Iterable[str], also: str = "", pattern: str = "") -> str:
    """`value` if it is one of `names` or matches `pattern`, which `also` describes.

    Raises ValueError, with the nearest name, otherwise.
    """
    names = list(names)
    if value in names or (pattern and re.fullmatch(pattern, value)):
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be one of {', '.join(names)}{also}{hint}")
