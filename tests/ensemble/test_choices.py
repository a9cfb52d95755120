"""The table of combiners."""

import subprocess
import sys
from pathlib import Path

import pytest

from ensemble import combine_kl
from ensemble.choices import COMBINERS, combiner

ROOT = Path(__file__).parents[2]


def test_reading_the_table_imports_nothing_heavy():
    code = (
        "import sys, ensemble.choices; "
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'scipy'})"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == ""


@pytest.mark.parametrize("name", COMBINERS)
def test_every_row_names_a_function(name):
    assert callable(combiner(name))


def test_a_name_leads_to_its_function():
    assert combiner("kl") is combine_kl


def test_an_unknown_name_is_an_error_with_the_valid_ones():
    with pytest.raises(ValueError, match="combine = 'mean' is unknown; .* kl, reverse_kl"):
        combiner("mean")


def test_a_new_row_is_a_new_combiner(monkeypatch, tmp_path):
    (tmp_path / "extra_combiner.py").write_text("def first(p_general, *_, **__): return p_general")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMBINERS, "first", "extra_combiner:first")
    assert combiner("first")(1, [], None) == 1
