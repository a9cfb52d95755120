"""pydantic's messages in the words of this config."""

from __future__ import annotations

from typing import Any

from .base import one_of


def in_our_words(error: Any) -> str:
    """The rule that a value breaks, and what would do."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        names = [name.strip("'") for name in context["expected"].replace(" or ", ", ").split(", ")]
        return _choice(str(error["input"]), names)
    if kind == "string_type" and isinstance(error["input"], (dict, list)):
        return "must be one text"
    if kind in MESSAGES:
        return MESSAGES[kind].format(value=error["input"], **context)
    message = error["msg"].removeprefix("Value error, ")
    return message.replace("Input should be", "must be")


def _choice(value: str, names: list[str]) -> str:
    try:
        one_of(value, names)
    except ValueError as error:
        return str(error)
    return f"must be one of {', '.join(names)}"


MESSAGES = {
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": 'must be a text; write it in quotes: "{value}"',
    "list_type": 'must be a list: [1.0, 2.0], or ["a", "b"]',
    "dict_type": "must be a table: {{ key = value }}",
    "model_type": "is a section: set the keys in it",
}
