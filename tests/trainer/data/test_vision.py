"""Augmentations of torchvision: views that depend on their own input and number alone."""

import sys

import numpy as np
import pytest
import torch

from pipeline.choices import AUGMENT_OPTIONS
from pipeline.config import UserError, load_config
from trainer.data import vision
from trainer.data.augment import Views, find_augment

NAMES = sorted(AUGMENT_OPTIONS)


def pictures(n=6, channels=3, size=(12, 10), dtype=np.uint8):
    values = np.random.default_rng(0).integers(0, 256, (n, channels, *size))
    return values.astype(dtype)


def uniforms(n=6):
    return Views(1, 7).uniforms(0, np.arange(n), np.zeros(n, np.int64), 1)


@pytest.mark.parametrize("name", NAMES)
def test_without_torchvision_one_line_says_how_it_is_had(name, monkeypatch):
    for made in (vision._crop, vision._randaugment):
        made.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(UserError, match=r"^[^\n]*need torchvision [^\n]*pip install[^\n]*$"):
        find_augment(name)(pictures(), uniforms())


def test_options_are_of_an_augmentation_that_has_them():
    config = load_config(None, ["data.augment=rrc", "data.augment_options={flip=0}"])
    assert config.data.augment_options == {"flip": 0}
    with pytest.raises(UserError, match="augment_options.flop: did you mean flip"):
        load_config(None, ["data.augment=rrc", "data.augment_options={flop=0}"])
    with pytest.raises(UserError, match="augment_options.num_ops: known: flip, interpolation"):
        load_config(None, ["data.augment=rrc", "data.augment_options={num_ops=1}"])
    with pytest.raises(UserError, match='options are of data.augment = "rrc" or "rrc-randaug'):
        load_config(None, ["data.augment=shift", "data.augment_options={flip=0}"])
    of_student = ["students.main.augment=rrc", "data.augment_options={flip=0}"]
    assert load_config(None, of_student)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_a_function_of_its_own_input_and_number(name):
    pytest.importorskip("torchvision")
    augment = find_augment(name)
    inputs, numbers = pictures(), uniforms()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    together = augment(inputs, numbers)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    alone = [augment(inputs[i : i + 1], numbers[i : i + 1])[0] for i in reversed(range(6))]
    assert (together == np.stack(alone[::-1])).all()
    assert together.shape == inputs.shape and together.dtype == np.uint8
    assert (together != inputs).any((1, 2, 3)).all()
    assert (augment(inputs, 1 - numbers) != together).any()


def test_the_crop_is_torchvisions_at_the_seed_of_the_number():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    inputs, numbers = pictures(n=3), np.array([[0.1], [0.5], [0.9]])
    options = {"scale": [0.2, 0.5], "ratio": [1.0, 1.0], "flip": 0.5}
    views = find_augment("rrc", options=options)(inputs, numbers)
    crop = v2.RandomResizedCrop((12, 10), (0.2, 0.5), (1.0, 1.0), antialias=True)
    for view, picture, (number,) in zip(views, inputs, numbers, strict=True):
        torch.manual_seed(int(number * 2**53))
        expected = v2.RandomHorizontalFlip(0.5)(crop(torch.from_numpy(picture)))
        assert torch.equal(torch.from_numpy(view), expected)


def test_a_whole_crop_without_a_flip_is_the_picture():
    pytest.importorskip("torchvision")
    options = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0}
    square = pictures(channels=1, size=(8, 8), dtype=np.float32)
    np.testing.assert_allclose(find_augment("rrc", options=options)(square, uniforms()), square)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("rrc", {"scale": [0.5, 0.2]}, r"augment_options: scale = .0.5, 0.2.: two shares of the"),
        ("rrc", {"ratio": [0.0, 1.0]}, "augment_options: ratio = "),
        ("rrc", {"interpolation": "cubic"}, "augment_options: 'cubic' is not a valid Interpolat"),
        ("rrc-randaugment", {"magnitude": 31}, "magnitude = 31: at least 1, 0 to 30"),
    ],
)
def test_an_option_that_torchvision_cannot_take_is_named(name, options, message):
    pytest.importorskip("torchvision")
    with pytest.raises(UserError, match=message):
        find_augment(name, options=options)(pictures(), uniforms())


def test_inputs_that_it_cannot_change_are_named():
    pytest.importorskip("torchvision")
    with pytest.raises(UserError, match='"rrc" needs pictures'):
        find_augment("rrc")(np.zeros((3, 5)), uniforms(3))
    with pytest.raises(UserError, match='with 1 or 3 channels; .*float32.*: take "rrc"'):
        find_augment("rrc-randaugment")(pictures(dtype=np.float32), uniforms())


def test_a_run_with_crops_and_mixtures_resumes_exactly(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    from running import run_all
    from toy import toy_config, write_toy

    from trainer.core import loop

    keys = ("data.augment=rrc-randaugment", "data.augment_options={flip=0}")
    mixtures = ("train.mixup=0.2", "train.cutmix=1.0", "train.label_smoothing=0.1")
    config = toy_config(write_toy(tmp_path / "data"), *keys, *mixtures, "train.steps=30")
    whole = run_all(tmp_path / "whole", config, only={"generalist"})
    counter = iter(range(1000))
    monkeypatch.setattr(loop.StopSignal, "agreed", lambda self, ranks: next(counter) == 13)
    with pytest.raises(SystemExit):
        run_all(tmp_path / "stopped", config, only={"generalist"})
    monkeypatch.undo()
    stopped = run_all(tmp_path / "stopped", config, only={"generalist"})
    weights = [run.generalist.path("model.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1]
