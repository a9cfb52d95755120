"""What is shown of texts that others wrote: no secret of a URL, no control sequence, no NaN."""

import io
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from pipeline.config import UserError
from pipeline.failures import print_error
from pipeline.files import NotFinite, json_text, write_json
from pipeline.redaction import printable, redacted, shown
from pipeline.terminal import Console

SECRET = "hunter2-0a1B"
HOSTILE = "\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 \u202e name"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"http://me:{SECRET}@host/x.tar", "http://***@host/x.tar"),
        (f"https://{SECRET}@host/x.tar", "https://***@host/x.tar"),
        (f"s3://b/x?X-Amz-Signature={SECRET}&a=1", "s3://b/x?X-Amz-Signature=***&a=1"),
        (
            f"https://h/x?a=1&X-Amz-Security-Token={SECRET}",
            "https://h/x?a=1&X-Amz-Security-Token=***",
        ),
        (f"https://h/x?sv=2&sig={SECRET}", "https://h/x?sv=2&sig=***"),
        (f"https://h/x?token={SECRET}#part", "https://h/x?token=***#part"),
        (
            f"pipe:curl -H 'Authorization: Bearer {SECRET}' h",
            "pipe:curl -H 'Authorization: Bearer ***' h",
        ),
        ("http://host:8080/a@b/train-0.tar?part=1", "http://host:8080/a@b/train-0.tar?part=1"),
        ("mail me@host; weights=[1, 2]", "mail me@host; weights=[1, 2]"),
    ],
)
def test_what_lets_in_who_reads_it_is_hidden_and_nothing_else(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


def test_an_error_holds_no_secret_wherever_it_goes():
    error = UserError(f"http://me:{SECRET}@host/x?token={SECRET}: cannot be fetched")
    assert str(error) == "http://***@host/x?token=***: cannot be fetched"


@given(st.text())
def test_what_is_printable_has_nothing_that_a_terminal_obeys(text):
    seen = printable(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in seen)
    assert printable(seen) == seen


def test_texts_of_several_lines_keep_their_lines():
    assert shown("a\n\tb\x1b[2J\r") == "a\n\tb\\x1b[2J\\r"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_console_prints_no_sequence_but_its_own(is_terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, color_system=None, width=200)
    table = Table("name")
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="bold"))
    console.print(HOSTILE, Text(f"http://me:{SECRET}@host/"), table, markup=False)
    printed = file.getvalue()
    assert printed.count("\\x1b[2J") == 3 and SECRET not in printed
    for sequence in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\x00", "\u202e"):
        assert sequence not in printed


def test_an_error_line_and_a_log_line_are_shown(capsys):
    from trainer.session import ShownFormatter

    print_error(f"{HOSTILE} http://a:{SECRET}@h/")
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\x9b" not in error and SECRET not in error
    record = logging.LogRecord("x", 20, "f", 1, "%s ?token=%s", (HOSTILE, SECRET), None)
    line = ShownFormatter("%(message)s").format(record)
    assert "\x1b" not in line and SECRET not in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_number_that_is_none(tmp_path, value):
    with pytest.raises(NotFinite, match=r"x\.json: a\.1\.b is no finite number") as error:
        json_text({"a": [0.0, {"b": value}]}, "x.json")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError):
        write_json(tmp_path / "x.json", {"a": value})
    assert not list(tmp_path.iterdir())


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_json_says_what_was_said_without_control_characters(text, number):
    value = {text: [number, text]}
    written = json_text(value, "x", ensure_ascii=False)
    assert json.loads(written) == value
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in written)
