"""The pages and messages of `pipeline.usage` for commands that typer makes.

    app = application("One sentence.", "an example")
    @app.command("name", cls=Command, epilog="referral name ...")

typer carries its own copy of click from 0.26 on, so what is click's is found through typer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from .config import UserError
from .usage import HELP_NAMES, HELP_ROW, Row, nearest, page, readable, sentence

CONTEXT = {"help_option_names": list(HELP_NAMES)}


class Command(TyperCommand):
    """A command whose help is `usage.page`. Its epilog is the example."""

    def format_help(self, ctx, formatter) -> None:
        formatter.write(_page(self, ctx, []))


class Group(TyperGroup):
    """A group of commands, each with its whole first sentence."""

    def format_help(self, ctx, formatter) -> None:
        commands = [
            (name, _first_paragraph(command.help or "")) for name, command in self.commands.items()
        ]
        formatter.write(_page(self, ctx, [("Commands", commands)]))


def application(text: str, example: str) -> typer.Typer:
    """A typer application of such commands."""
    return typer.Typer(
        cls=Group,
        help=text,
        epilog=example,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )


def call(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, by default its help.  Returns its exit code.

    Raises UserError, one line, for words that it does not know.
    """
    command = typer.main.get_command(app)
    try:
        # Not command.main, which has answers of its own to Ctrl-C and to a closed pipe.
        with command.make_context(name, list(arguments) or ["--help"]) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as ended:
        return ended.exit_code
    except usage_error() as error:
        raise UserError(explain(error)) from None


def usage_error() -> type[Exception]:
    """The base class of typer's usage errors, click's ClickException."""
    for base in typer.BadParameter.__mro__:
        if base.__name__ == "ClickException":
            return cast(type[Exception], base)
    raise AssertionError("typer.BadParameter is no ClickException")


def explain(error: Any) -> str:
    """One line: what is wrong, the nearest right word, and where the help is."""
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if context is None:
        return readable(message)
    unknown = re.match(r"No such (option|command):? '?([^\s']+?)'?(?:[.\s]|$)", message)
    if unknown:
        kind, word = unknown.groups()
        message = f"No such {kind} {word}{nearest(word, _words(context.command, kind))}"
    return f"{readable(message)} ({context.command_path} -h)"


def _words(command: Any, kind: str) -> list[str]:
    if kind == "command":
        return list(command.commands)
    options = [name for parameter in command.params for name in parameter.opts]
    return [*options, *HELP_NAMES]


def _page(command: Any, context: Any, more: list[tuple[str, list[Row]]]) -> str:
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    needed = [_option_name(each) for each in options if each.required]
    pieces = [context.command_path, *needed, "[OPTIONS]"]
    pieces += [_argument_name(each) for each in arguments]
    if more:
        pieces.append("COMMAND ...")
    sections = [
        *more,
        ("Arguments", [(_argument_name(each), sentence(each.help or "")) for each in arguments]),
        ("Options", [*(_option_row(each) for each in options), HELP_ROW]),
    ]
    return page(" ".join(pieces), command.help or "", sections, command.epilog or "")


def _first_paragraph(text: str) -> str:
    return text.strip().split("\n\n")[0]


def _argument_name(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    if parameter.nargs == -1 and not name.endswith("..."):
        name += "..."
    return name if parameter.required else f"[{name}]"


def _option_name(parameter: Any) -> str:
    names = ", ".join(parameter.opts)
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or _kind(parameter)}"


def _kind(parameter: Any) -> str:
    """What stands for a value without a name: N for whole numbers, X for others."""
    choices = getattr(getattr(parameter, "type", None), "choices", None)
    default = parameter.default
    if choices:
        return "|".join(map(str, choices))
    if isinstance(default, float):
        return "X"
    if isinstance(default, int) or getattr(parameter, "min", None) is not None:
        return "N"
    return parameter.name.upper().replace("_", "-")


def _option_row(parameter: Any) -> Row:
    text = sentence(parameter.help or "")
    default = parameter.default
    is_told = "[" in text or parameter.is_flag or parameter.required
    if default in (None, "", []) or is_told:
        return _option_name(parameter), text
    default = getattr(default, "value", default)
    return _option_name(parameter), f"{text} [{default}]".strip()
