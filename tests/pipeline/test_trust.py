"""What a run's config names is executed where it was laid out. Elsewhere by --trust."""

import copy
import shutil

import pytest

from pipeline.config import UserError, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.trust import (
    COMMAND,
    FUNCTION,
    SLURM,
    Code,
    check_trusted,
    code_in,
    code_of,
    record,
)

BASE = {"data": {"train": "/t", "val": "/v", "test": "/e", "label": "json:cls"}}


def run_with(root, *settings) -> RunDirectory:
    root.mkdir(exist_ok=True)
    config = load_config(
        None, ["train.steps=9", "specialists.steps=9", *settings], copy.deepcopy(BASE)
    )
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


@pytest.mark.parametrize(
    "setting, kind",
    [
        ("data.decoders.bin=os:system", FUNCTION),
        ("data.decoders.bin=with-dash:f", FUNCTION),
        ("data.augment=os:system", FUNCTION),
        ("model.name=os:system", FUNCTION),
        ('students.main.model={name="os:system"}', FUNCTION),
        ('controls={model={name="os:system"}, rows=["wider"]}', FUNCTION),
        ("students.main.augment=os:system", FUNCTION),
        ("data.train=pipe:cat x.tar", COMMAND),
        ("data.test=/a/b.tar:: pipe:cat x.tar", COMMAND),
        ("data.manifest=pipe:cat m.json", COMMAND),
        ('slurm.generalist.extra=["--export=BASH_ENV=x"]', SLURM),
    ],
)
def test_every_key_that_names_something_to_execute_is_known(tmp_path, setting, kind):
    key = setting.partition("=")[0]
    run = run_with(tmp_path / "run", setting)
    (code,) = code_in(run.config)
    assert code.kind == kind and code.key.startswith(key)
    with pytest.raises(UserError) as error:
        check_trusted(run, False)
    message = str(error.value)
    assert "\n" not in message and key in message and message.endswith("add --trust")
    check_trusted(run, True)
    check_trusted(run, False, named=[code])
    check_trusted(run, False, {FUNCTION, COMMAND, SLURM} - {kind})


def test_what_is_built_in_or_data_is_no_code(tmp_path):
    settings = ("model.name=timm:resnet18", "data.train=http://x/a.tar", "students.main.model={}")
    assert code_in(run_with(tmp_path / "run", *settings).config) == []


def test_a_run_that_was_laid_out_here_is_known_by_place_key_and_value(tmp_path):
    run = run_with(tmp_path / "run", "data.augment=mine:f")
    record(run)
    check_trusted(run, False)
    check_trusted(run_with(tmp_path / "run", "data.augment=mine:f", "seed=3"), False)
    for other in (
        run_with(tmp_path / "run", "data.augment=os:system"),
        run_with(tmp_path / "run", "model.name=mine:f"),
        run_with(tmp_path / "elsewhere", "data.augment=mine:f"),
    ):
        with pytest.raises(UserError, match="was not made here by you"):
            check_trusted(other, False)


def test_a_copied_run_brings_no_record_along(tmp_path):
    run = run_with(tmp_path / "run", "data.augment=mine:f")
    record(run)
    shutil.copytree(run.root, tmp_path / "copy")
    with pytest.raises(UserError, match="was not made here by you"):
        check_trusted(RunDirectory(tmp_path / "copy", run.config), False)


def test_a_site_file_counts_by_its_content_and_for_slurm_alone(tmp_path):
    run = run_with(tmp_path / "run")
    (run.root / "site.sh").write_text("true\n")
    record(run)
    check_trusted(run, False)
    (run.root / "site.sh").write_text("false\n")
    check_trusted(run, False, (FUNCTION, COMMAND))
    assert [code.key for code in code_of(run)] == ["site.sh"]
    with pytest.raises(UserError, match="its site.sh is something for Slurm to run"):
        check_trusted(run, False)


def test_without_a_home_only_trust_helps(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    run = run_with(tmp_path / "run", "data.augment=mine:f")
    record(run)
    with pytest.raises(UserError, match="add --trust"):
        check_trusted(run, False)
    check_trusted(run, True)


def test_a_value_that_looks_like_code_counts_as_code():
    config = load_config(None, ['model.options={a="x:y"}'], copy.deepcopy(BASE))
    assert code_in(config) == [Code(FUNCTION, "model.options.a", "x:y")]  # who reads it, decides
