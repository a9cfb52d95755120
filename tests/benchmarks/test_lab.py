"""benchmarks.papers.lab: what a page keeps, what a quick look may do, JSON without NaN."""

import json
import math

import pytest
from toy import toy_config, write_toy

from benchmarks.papers import lab
from benchmarks.papers.lab import write_section


def test_a_section_is_replaced_the_others_and_what_a_person_wrote_below_it_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## One\n\nold table\n\n### By hand\n\nprose\n\n## Two\n\nother\n",
        encoding="utf-8",
    )
    write_section("One", "new table", page)
    expected = "# Page\n\n## One\n\nnew table\n\n### By hand\n\nprose\n\n## Two\n\nother\n"
    assert page.read_text() == expected
    write_section("Two", "another", page)
    write_section("Three", "third", page)
    assert page.read_text().endswith("prose\n\n## Two\n\nanother\n\n## Three\n\nthird\n")


def test_a_quick_look_has_one_seed_begins_afresh_and_is_never_written(tmp_path, capsys):
    (tmp_path / "quick" / "old").mkdir(parents=True)
    (tmp_path / "seed-0").mkdir()
    parser, to = lab.arguments("doc"), ["--to", str(tmp_path)]
    assert lab.parsed(parser, to).seeds == [0, 1, 2]
    assert (tmp_path / "quick" / "old").exists()
    options = lab.parsed(parser, [*to, "--quick"])
    assert (options.seeds, options.to) == ([0], tmp_path / "quick")
    assert list(options.to.iterdir()) == [] and (tmp_path / "seed-0").exists()
    assert lab.parsed(parser, [*to, "--quick", "--seeds", "4", "5"]).seeds == [4, 5]
    with pytest.raises(SystemExit):
        lab.parsed(parser, [*to, "--quick", "--write"])
    assert "mean nothing" in capsys.readouterr().err


def test_the_last_line_is_json_even_where_a_metric_is_no_number(capsys):
    options = lab.parsed(lab.arguments("doc"), ["--to", "/tmp", "--seeds", "3"])
    lab.print_json({"kept": {1.5: math.nan}, "dee": [math.inf, 2.0]}, options, "the command")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["kept"] == {"1.5": None} and line["dee"] == [None, 2.0]
    assert line["conditions"]["seeds"] == [3] and line["conditions"]["command"] == "the command"


def test_absent_real_data_end_a_program_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        lab.require(tmp_path / "mnist")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_run_of_one_process_is_done_for_referral_run(tmp_path):
    settings = ["train.steps=20", "specialists.steps=4", "students.main.steps=4"]
    config = toy_config(write_toy(tmp_path / "data"), "controls.enabled=false").dump()
    results = lab.finished(config, tmp_path / "run", settings, in_process=True)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("DONE")}
    assert lab.finished(config, tmp_path / "run", settings) == results
    assert done == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("DONE")}
