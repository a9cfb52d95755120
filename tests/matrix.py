"""The wheel, installed beside the lowest and the newest versions of what it needs, runs a demo.

    python tests/matrix.py dist/*.whl [PYTHON:lowest|newest ...]        (make test-matrix)

Each row has an environment of its own, with the extras train and onnx.  It works in a directory
that holds a trainer.py, a networks/ and a numpy.py, as a user's may, which nobody may import:
--version, doctor, import referral, demo --quick, export --onnx, predict.  The lowest
versions are those of pyproject.toml, raised to the first that has a wheel for that Python.
Without rows: both kinds on each Python of PYTHONS that is found.  Needs uv and a package index.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.13")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
SHOWN = ("torch", "numpy", "scipy", "scikit-learn", "pydantic", "typer", "onnx")
NAMES = "import referral\nfor name in dir(referral): getattr(referral, name)"
SMOKE = (
    ["referral", "--version"],
    ["referral", "doctor"],
    ["python", "-P", "-c", NAMES],
    ["referral", "demo", "--quick", "--run", "demo"],
    ["referral", "export", "demo", "--to", "exported", "--onnx"],
    ["referral", "predict", "exported", "demo/data/test-000000.tar", "--top", "1"],
)
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "uv"


class Row(NamedTuple):
    python: str
    resolution: str


def main(wheel: str, *names: str) -> int:
    rows = [Row(*name.split(":")) for name in names]
    if not rows:
        pythons = [version for version in PYTHONS if find_python(version)]
        for version in sorted(set(PYTHONS) - set(pythons)):
            print(f"Python {version}: not found, not tried")
        rows = [Row(version, kind) for version in pythons for kind in RESOLUTIONS]
    failed = 0
    for row in rows:
        with tempfile.TemporaryDirectory(prefix="matrix-") as directory:
            line, code = try_row(row, Path(wheel).resolve(), Path(directory))
        failed += code != 0
        print(line, flush=True)
    return 1 if failed else 0


def find_python(version: str) -> str:
    """The path of a Python, "" without one.

    pyenv puts a shim for each into PATH, which ends with an error where it is not switched on, and
    uv then looks no further. So pyenv's own directories come first.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    own = sorted(pyenv.glob(f"versions/{version}.*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, own), os.environ["PATH"]])
    ran = subprocess.run(
        [UV, "python", "find", "--no-python-downloads", version],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return ran.stdout.strip()


def try_row(row: Row, wheel: Path, directory: Path) -> tuple[str, int]:
    """A line of the table in docs/install.md, and an exit code."""
    start = time.monotonic()
    what = f"| {row.python} | {row.resolution} "
    python = find_python(row.python)
    if not python:
        return f"{what}| Python {row.python} is not found |", 1
    requirements = directory / "requirements.txt"
    resolve(row, python, requirements)
    venv = install(python, requirements, wheel, directory)
    versions = [pinned(requirements, package) for package in SHOWN]
    here = users_directory(directory / "here")
    environment = {**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for command in SMOKE:
        ran = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        if ran.returncode:
            print(ran.stdout[-2000:], ran.stderr[-4000:], sep="\n", file=sys.stderr)
            failed = " ".join(command[:2])
            return f"{what}| {' | '.join(versions)} | {failed} ends with {ran.returncode} |", 1
    seconds = time.monotonic() - start
    return f"{what}| {' | '.join(versions)} | all pass in {seconds:.0f} s |", 0


def users_directory(here: Path) -> Path:
    """A directory with modules of names that are ours, or our libraries'. To import one fails."""
    (here / "networks").mkdir(parents=True)
    for name in ("trainer.py", "networks/__init__.py", "numpy.py"):
        text = f"raise SystemExit('{name} of the working directory was imported')\n"
        (here / name).write_text(text, encoding="utf-8")
    return here


def resolve(row: Row, python: str, requirements: Path) -> None:
    command = [UV, "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    command += ["--resolution", RESOLUTIONS[row.resolution], "--only-binary", ":all:"]
    command += ["--python", python, "--extra", "train", "--extra", "onnx"]
    command += [str(ROOT / "pyproject.toml"), "--output-file", str(requirements)]
    subprocess.run(command, check=True)


def install(python: str, requirements: Path, wheel: Path, directory: Path) -> Path:
    venv = directory / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", python, str(venv)], check=True)
    into = [UV, "pip", "install", "--quiet", "--python", str(venv)]
    subprocess.run([*into, "--requirement", str(requirements)], check=True)
    subprocess.run([*into, "--no-deps", str(wheel)], check=True)
    return venv


def pinned(requirements: Path, package: str) -> str:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    versions = [line.split("==")[1] for line in lines if line.startswith(f"{package}==")]
    return f"{package} {versions[0]}" if versions else f"{package} -"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
