"""Everything that is wrong is said before anything is written."""

import json
import os

import pytest

from launch.plan import plan
from launch.prepare import absolute, changed_keys, check, lay_out, save_environment
from pipeline.config import UserError, load_config
from pipeline.store import read_json


def error_of(ward, *overrides, **options) -> str:
    with pytest.raises(UserError) as caught:
        check(ward.config(*overrides), ward.run_path, **options)
    return str(caught.value)


def test_a_laid_out_run_holds_its_config_and_its_graph(ward):
    run, stale = check(ward.config(), ward.run_path)
    assert not stale and not ward.run_path.exists()
    ward.run_path.mkdir()
    lay_out(run, plan(run), stale)
    save_environment(ward.run_path)
    assert load_config(ward.run_path / "config.toml") == run.config
    assert len(read_json(ward.run_path / "graph.json")["jobs"]) == len(plan(run))
    assert read_json(ward.run_path / "environment.json")["packages"]["pydantic"]


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.train=", "data.train is empty"),
        ("data.val=nowhere/val-{000000..000003}.tar", "data.val = .*nowhere.*no shard matches"),
        ("data.val=nowhere/val-*.tar", "no shard matches"),
        ("data.test=data/test-{000000..00000", "the braces do not match|no shard matches"),
        ("clusters.num_groups=0", "clusters.num_groups = 0: must be greater than 0"),
        ("clusters.num_groups=9", "clusters.num_groups = 9 is more than the 8 classes"),
        (
            "data.classes=5",
            "data.classes = 5, but .* names 8 classes: class index 7 is out of range",
        ),
    ],
)
def test_an_error_in_the_config_is_named(ward, override, words):
    with pytest.raises(UserError, match=words):
        check(ward.config(override), ward.run_path)
    assert not ward.run_path.exists()


def test_a_directory_of_shards_is_a_pattern(ward):
    check(ward.config(f"data.train={ward.data}"), ward.run_path)
    empty = ward.root / "empty"
    empty.mkdir()
    assert "holds neither" in error_of(ward, f"data.train={empty}")


def test_shards_behind_urls_are_left_to_the_trainer(ward):
    urls = "https://example.org/train-{000000..000009}.tar::pipe:cat x.tar"
    run, _ = check(ward.config(f"data.train={urls}"), ward.run_path)
    assert run.config.data.train == urls


def test_without_a_manifest_classes_are_left_to_the_trainer(ward):
    (ward.data / "manifest.json").unlink()
    check(ward.config("clusters.num_groups=100"), ward.run_path)
    assert "more than the 50 classes" in error_of(
        ward, "clusters.num_groups=100", "data.classes=50"
    )


def test_a_broken_manifest_is_named(ward):
    (ward.data / "manifest.json").write_text("{")
    assert "not a readable manifest" in error_of(ward)


def test_groups_of_ones_own_are_checked_against_the_classes(ward):
    path = ward.root / "groups.json"
    for content, words in [
        ({"members": [[0, 1], [2, 8]]}, "class index 8 is out of range"),
        ({"members": []}, "holds no group"),
        ({"groups": 3}, "not a readable ClassGroups file"),
        ({"members": [["x"]]}, "not lists of class indices"),
    ]:
        path.write_text(json.dumps(content))
        assert words in error_of(ward, f"clusters.groups_file={path}")
    path.write_text(json.dumps({"members": [[0, 1], [2, 7]]}))
    run, _ = check(ward.config(f"clusters.groups_file={path}"), ward.run_path)
    assert len(run.specialists) == 2


def test_a_run_whose_classes_are_added_to_has_all_that_is_taken_over(ward):
    settings = ward.old_run(groups=3)
    assert len(check(ward.config(*settings), ward.run_path)[0].specialists) == 4
    assert "is this run itself" in error_of(ward, f"extend.run={ward.root}/old/../run")
    (ward.root / "old" / "specialists" / "002" / "DONE").unlink()
    assert "specialists/002 not done; finish that run first" in error_of(ward, *settings)
    (ward.root / "old" / "clusters" / "summary.json").write_text(json.dumps({"skipped": [2]}))
    check(ward.config(*settings), ward.run_path)
    (ward.root / "old" / "clusters" / "groups.json").unlink()
    assert "no run of specialists" in error_of(ward, *settings)


