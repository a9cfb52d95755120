"""What a command prints of its use, and of a word that it does not know: one form for all of them.

    Usage: referral NAME [OPTIONS] ARGUMENTS
    one sentence, then arguments, options, an example

`Parser` is argparse with this form. `pipeline.typer_usage` gives it to typer's commands.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from .config import UserError

Row = tuple[str, str]  # a name as it is written, and what it is
HELP_NAMES = ("-h", "--help")
HELP_ROW: Row = ("-h, --help", "Print this.")
NARROWEST = 60
WIDEST = 100
NAME_COLUMN = 26  # a longer name stands on a line of its own


def page(
    usage: str, text: str, sections: Iterable[tuple[str, Sequence[Row]]], example: str = ""
) -> str:
    """A page of help, wrapped to the terminal. Nothing in it is cut off."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    lines = _wrapped(f"Usage: {usage}", width, "", "    ")
    for paragraph in text.strip().split("\n\n"):
        lines += ["", *_wrapped(paragraph, width)]
    for title, rows in sections:
        if rows:
            lines += ["", f"{title}:", *_table(rows, width)]
    if example:
        title = "Examples:" if "\n" in example else "Example:"
        lines += ["", title, *(f"  {line}" for line in example.splitlines())]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], width: int) -> list[str]:
    column = 4 + min(NAME_COLUMN, max(len(name) for name, _ in rows))
    lines = []
    for name, text in rows:
        first = f"  {name}".ljust(column)
        if len(first) > column or not first.endswith("  "):
            lines.append(first.rstrip())
            first = " " * column
        lines += _wrapped(text, width, first, " " * column) or [first.rstrip()]
    return lines


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def sentence(text: str) -> str:
    """`classes per file (5)` as `Classes per file (5).`"""
    text = " ".join(text.split())
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "]")) else f"{text}."


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean --force?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose help is `page`, and whose errors are UserErrors that name the nearest option.

    name: the whole command, e.g. "referral predict".  text: a sentence or two of what it does.
    """

    def __init__(self, name: str, text: str, example: str = ""):
        super().__init__(prog=name, description=text, add_help=False, allow_abbrev=False)
        self.example = example
        self.add_argument(*HELP_NAMES, action="help", help=HELP_ROW[1])

    def format_help(self) -> str:
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        arguments = [action for action in actions if not action.option_strings]
        options = [action for action in actions if action.option_strings]
        options.sort(key=lambda action: action.option_strings[0] in HELP_NAMES)  # help is the last
        needed = [_option_name(option) for option in options if option.required]
        names = [_argument_name(argument) for argument in arguments]
        usage = " ".join([self.prog, *needed, "[OPTIONS]", *names])
        sections = [
            ("Arguments", [_row(_argument_name(each), each) for each in arguments]),
            ("Options", [_row(_option_name(each), each) for each in options]),
        ]
        return page(usage, self.description or "", sections, self.example)

    def parse_known_args(self, args=None, namespace=None):
        known, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            self._refuse(word)
        return known, unknown

    def _refuse(self, word: str) -> NoReturn:
        options = [name for action in self._actions for name in action.option_strings]
        if word.startswith("-"):
            option = word.partition("=")[0]
            raise UserError(f"No such option {option}{nearest(option, options)} ({self.prog} -h)")
        raise UserError(f"{word}: one argument too many ({self.prog} -h)")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{readable(message)} ({self.prog} -h)")


def readable(message: str) -> str:
    """A parser's message as one sentence without a full stop."""
    message = " ".join(message.split())
    message = re.sub(r"^argument ([^:]+): ", r"\1: ", message)
    message = message.replace("Value error, ", "").replace("Input should be", "must be")
    message = message.replace("the following arguments are required:", "Missing:")
    return message.rstrip(".")


def _row(name: str, action: argparse.Action) -> Row:
    return name, sentence(action.help or "")


def _argument_name(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    if action.nargs in ("+", "*"):
        name += "..."
    return f"[{name}]" if action.nargs in ("?", "*") else name


def _option_name(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings)
    if action.nargs == 0:
        return name
    value = action.metavar or action.dest.upper()
    if action.choices is not None and action.metavar is None:
        value = "|".join(map(str, action.choices))
    name += f" {value}"
    return f"{name}..." if action.nargs in ("+", "*") else name
