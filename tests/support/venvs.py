"""A Python with what is installed here and some packages more, which pip can get or not."""

import subprocess
import sys
from pathlib import Path

import pytest


def python_with(root: Path, *requirements: str, needs: bool = True) -> Path:
    """The python of a fresh environment below `root`. The test is skipped where pip has no network.

    needs: whether what the packages need is installed there, too.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    python = root / "venv" / "bin" / "python"
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site_of(python) / "needed.pth").write_text("\n".join(here) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += [] if needs else ["--no-deps"]
    asked = [*pip, "--retries", "1", *requirements]
    installed = subprocess.run(asked, capture_output=True, text=True, timeout=250)
    if installed.returncode:
        pytest.skip(f"pip has no network: {installed.stderr.strip().splitlines()[-1]}")
    return python


def site_of(python: Path) -> Path:
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", program], text=True).strip())