def test_no_length_of_training_is_an_error(ward):
    del ward.values["train"]
    assert "set train.steps or train.epochs" in error_of(ward)


def test_a_directory_that_is_no_run_is_left_alone(ward):
    ward.run_path.mkdir()
    (ward.run_path / "thesis.tex").touch()
    assert "holds thesis.tex and is not a run" in error_of(ward)
    check(ward.config(), ward.run_path, beside=("thesis.tex",))


def test_a_run_below_a_file_is_an_error(ward):
    ward.toml.touch()
    with pytest.raises(UserError, match="not a directory"):
        check(ward.config(), ward.toml)
    with pytest.raises(UserError, match="not a directory"):
        check(ward.config(), ward.toml / "run")


def test_no_permission_to_write_is_an_error(ward, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission to write" in error_of(ward)


def test_another_config_names_its_keys_and_the_stages_behind_them(ward):
    run = ward.run()
    ward.finish([run.generalist, run.measure, run.cluster])
    run.specialists[1].begin()
    words = error_of(ward, "specialists.steps=30", "launch.pool=7")
    assert "specialists.steps: 20 -> 30" in words
    assert "specialists/001" in words and "generalist" not in words and "launch" not in words
    assert "--force" in words


def test_force_clears_just_the_stale_stages(ward):
    run = ward.run()
    ward.finish([run.generalist, *run.specialists])
    changed, stale = check(ward.config("specialists.steps=30"), ward.run_path, force=True)
    assert stale == changed.specialists
    lay_out(changed, plan(changed), stale)
    assert changed.generalist.is_done and not any(stage.is_begun for stage in changed.specialists)
    assert check(ward.config("specialists.steps=30"), ward.run_path)[1] == []


def test_a_change_that_makes_nothing_stale_is_accepted(ward):
    run = ward.run()
    ward.finish([run.generalist])
    changed, stale = check(ward.config("launch.pool=1", "students.main.steps=41"), ward.run_path)
    assert changed.generalist.is_done and not stale


def test_other_data_under_the_same_name_makes_a_run_stale(ward):
    ward.finish([ward.run().generalist])
    ward.write_manifest([*CLASSES_REVERSED])
    words = error_of(ward)
    assert "other data" in words and "generalist" in words


CLASSES_REVERSED = "hgfedcba"


def test_moved_data_do_not(ward):
    ward.finish([ward.run().generalist])
    moved = ward.root / "elsewhere"
    ward.data.rename(moved)
    overrides = [
        f"data.{split}={moved}/{split}-{{000000..000003}}.tar" for split in ("train", "val", "test")
    ]
    run, stale = check(ward.config(*overrides), ward.run_path)
    assert run.generalist.is_done and not stale


def test_paths_are_made_absolute(ward, monkeypatch):
    monkeypatch.chdir(ward.root)
    config = absolute(
        ward.config(
            "data.train=data/train-000000.tar::https://x/y.tar", "clusters.groups_file=g.json"
        )
    )
    assert config.data.train == f"{ward.data}/train-000000.tar::https://x/y.tar"
    assert config.clusters.groups_file == str(ward.root / "g.json")
    assert config.generalist.init == config.data.transfer == ""
    assert config.data.manifest is None
    config = absolute(ward.config("data.transfer=more", "data.manifest=m.json"))
    assert config.data.transfer == str(ward.root / "more")
    assert config.data.manifest == str(ward.root / "m.json")
    assert absolute(ward.config("data.manifest=http://x/m.json")).data.manifest == "http://x/m.json"
    start = absolute(ward.config("specialists.from=runs/other")).specialists.start
    assert start == str(ward.root / "runs/other")
    assert absolute(ward.config("specialists.from=member")).specialists.start == "member"


def test_what_specialists_start_as_exists(ward):
    where = ward.root / "no-network"
    assert f"specialists.from: {where} holds no network" in error_of(
        ward, f"specialists.from={where}"
    )


def test_changed_keys_are_dotted_with_old_and_new(ward):
    new = ward.config("students.b.steps=3", "seed=4", "slurm.specialists.cpus=2")
    changed = changed_keys(ward.config(), new)
    assert ("seed", 0, 4) in changed and ("students.b.steps", None, 3) in changed
    assert not any(key.startswith("slurm") for key, *_ in changed)
