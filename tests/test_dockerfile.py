"""What the Dockerfile copies is there, and is all that the wheel is made of."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def allowed() -> set[str]:
    """What .dockerignore lets into the build: it begins by leaving out everything."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


def test_all_that_is_let_into_the_build_exists():
    assert [name for name in allowed() if not (ROOT / name).exists()] == []


def test_the_build_has_every_package_and_every_file_that_pyproject_names():
    with open(ROOT / "pyproject.toml", "rb") as file:
        content = tomllib.load(file)
    project, setuptools = content["project"], content["tool"]["setuptools"]
    named = [project["readme"], *project["license-files"], *setuptools["packages"]]
    named += [path for paths in setuptools["data-files"].values() for path in paths]
    tops = {re.split(r"[./](?!md$)", name)[0] for name in named}
    assert tops - allowed() == set()


def test_files_that_are_copied_from_the_build_are_let_into_it():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = set(re.findall(r"/source/(\S+)", text))
    assert copied == {"constraints.txt"} and copied <= allowed()
