"""Streams of batches: what belongs to a position, whatever the ranks, workers and caches."""

import io
import pickle

import numpy as np
import pytest
import torch
from shardsets import label_of, picture, tar_files, write_tar

from pipeline.config import Data, UserError
from trainer.data import (
    MeasuringStream,
    Source,
    TrainingStream,
    balanced,
    cached,
    open_shards,
    shuffled,
)
from trainer.data.augment import Augment

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def shards(uneven):
    return open_shards(str(uneven), Data(), "train")


def two_sources(shards, augment="flip-crop", batch=12):
    inside = np.flatnonzero(shards.labels == 1)
    own = Source(shards, shuffled(inside, 3), batch // 3)
    rest = Source(shards, balanced(shards.labels, 4, 1.0), batch - batch // 3)
    return TrainingStream([own, rest], seed=5, augment=augment)


FIELDS = ("inputs", "labels", "ids", "source")


def joined(stream, first, last, world_size, workers):
    """Digests of the steps' global batches, put together from what the ranks' loaders give."""
    ranks = range(world_size)
    loaders = [stream.loader(first, last, rank, world_size, workers) for rank in ranks]
    digests = []
    for parts in zip(*map(list, loaders), strict=True):
        content = []
        for name in FIELDS:
            values = [getattr(part, name) for part in parts]
            shape = (stream.batch_size, *values[0].shape[1:])
            whole = torch.empty(shape, dtype=values[0].dtype)
            for rank in ranks:
                whole[rank::world_size] = values[rank]
            content.append(whole.numpy().tobytes())
        digests.append(tuple(content))
    assert len(digests) == last - first
    return digests


def digest(batch):
    return tuple(getattr(batch, name).numpy().tobytes() for name in FIELDS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_batch_does_not_depend_on_ranks_and_workers(shards, world_size, workers):
    stream = two_sources(shards)
    expected = [digest(stream.batch(step)) for step in range(4, 9)]
    assert joined(two_sources(shards), 4, 9, world_size, workers) == expected


def test_every_global_batch_holds_exactly_per_batch_of_each_source(shards):
    for step in range(30):
        batch = two_sources(shards).batch(step)
        assert torch.bincount(batch.source).tolist() == [4, 8]
        assert (batch.labels[batch.source == 0] == 1).all()


def test_labels_and_inputs_belong_to_their_ids(shards):
    batch = two_sources(shards, augment=None).batch(3)
    ids, labels = batch.ids.tolist(), batch.labels.tolist()
    for inputs, label, number in zip(batch.inputs, labels, ids, strict=True):
        assert label == label_of(number)
        assert (inputs[0].numpy() == picture(number)).all()


def test_ranks_get_equally_many_steps_from_uneven_shards(shards):
    lengths = {len(list(two_sources(shards).loader(0, 7, rank, 4))) for rank in range(4)}
    assert lengths == {7}


def test_the_sources_of_a_batch_are_spread_over_the_ranks(shards):
    stream = TrainingStream([Source(shards, shuffled(len(shards), s), 128) for s in (0, 1)], 0)
    for world_size in (2, 4):
        for rank in range(world_size):
            fraction = stream.batch(0, rank, world_size).source.float().mean()
            assert 0.35 < fraction < 0.65


def test_augmentation_belongs_to_the_position_and_changes_from_epoch_to_epoch(shards):
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), 25)], 0, "shift")
    plain = TrainingStream([Source(shards, shuffled(len(shards), 0), 25)], 0)
    assert len(shards) == 150

    def uniforms_by_id(steps):
        by_id = {}
        for step in steps:
            by_id.update(zip(stream.batch(step).ids.tolist(), stream.uniforms(step), strict=True))
        return by_id

    first, second = uniforms_by_id(range(6)), uniforms_by_id(range(6, 12))
    assert all((first[i] != second[i]).any() for i in range(150))
    assert plain.batch(2).ids.tolist() == stream.batch(2).ids.tolist()


def test_uniforms_are_those_of_one_long_sequence(shards):
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), 10)], 7, "flip-crop")
    long = TrainingStream([Source(shards, shuffled(len(shards), 0), 50)], 7, "flip-crop")
    uniforms = np.concatenate([stream.uniforms(step) for step in range(5)])
    assert np.array_equal(uniforms, long.uniforms(0))


def test_a_view_does_not_depend_on_how_many_are_made_at_a_time(shards, monkeypatch):
    at_once = digest(two_sources(shards).batch(3))
    monkeypatch.setattr("trainer.data.streams.BLOCK", 70)  # two pictures of 30 bytes
    assert digest(two_sources(shards).batch(3)) == at_once


@pytest.mark.parametrize("workers", [0, 1])
def test_views_may_have_another_shape_and_dtype_than_the_inputs(shards, workers):
    crop = Augment(lambda inputs, numbers: inputs[..., 1:4] + numbers[:, 0, None, None, None], 1)
    stream = two_sources(shards, crop)
    (batch,) = stream.loader(2, 3, workers=workers)
    plain = two_sources(shards, None).batch(2).inputs.numpy()
    assert batch.inputs.dtype == torch.float64
    expected = plain[..., 1:4] + stream.uniforms(2)[:, 0, None, None, None]
    assert np.array_equal(batch.inputs.numpy(), expected)


