"""Mixup and cutmix: numbers worked by hand, and batches that no rank or resume changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from networks import InputSpec, ModelSpec, build_classifier, lazy_logits
from pipeline.config import Data, UserError, load_config
from trainer.core.loop import micro_batches
from trainer.core.losses import mixed_loss
from trainer.core.objectives import classify
from trainer.data import Source, TrainingStream, open_shards, shuffled
from trainer.data.mixing import (
    Mixing,
    beta_quantile,
    box,
    check_mixable,
    mix,
    mixing_of,
    partners,
)
from trainer.data.streams import Batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_shares_are_quantiles_of_a_beta_distribution():
    """Of Beta(1, 1) the uniform itself. Beta(2, 2) has 3 x^2 - 2 x^3 = 5/32 below 1/4."""
    uniforms = np.array([0.0, 0.25, 0.7])
    assert beta_quantile(1.0, uniforms).tolist() == pytest.approx(uniforms)
    assert beta_quantile(2.0, np.array([5 / 32, 0.5])).tolist() == pytest.approx([0.25, 0.5])
    assert len(beta_quantile(0.0, np.zeros(0))) == 0


@pytest.mark.parametrize(
    "own, centre, rows, columns",
    [
        (0.75, (0.5, 0.5), (2, 6), (2, 6)),  # a quarter of 8 x 8: sides of 4 around row 4
        (0.75, (0.0, 0.99), (0, 2), (5, 8)),  # cut at the top and at the right
        (1.0, (0.5, 0.5), (4, 4), (4, 4)),  # nothing of the other
        (0.0, (0.5, 0.5), (0, 8), (0, 8)),  # nothing of its own
    ],
)
def test_a_box_has_the_others_share_of_the_area_and_ends_at_the_edges(own, centre, rows, columns):
    across, down = box(own, np.array(centre), 8, 8)
    assert ((across.start, across.stop), (down.start, down.stop)) == (rows, columns)


def test_an_average_has_both_pictures_by_their_shares():
    inputs, others = np.full((2, 1, 2, 2), 100, np.uint8), np.full((2, 1, 2, 2), 0, np.uint8)
    uniforms = np.array([[0.25, 0, 0, 0], [0.5, 0, 0, 0]])
    mixed, own = mix(inputs, others, uniforms, Mixing(mixup=1.0))
    assert own.tolist() == [0.25, 0.5]
    assert mixed.dtype == np.uint8 and mixed[:, 0, 0, 0].tolist() == [25, 50]
    halves, _ = mix(inputs.astype("f4"), others.astype("f4"), uniforms, Mixing(mixup=1.0))
    assert halves.dtype == np.float32 and halves[0, 0, 0, 0] == 25


def test_a_pasted_box_is_the_others_and_the_share_is_what_is_left():
    inputs, others = np.zeros((1, 3, 8, 8), np.uint8), np.full((1, 3, 8, 8), 9, np.uint8)
    mixed, own = mix(inputs, others, np.array([[0.75, 0, 0.0, 0.99]]), Mixing(cutmix=1.0))
    assert (mixed[0, :, 0:2, 5:8] == 9).all() and mixed.sum() == 3 * 9 * 6
    assert own[0] == pytest.approx(1 - 6 / 64)


def test_with_both_each_example_is_averaged_or_pasted_by_its_own_number():
    inputs, others = np.zeros((2, 1, 8, 8), np.float32), np.ones((2, 1, 8, 8), np.float32)
    uniforms = np.array([[0.5, 0.49, 0.5, 0.5], [0.5, 0.51, 0.5, 0.5]])
    mixed, _ = mix(inputs, others, uniforms, Mixing(1.0, 1.0))
    assert set(mixed[0].flat) == {0.0, 1.0} and set(mixed[1].flat) == {0.5}


def test_partners_are_half_a_batch_away_and_on_the_same_rank_where_ranks_divide_that():
    assert partners(np.arange(8), 8).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert partners(np.arange(5), 5).tolist() == [2, 3, 4, 0, 1]
    assert all(partners(np.arange(8), 8) % 4 == np.arange(8) % 4)


@pytest.fixture(scope="module")
def shards(uneven):
    return open_shards(str(uneven), Data(), "train")


def stream(shards, mixing, batch=12, augment="flip-crop"):
    order = shuffled(np.arange(len(shards)), 3)
    return TrainingStream([Source(shards, order, batch)], seed=5, augment=augment, mixing=mixing)


FIELDS = ("inputs", "labels", "ids", "source", "view", "partner_labels", "own_share")
BOTH = Mixing(0.4, 1.0)


@pytest.mark.parametrize("world_size, workers", [(2, 0), (3, 2), (4, 0), (5, 0)])
def test_a_mixed_global_batch_does_not_depend_on_ranks_and_workers(shards, world_size, workers):
    loaders = [stream(shards, BOTH).loader(4, 7, r, world_size, workers) for r in range(world_size)]
    for step, parts in enumerate(zip(*map(list, loaders), strict=True), start=4):
        expected = stream(shards, BOTH).batch(step)
        for name in FIELDS:
            whole = getattr(expected, name)
            for rank, part in enumerate(parts):
                assert torch.equal(getattr(part, name), whole[rank::world_size]), name


def test_a_mixed_batch_is_the_plain_batch_mixed(shards):
    """The same examples and augmented views as without mixing, and the partners' labels."""
    plain, mixed = stream(shards, None).batch(6), stream(shards, Mixing(1.0)).batch(6)
    assert torch.equal(mixed.ids, plain.ids) and torch.equal(mixed.labels, plain.labels)
    partner = torch.from_numpy(partners(np.arange(12), 12))
    assert torch.equal(mixed.partner_labels, plain.labels[partner])
    share = mixed.own_share[:, None, None, None]
    expected = share * plain.inputs + (1 - share) * plain.inputs[partner]
    assert (mixed.inputs.float() - expected).abs().max() <= 0.5 + 1e-4
    assert plain.own_share is None and len(set(mixed.own_share.tolist())) == 12


