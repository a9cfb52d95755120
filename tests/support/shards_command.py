"""`referral shards` in this process: what it does, and what it refuses."""

import json

import pytest

from pipeline.config import UserError
from trainer.commands.shards import main


def run(*argv) -> int:
    return main([str(word) for word in argv])


def refusal(*argv) -> str:
    """The one line of the error."""
    with pytest.raises(UserError) as error:
        run(*argv)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def counts_of(directory) -> dict[str, int]:
    """{split: samples} of its manifest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    return {split: entry["samples"] for split, entry in manifest["splits"].items()}
