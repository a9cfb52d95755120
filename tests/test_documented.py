"""What the docs and the helps print works: every command is parsed, every value is loaded."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import typer

import launch.cli
from pipeline.config import UserError, load_config
from pipeline.typer_usage import explain, usage_error
from trainer.__main__ import COMMANDS, parse
from trainer.commands import shards

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for room in ("launch", "pipeline", "trainer")
    for path in sorted((ROOT / room).rglob("*.py"))
]


# Commands


def written_commands() -> list[str]:
    """`referral ...` in the code blocks and code spans of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^    +(?:\$ )?(referral .+)$", text, re.M)
        found += [*blocks, *re.findall(r"`(referral [^`\n]+)`", text)]
    return sorted(set(found))


def words_of(command: str) -> list[str]:
    """Without the remark behind it. Of `[--a | --b]` the first."""
    command = re.split(r"  +#|  +|; | \\$", command)[0]
    command = re.sub(r"\[([^]|]*)(\|[^]]*)?\]", r"\1", command)
    return shlex.split(command.replace(" N ", " 1 "))[1:]


def launcher_command(name: str):
    return typer.main.get_command(launch.cli.app).commands[name]


def read(words: list[str]) -> None:
    """Parse a command line as the command does, and start nothing.  Raises UserError."""
    name, *arguments = words
    if name in ("--show-completion", "--version"):
        return
    assert name in typer.main.get_command(launch.cli.app).commands, words
    if name == "shards":
        app = typer.Typer()
        shards.add_commands(app)
        subcommand, *arguments = arguments or ["folder"]
        read_by(typer.main.get_command(app).commands[subcommand], f"shards {subcommand}", arguments)
    elif name in passed_on():
        parser_of(name).parse_args(arguments)
    else:
        read_by(launcher_command(name), name, arguments)


def passed_on() -> list[str]:
    """The commands of `referral` that the trainer does."""
    commands = typer.main.get_command(launch.cli.app).commands
    return [name for name, command in commands.items() if command.callback.__name__ == "pass_on"]


def parser_of(name: str):
    """A passed-on command's parser: its module has a function `_parser` that makes it."""
    return import_module(COMMANDS[launch.cli.PASSED_ON[name]].partition(":")[0])._parser()


def read_by(command, name: str, arguments: list[str]) -> None:
    try:
        command.make_context(name, list(arguments))
    except usage_error() as error:
        raise UserError(explain(error)) from None


@pytest.mark.parametrize("command", written_commands())
def test_a_command_of_the_docs_is_one(command):
    try:
        read(words_of(command))
    except UserError as error:  # a name in a sentence stands without its arguments
        assert str(error).startswith("Missing"), command


def examples() -> list[str]:
    """The examples of all helps."""
    commands = typer.main.get_command(launch.cli.app)
    texts = [commands.epilog, *(each.epilog or "" for each in commands.commands.values())]
    texts += shards.EXAMPLES.values()
    texts += [parser_of(name).example for name in passed_on() if name != "shards"]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if "torchrun" not in line]


def test_an_example_of_a_help_is_complete():
    for command in examples():
        read(shlex.split(command)[1:])


def test_torchrun_reads_what_the_docs_and_helps_write():
    """Without a `--` it takes the trainer's --run for its own --run-path."""
    from torch.distributed.run import get_args_parser

    lines = []
    for path in [*PAGES, *SOURCES]:
        lines += re.findall(r"torchrun [^`\"\n(]*-m trainer [^`\"\n(]*", path.read_text("utf-8"))
    lines = [line for line in lines if line.startswith("torchrun") and "STAGE" not in line]
    assert len(lines) >= 3
    for line in lines:
        line = line.split("\\n")[0]
        options = get_args_parser().parse_args(shlex.split(line)[1:])
        assert options.training_script == "trainer", line
        # argparse keeps the `--` or not, by its version. So trainer.__main__ passes over it.
        arguments = [word for word in options.training_script_args if word != "--"]
        if arguments[0] not in COMMANDS:
            assert parse(arguments).run


# Values


def alternatives() -> list[tuple[str, str]]:
    """(section.key, value) of every value that docs/config.md offers above a key: a | b | c."""
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    found, section, comment = [], "", ""
    for line in text.splitlines():
        if line.startswith("# "):
            comment += f" {line[2:]}"
            continue
        if heading := re.match(r"\[([\w.]+)\]", line):
            section = heading[1]
        elif row := re.match(r"(\w+) = ", line):
            found += [(f"{section}.{row[1]}", name) for name in offered_in(comment)]
        comment = ""
    return found


def offered_in(comment: str) -> list[str]:
    """The names in the first sentence that lists some: `what it is: one (so) | two: and why`."""
    sentences = re.split(r"\. (?=[A-Z])", comment)
    listing = next((each for each in sentences if " | " in each), None)
    if listing is None:
        return []
    *others, last = listing.split(" | ")
    others[0] = re.sub(r"^.*: ", "", others[0])
    names = []
    for words in [*others, last.split(": ")[0]]:
        if value := re.match(r"\s*\"?([\w:-]+)\"?(?: \(or (\w+)\))?", words):
            names += [name for name in value.groups() if name]
    return names


STAND_INS = {
    "timm:NAME": "timm:resnet18",
    "module:function": "mine:build",
    "last-N-blocks": "last-2-blocks",
    "another": "other",
    "a": "runs/other",
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow"],
}
BESIDE = {
    "hydra": ["ensemble.kind=deep"],
    "batch_ensemble": ["ensemble.kind=deep"],
    "arcface": ["model.head=cosine"],
    "head": ["generalist.from=theirs.pt"],
    "last-N-blocks": ["generalist.from=theirs.pt"],
}


@pytest.mark.parametrize("key, value", alternatives())
def test_a_value_that_the_docs_offer_is_accepted(key, value):
    written = STAND_INS.get(value, value)
    settings = ["students.other.steps=1", *BESIDE.get(value, []), f"{key}={written}"]
    load_config(None, settings)


def test_the_docs_offer_what_there_is():
    offered = alternatives()
    assert len(offered) > 50 and ("ensemble.combine", "mean") in offered
    assert ("students.main.perturb", "conf_ods") in offered


def settings() -> list[str]:
    """`section.key = value` and `--set section.key=value` in the sentences of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        spans = re.findall(r"`(?:--set )?([a-z_]+(?:\.\w+)+) ?= ?([^`\n]+)`", text)
        found += [f"{key}={value}" for key, value in spans]
    return sorted(set(found) - {"section.key=value"})


@pytest.mark.parametrize("setting", settings())
def test_a_setting_in_a_sentence_of_the_docs_is_accepted(setting):
    load_config(None, [setting])


def test_every_config_that_the_docs_show_is_accepted():
    for page in PAGES:
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            assert load_config(None, [], tomllib.loads(block))
