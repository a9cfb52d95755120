"""The site of docs/ builds without a warning, and asks no other server for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A warning, such as a broken link or anchor, fails the build."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--site-dir", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_no_page_loads_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", html), page
        assert not re.findall(r"<link[^>]+href=\"?(?:https?:)?//[^>]+stylesheet", html), page
        assert 'class="mermaid"' not in html, page  # its script would come from a server


@pytest.mark.slow
def test_the_references_name_every_key_command_and_public_name(site):
    import clustering
    from pipeline.config import Config

    keys = (site / "reference" / "keys.html").read_text(encoding="utf-8")
    for section in ("train", "clusters", "ensemble"):
        for key in type(getattr(Config(), section)).model_fields:
            assert f"<code>{key}</code>" in keys, (section, key)
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in ("run", "advise", "predict", "shards folder", "doctor"):
        assert f"Usage: referral {name}" in commands, name
    python = (site / "reference" / "clustering.html").read_text(encoding="utf-8")
    for name in clustering.__all__:
        assert f".{name}" in python, name


def test_the_figures_are_those_that_the_script_draws():
    for name, draw in figures.FIGURES.items():
        assert (figures.PICTURES / f"{name}.svg").read_text(encoding="utf-8") == draw(), name


def test_the_figure_of_eq5_has_the_combiners_numbers():
    import torch

    from clustering import ClassGroups
    from ensemble import combine_kl

    general = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    special = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)
    q = combine_kl(general, [special], ClassGroups([[0, 1]], num_classes=4))[0]
    shown = re.findall(r">\.(\d\d)<", figures.eq5())[-4:]
    assert [f"{value:.2f}"[2:] for value in q.tolist()] == shown


def test_the_figure_of_the_advice_has_the_demos_numbers():
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    table = page.partition("## With advice")[2]
    rows = re.findall(r"^\| (?:\*\*)?(\w+)[^|]*\|([^|]*)\|([^|]*)\|", table, re.M)
    numbers = {name: (predicted, measured) for name, predicted, measured in rows}
    for name, gain, low, high, measured in figures.GAINS:
        written = [float(each) for each in re.findall(r"-?\d*\.\d+", numbers[name.split()[0]][0])]
        assert written == [gain, low, high], name
        there = re.findall(r"\d*\.\d+", numbers[name.split()[0]][1])
        assert (float(there[0]) if there else None) == measured, name
