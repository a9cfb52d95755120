"""What an installed copy holds, what it is called, and what it says of packages that lack."""

import email
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pipeline.extras
import referral
from pipeline.extras import EXTRAS, PACKAGES, install, is_clone, requirements
from pipeline.version import DISTRIBUTION, VERSION

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = PROJECT["project"]["optional-dependencies"]
TOP = ("clustering", "networks", "ensemble", "pipeline", "trainer", "launch", "referral")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", each)[0] for each in requirements}


# Names and versions


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


def test_the_distribution_has_one_name_and_one_version():
    assert PROJECT["project"]["name"] == DISTRIBUTION
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "pipeline.version.VERSION"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nobody_is_told_to_install_the_distribution_of_others():
    """`referral` on the package index is not this project."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    sources = [path for top in (*TOP, "slurm") for path in (ROOT / top).rglob("*.*")]
    for path in [*pages, *(path for path in sources if path.suffix in (".py", ".sh", ".j2"))]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install [\"']?referral(?![-_]classifiers)", text), path


# The namespace


@pytest.mark.parametrize("name", dir(referral))
def test_a_name_of_the_namespace_is_the_packages_own(name):
    room = referral._HOMES.get(name)
    if room is None:
        assert (name, referral.__version__) == ("__version__", VERSION)
        return
    module = sys.modules.get(room) or __import__(room)
    assert getattr(referral, name) is getattr(module, name)
    assert name in module.__all__


def test_type_checkers_see_the_names_that_are_there():
    text = Path(referral.__file__).read_text(encoding="utf-8")
    block = text.partition("if TYPE_CHECKING:")[2].partition("_NAMES_OF")[0]
    imported = set(re.findall(r"^        (\w+),$", block, re.M))
    assert imported == set(referral.__all__) - {"__version__"} == referral._HOMES.keys()


def test_a_name_that_is_not_there_is_no_attribute():
    with pytest.raises(AttributeError, match="'referral' has no attribute 'combine_all'"):
        _ = referral.combine_all


def test_the_namespace_loads_no_torch_and_no_numpy():
    program = "import sys, referral; dir(referral); print(*{'torch', 'numpy'} & sys.modules.keys())"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not ran.stdout.strip()


def test_python_m_referral_is_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "referral", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.stdout == f"referral {VERSION}\n"


# Extras


def test_the_table_of_extras_has_the_packages_of_pyproject():
    listed = {
        extra: {PACKAGES.get(module, module) for module in modules}
        for extra, modules in EXTRAS.items()
    }
    of_developers = {"test", "docs"}
    assert listed == {extra: names(OPTIONAL[extra]) for extra in set(OPTIONAL) - of_developers}


def test_deepspeed_is_in_its_own_extra_alone():
    having = [extra for extra in OPTIONAL if "deepspeed" in names(OPTIONAL[extra])]
    assert having == ["deepspeed"]


class Installed:
    """Of importlib.metadata: a wheel that was installed, with these lines in its METADATA."""

    LINES = (
        "numpy>=1.26",
        'torch>=2.6; extra == "train"',
        "scipy>=1.13 ; extra == 'train'",
        'onnx>=1.17; extra == "onnx"',
    )

    def requires(self, name: str) -> list[str]:
        assert name == DISTRIBUTION
        return list(self.LINES)


def test_in_a_clone_the_remedy_is_its_extra_wherever_one_stands():
    command = shlex.split(install("onnx"))
    assert command == ["pip", "install", "-e", f"{ROOT}[onnx]"] and Path(ROOT).is_absolute()


def test_of_a_wheel_the_remedy_names_the_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.extras, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", Installed().requires)
    assert install("train") == "pip install 'torch>=2.6' 'scipy>=1.13'"
    assert install("onnx") == "pip install 'onnx>=1.17'"


def test_of_files_that_nobody_installed_the_remedy_has_names_alone(monkeypatch, tmp_path):
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pipeline.extras, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert install("stores") == "pip install fsspec s3fs gcsfs huggingface_hub"
    assert "scikit-learn" in requirements("train") and "sklearn" not in requirements("train")


def test_a_pyproject_of_others_beside_the_packages_makes_no_clone(tmp_path):
    assert is_clone(ROOT) and not is_clone(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert not is_clone(tmp_path)
    (tmp_path / "pyproject.toml").write_text("not [ toml")
    assert not is_clone(tmp_path)


# A wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, by the hooks that `python -m build` calls."""
    pytest.importorskip("setuptools", "77")
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "clone"
    copy = ["git", "clone", "--quiet", str(ROOT), str(source)]
    subprocess.run(copy, check=True)
    program = (
        "from setuptools import build_meta\n"
        f"print(build_meta.build_sdist({str(out)!r}))\n"
        f"print(build_meta.build_wheel({str(out)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=source, capture_output=True)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A Python with the wheel alone, and the packages that it needs from here."""
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    python = root / "venv" / "bin" / "python"
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", program], text=True).strip())
    # A line of a .pth adds the directory alone: the clone that is installed there stays out.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "needed.pth").write_text("\n".join(here) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    wheel = next(built.glob("*.whl"))
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return root / "venv" / "bin"


def run(command: list[str], cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_wheel_works_where_no_clone_is(installed, tmp_path):
    referral_command = str(installed / "referral")
    assert run([referral_command, "--version"], tmp_path) == f"referral {VERSION}\n"
    assert "--quick" in run([referral_command, "demo", "--help"], tmp_path)
    program = (
        "import json, referral, trainer, launch.slurm, slurm\n"
        "from pathlib import Path\n"
        "from pipeline.extras import EXTRAS, install\n"
        "files = [module.__file__ for module in (referral, trainer, launch.slurm)]\n"
        "scripts = sorted(path.name for path in Path(slurm.__path__[0]).glob('s*'))\n"
        "remedies = {extra: install(extra) for extra in EXTRAS}\n"
        "print(json.dumps([referral.__version__, files, scripts, remedies]))\n"
    )
    version, files, scripts, remedies = json.loads(
        run([str(installed / "python"), "-c", program], tmp_path)
    )
    assert version == VERSION and scripts == ["site.sh", "stage.sbatch"]
    assert all(str(installed.parent) in file for file in files)
    for extra, command in remedies.items():
        assert shlex.split(command) == ["pip", "install", *OPTIONAL[extra]]
    examples = installed.parent / "share" / "referral" / "examples"
    assert {path.name for path in examples.iterdir()} == {"folder.toml", "naics.toml"}


@pytest.mark.slow
def test_a_wheels_metadata_is_what_an_index_shows(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        files = wheel.namelist()
        metadata = email.message_from_bytes(
            wheel.read(next(name for name in files if name.endswith(".dist-info/METADATA")))
        )
    assert (metadata["Name"], metadata["Version"]) == (DISTRIBUTION, VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The Referral authors"
    assert set(metadata.get_all("Provides-Extra", [])) == OPTIONAL.keys()
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
def test_an_sdist_has_what_a_clone_has(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    left_out = {path for path in tracked if path.startswith(".")}
    assert set(tracked) - left_out <= files