def test_steps_are_mixed_anew_and_micro_batches_keep_what_is_theirs(shards):
    mixed = stream(shards, BOTH)
    assert not torch.equal(mixed.batch(0).own_share, mixed.batch(1).own_share)
    batch = mixed.batch(2)
    parts = micro_batches(batch, 3)
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


# The loss


def two_labels():
    torch.manual_seed(0)
    logits, prior = torch.randn(4, 6), torch.randn(6)
    labels, others = torch.tensor([0, 1, 2, 5]), torch.tensor([3, 1, 0, 4])
    return logits, prior, labels, others, torch.tensor([0.2, 0.7, 1.0, 0.5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_soft_labels(smoothing):
    """torch's own, of target distributions [B, C], which it smooths as we do."""
    logits, prior, labels, others, share = two_labels()
    target = share[:, None] * F.one_hot(labels, 6) + (1 - share)[:, None] * F.one_hot(others, 6)
    expected = F.cross_entropy(logits + prior, target, label_smoothing=smoothing)
    actual = mixed_loss(logits, labels, others, share, smoothing, prior)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_logits_that_are_never_held_it_is_the_same(smoothing):
    _, prior, labels, others, share = two_labels()
    spec = ModelSpec("mlp", 6, InputSpec((1, 4, 4)), {"width": 5, "depth": 1})
    network = build_classifier(spec).eval()
    raw = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8)
    dense = mixed_loss(network(raw), labels, others, share, smoothing, prior)
    lazy = mixed_loss(lazy_logits(network, raw), labels, others, share, smoothing, prior)
    torch.testing.assert_close(lazy, dense)


def test_each_member_learns_from_both_labels():
    logits, _, labels, others, share = two_labels()
    members = torch.stack([logits, logits + torch.arange(6)])
    batch = Batch(logits, labels, labels, labels, partner_labels=others, own_share=share)
    expected = sum(mixed_loss(each, labels, others, share) for each in members) / 2
    torch.testing.assert_close(classify()(lambda inputs: members, batch), expected)


# The config


def test_only_train_mixes():
    config = load_config(None, ["train.mixup=0.2"])
    assert mixing_of(config.train) == Mixing(0.2, 0.0)
    assert mixing_of(config.specialists) is None and mixing_of(load_config().train) is None


@pytest.mark.parametrize(
    "others, named",
    [
        (["engine.shard_head=true", "train.negatives=5"], "train.negatives = 5 compares one label"),
        (["model.head=cosine", "model.margin=0.1"], "model.margin = 0.1 moves the logit of one"),
    ],
)
def test_what_has_one_label_is_not_mixed(others, named):
    with pytest.raises(UserError, match=f"train.cutmix = 1.0 gives inputs two labels, .*{named}"):
        load_config(None, ["train.cutmix=1.0", *others])


def test_indices_and_vectors_say_what_they_cannot_be_mixed_by():
    with pytest.raises(UserError, match="train.mixup averages inputs, and int32 are indices"):
        check_mixable(Mixing(0.2), (8,), np.dtype("int32"))
    with pytest.raises(UserError, match=r"needs pictures .C, H, W.; the inputs are .8."):
        check_mixable(Mixing(0.2, 1.0), (8,), np.dtype("float32"))
    check_mixable(Mixing(0.2), (8,), np.dtype("float32"))