def test_more_ranks_than_examples_leave_a_rank_empty_batches(shards):
    stream = TrainingStream([Source(shards, shuffled(150, 0), 2)], 0, "flip-crop")
    for workers in (0, 1):
        (batch,) = stream.loader(0, 1, rank=2, world_size=3, workers=workers)
        assert batch.inputs.shape == (0, 1, 6, 5) and len(batch) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_that_torch_has_no_dtype_for_are_refused(tmp_path, workers):
    file = io.BytesIO()
    np.save(file, np.array([1, 2], np.longdouble))
    write_tar(tmp_path / "train-0.tar", [("a.cls", b"0"), ("a.npy", file.getvalue())])
    stream = MeasuringStream(open_shards(str(tmp_path), Data(classes=1), "train"), 1)
    with pytest.raises(UserError, match="inputs of dtype float128: torch has none like it"):
        list(stream.loader(workers=workers))


def test_a_worker_without_shared_memory_is_one_line(shards, monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(UserError, match="no shared memory for a batch of 360 bytes .* --shm-size"):
        list(two_sources(shards).loader(0, 2, workers=1))
    assert len(list(two_sources(shards).loader(0, 2, workers=0))) == 2


def test_making_a_loader_leaves_torchs_generator_alone(shards):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(two_sources(shards).loader(0, 2))
    list(MeasuringStream(shards, 50).loader())
    assert torch.equal(before, torch.get_rng_state())


def test_some_ids_can_be_measured(shards):
    ids = np.array([5, 3, 149])
    batches = list(MeasuringStream(shards, 2, ids).loader())
    assert torch.cat([batch.ids for batch in batches]).tolist() == [5, 3, 149]


def test_streams_cross_process_borders(shards, tmp_path):
    decoded = cached(shards, tmp_path / "train", Data())
    for each in (shards, decoded):
        stream = two_sources(each)
        assert digest(pickle.loads(pickle.dumps(stream)).batch(2)) == digest(stream.batch(2))


def test_cached_and_plain_streams_are_the_same(shards, tmp_path):
    decoded = cached(shards, tmp_path / "train", Data())
    assert type(decoded) is not type(shards)
    assert digest(two_sources(decoded).batch(8)) == digest(two_sources(shards).batch(8))


def undecodable(directory, bad, count=300):
    """A valid tar whose samples `bad` hold no picture."""
    files = dict(tar_files(range(count)))
    files |= {f"{number:05d}.png": b"no picture" for number in bad}
    write_tar(directory / "train-000000.tar", list(files.items()))
    return str(directory)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first_undecodable_sample_and_names_it(tmp_path, workers):
    shards = open_shards(undecodable(tmp_path, {17}), Data(classes=7), "train")
    message = r"train-000000.tar: sample 00017: cannot be decoded"
    with pytest.raises(UserError, match=message) as error:
        list(MeasuringStream(shards, 10).loader(workers=workers))
    assert "\n" not in str(error.value)
    stream = TrainingStream([Source(shards, shuffled(300, 0), 10)], 0)
    with pytest.raises(UserError, match="sample 00017"):
        list(stream.loader(0, 30, workers=workers))


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_skip_leaves_out_and_counts_exactly(tmp_path, cache):
    data = Data(classes=7, damage="skip", cache=cache)
    shards = open_shards(undecodable(tmp_path, {17, 200}), data, "train")
    shards = cached(shards, tmp_path / "cache" / "train", data)
    stream = MeasuringStream(shards, 32)
    seen = torch.cat([batch.ids for batch in stream.loader()]).tolist()
    assert sorted(seen) == [i for i in range(300) if i not in (17, 200)]
    assert sorted(name[-5:] for name in stream.lost) == ["00017", "00200"]


def test_in_training_the_next_of_the_order_stands_in_for_a_corrupt_sample(tmp_path):
    data = Data(classes=7, damage="skip")
    shards = open_shards(undecodable(tmp_path, {17}), data, "train")
    stream = TrainingStream([Source(shards, shuffled(300, 0), 20)], 0)
    whole = list(stream.loader(0, 15))
    assert all(len(batch) == 20 for batch in whole)
    ids = torch.cat([batch.ids for batch in whole]).tolist()
    order = shuffled(300, 0)(np.arange(301)).tolist()
    index = order.index(17)
    assert ids == order[:index] + [order[index + 1]] + order[index + 1 : 300]
    assert len(stream.lost) == 1
    for world_size in (2, 3):
        again = TrainingStream([Source(shards, shuffled(300, 0), 20)], 0)
        assert joined(again, 0, 15, world_size, 0) == [digest(batch) for batch in whole]


def test_skip_stops_above_the_configured_fraction(tmp_path):
    data = Data(classes=7, damage="skip")
    shards = open_shards(undecodable(tmp_path, {3, 4, 5, 6}), data, "train")
    message = "4 of 300 samples are corrupt, above data.damage_share = 0.01"
    with pytest.raises(UserError, match=message):
        list(MeasuringStream(shards, 10).loader())


def test_sources_of_different_shapes_are_refused(shards, tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.cls", b"0"), ("a.txt", b"text")])
    other = open_shards(str(tmp_path), Data(classes=7), "train")
    with pytest.raises(UserError, match="one input shape"):
        TrainingStream([Source(shards, shuffled(10, 0), 5), Source(other, shuffled(1, 0), 5)], 0)
