"""Other classes, drawn by their confusion with the group, and the loss that corrects for it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from clustering import PredictionStatistics
from pipeline.config import UserError, load_config
from pipeline.store import read_json
from trainer.core.losses import dustbin_shift, full_specialist_loss
from trainer.data.orders import weighted
from trainer.stages.grouping import confusion_with
from trainer.stages.specialist import hard_negatives


def test_classes_are_drawn_in_proportion_to_their_weights_and_their_samples_take_turns():
    labels = np.repeat([0, 1, 2], [10, 20, 70])
    order = weighted(labels, 3, [5.0, 0.0, 15.0])
    drawn = order(np.arange(100))
    assert np.bincount(labels[drawn], minlength=3).tolist() == [25, 0, 75]
    assert set(np.bincount(drawn, minlength=100)[:10].tolist()) == {2, 3}  # 25 draws of 10 samples
    assert np.bincount(labels[order(np.arange(400))], minlength=3).tolist() == [100, 0, 300]


def session_of(counts, expected, share, tmp_path):
    """What hard_negatives needs of a session."""
    statistics = PredictionStatistics(len(counts))
    for row, column in np.argwhere(expected):
        # One example that the generalist takes for `column`, the rest of its mass on `row`.
        p = torch.zeros(1, len(counts))
        p[0, row] = expected[row, column]
        p[0, column] += 1 - expected[row, column]
        statistics.update(p)
    statistics.save(tmp_path / "statistics.npz")
    return SimpleNamespace(
        shards=lambda split: SimpleNamespace(class_counts=np.array(counts)),
        config=SimpleNamespace(specialists=SimpleNamespace(hard_negatives=share)),
        run=SimpleNamespace(measure=SimpleNamespace(path=lambda name: tmp_path / name)),
    )


def test_weights_mix_confusion_and_natural_frequencies(tmp_path):
    expected = np.zeros((4, 4))
    expected[2, 0] = 0.3  # class 2 is taken for class 0, of the group
    expected[3, 1] = 0.1  # class 3 is taken for class 1, of the group
    session = session_of([10, 10, 20, 60], expected, 0.5, tmp_path)
    classes = np.array([0, 1])
    assert confusion_with(session, classes) == pytest.approx([0, 0, 0.3, 0.1])
    weights, log_ratio = hard_negatives(session, classes)
    # Natural fractions of the others .25 and .75. By confusion .75 and .25. Half of each.
    assert weights == pytest.approx([0, 0, 0.5, 0.5])
    assert log_ratio.tolist() == pytest.approx([0, 0, np.log(2), np.log(2 / 3)])


def test_the_loss_at_drawn_frequencies_is_smallest_at_natural_ones():
    """With uninformative inputs, the logarithms of natural frequencies have no gradient."""
    natural = torch.tensor([0.1, 0.1, 0.2, 0.6], dtype=torch.float64)
    inside, fraction = torch.tensor([True, True, False, False]), 0.5
    drawn_outside = torch.tensor([0, 0, 0.5, 0.5], dtype=torch.float64)  # instead of .25 and .75
    drawn_inside = natural / natural[inside].sum()
    drawn = torch.where(inside, fraction * drawn_inside, (1 - fraction) * drawn_outside)
    ratio = torch.where(inside, 1.0, drawn_outside / (natural / natural[~inside].sum()))
    prior = torch.where(inside, dustbin_shift(0.2, fraction), 0.0) + ratio.log()
    logits = natural.log().repeat(4, 1).requires_grad_()

    def loss_of(c):
        return full_specialist_loss(logits[c : c + 1], torch.tensor([c]), inside, None, prior)

    losses = torch.stack([loss_of(c) for c in range(4)])
    gradient = torch.autograd.grad((losses * drawn).sum(), logits)[0].sum(0)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), atol=1e-8, rtol=0)


def test_specialists_of_a_run_may_see_hard_negatives(tmp_path):
    data = write_toy(tmp_path / "data")
    overrides = ("specialists.hard_negatives=0.5", "controls.enabled=false", "students={}")
    config = toy_config(data, *overrides)
    run = run_all(tmp_path / "run", config)
    spec = read_json(run.specialists[0].path("model.json"))
    assert spec["head"]["kind"] == "dustbin" and spec["head"]["rows"] == "all"
    assert read_json(run.root / "results.json")["ensemble"]["n"] == 12 * NUM_CLASSES


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["specialists.dustbin=fresh"], "needs every class's row"),
        (["specialists.dustbin_rows=9"], "needs every class's row"),
        (["specialists.label_smoothing=0.1"], "label_smoothing = 0"),
    ],
)
def test_what_hard_negatives_cannot_be_combined_with_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, ["specialists.hard_negatives=0.5", *overrides])
