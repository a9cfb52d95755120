"""One form of help for every command, complete at 80 columns, and words that are nearly right."""

import subprocess
import sys

import pytest
import typer

import launch.cli
from pipeline.config import UserError
from pipeline.usage import Parser, page
from trainer.commands import shards

COMMAND_NAMES = list(typer.main.get_command(launch.cli.app).commands)
OWN = [name for name in COMMAND_NAMES if name not in launch.cli.PASSED_ON]


@pytest.fixture
def narrow(referral, monkeypatch):
    """The command line on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return referral


def check_page(text: str, command: str) -> None:
    lines = text.splitlines()
    assert lines[0].startswith(f"Usage: {command}")
    assert "  -h, --help" in text and "Example" in text
    assert all(len(line) <= 80 for line in lines if not line.startswith("  referral"))
    cut = [line for line in lines if line.endswith("...") and "Usage" not in line]
    assert not [line for line in cut if not line.rstrip(".").isupper()], cut


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", OWN)
def test_every_command_has_a_page_with_an_example_that_is_whole_at_80_columns(
    narrow, command, option
):
    code, out, err = narrow(command, option)
    assert code == 0 and err == ""
    check_page(out, f"referral {command}")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_command_all_commands_are_listed_and_the_subcommands_of_shards(narrow, arguments):
    code, out, err = narrow(*arguments)
    assert code == 0 and err == ""
    check_page(out, "referral [OPTIONS] COMMAND")
    names = [*COMMAND_NAMES, *shards.EXAMPLES]
    assert all(f" {name}" in out for name in names)


@pytest.mark.parametrize("command", shards.EXAMPLES)
def test_a_subcommand_of_shards_has_the_same_page(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert shards.main([command, "-h"]) == 0
    check_page(capsys.readouterr().out, f"referral shards {command}")


def test_shards_alone_lists_its_subcommands(capsys):
    assert shards.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in shards.EXAMPLES)


@pytest.mark.parametrize("command", ["predict", "export", "doctor"])
def test_a_command_that_is_passed_on_has_the_same_page(capsys, monkeypatch, command):
    from trainer.__main__ import main

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "-h"])
    assert ended.value.code == 0
    check_page(capsys.readouterr().out, f"referral {command}")


def test_the_version_is_one_line(referral):
    code, out, err = referral("--version")
    assert code == 0 and out.startswith("referral ") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize("shell", launch.cli.SHELLS)
def test_a_shell_gets_a_script_that_completes(referral, shell):
    code, out, _ = referral("--show-completion", shell)
    assert code == 0 and "referral" in out and launch.cli.COMPLETE in out


def test_the_script_is_answered_with_the_words_that_fit():
    environment = {
        "PATH": "/usr/bin:/bin",
        launch.cli.COMPLETE: "complete_bash",
        "COMP_WORDS": "referral sta",
        "COMP_CWORD": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "launch"], capture_output=True, text=True, env=environment
    )
    assert ran.stdout.split() == ["status"], ran.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["stats", "run"], "No such command stats; did you mean status? (referral -h)"),
        (["run", "--frce"], "No such option --frce; did you mean --force? (referral run -h)"),
        (["--verson"], "No such option --verson; did you mean --version?"),
        (["status"], "Missing argument 'DIR' (referral status -h)"),
        (["status", "a", "b"], "unexpected extra argument"),
        (["run", "--run"], "'--run' requires an argument"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["--show-completion", "tcsh"], "must be one of bash, zsh, fish, powershell"),
    ],
)
def test_a_word_that_is_unknown_is_one_line_with_the_nearest(referral, arguments, words):
    code, out, err = referral(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.fixture
def parser():
    parser = Parser("referral x", "Do it.", "referral x file")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--device", metavar="NAME", help="where to compute (cpu)")
    parser.add_argument("--top", type=int, default=5)
    return parser


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Missing: FILE (referral x -h)"),
        (["a", "b"], "b: one argument too many"),
        (["a", "--devcie", "cpu"], "No such option --devcie; did you mean --device?"),
        (["a", "--dev", "cpu"], "No such option --dev; did you mean --device?"),
        (["a", "--top", "x"], "--top: invalid int value: 'x'"),
    ],
)
def test_argparse_says_it_in_the_same_way(parser, arguments, words):
    with pytest.raises(UserError) as error:
        parser.parse_args(arguments)
    assert words in str(error.value)


def test_a_page_breaks_lines_and_cuts_nothing_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    text = page("referral x", "word " * 40, [("Options", [("--" + "a" * 40, "word " * 40)])])
    assert max(map(len, text.splitlines())) <= 70 and text.count("word") == 80
