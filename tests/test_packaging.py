"""What an installed copy holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP = ("clustering", "networks", "ensemble", "pipeline", "trainer", "launch")


def test_every_package_is_installed():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    }
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == packages | {"slurm"}


def test_every_top_level_package_says_that_it_is_typed():
    assert all((ROOT / top / "py.typed").is_file() for top in TOP)
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]
