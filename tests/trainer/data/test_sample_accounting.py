"""Every sample of an epoch is seen or counted as corrupt, over all ranks."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from shardsets import tar_files, write_tar, write_uneven

from pipeline.config import Data, UserError
from pipeline.corruption import count, merged, summary
from trainer.data import Source, TrainingStream, balanced, open_shards, shuffled
from trainer.data.sample_accounting import EpochAccounting, LostSamples


def garble(directory, number: int):
    """Corrupt the picture of sample `number` behind the back of its newer index."""
    for shard in sorted(directory.glob("*.tar")):
        content = shard.read_bytes()
        header = content.find(b"%05d.png" % number)
        if header >= 0:
            start = header + 512 + 40
            changed = content[:start] + b"\x00\xff" + content[start + 2 :]
            with open(shard, "r+b") as file:
                file.write(changed)
            return
    raise AssertionError(number)


@pytest.fixture
def shards(tmp_path):
    directory = write_uneven(tmp_path, [40, 7, 13, 60])
    return open_shards(str(directory), Data(damage="skip", damage_share=0.1), "train")


def unchanged(step, rank, batch):
    return batch


def run(stream, steps, ranks=1, first=0, change=unchanged) -> list[EpochAccounting]:
    """`steps` steps on `ranks` ranks, a thread each. They wait for each other to close an epoch."""
    everyone = threading.Barrier(ranks)
    values = [None] * ranks
    accounts = [EpochAccounting(stream, first, rank, ranks) for rank in range(ranks)]

    def work(rank):
        def gather(value):
            values[rank] = copy.deepcopy(value)
            everyone.wait()
            gathered = copy.deepcopy(values)
            everyone.wait()
            return gathered

        for step in range(first, first + steps):
            accounts[rank].enter(change(step, rank, stream.batch(step, rank, ranks)))
            accounts[rank].close_ended(gather)

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(work, range(ranks)))
    return accounts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("exponent", [0, 0.7])
def test_every_epoch_of_an_intact_set_closes(shards, ranks, exponent):
    stream = TrainingStream([Source(shards, balanced(shards.labels, 3, exponent), 18)], 0)
    run(stream, 31, ranks)  # 31 steps of 18 are 4 epochs of 120 and a part


def test_sources_close_each_at_its_own_pace(shards):
    sources = [
        Source(shards, shuffled(np.arange(10), 1), 12),
        Source(shards, shuffled(np.arange(10, 120), 2), 6),
    ]
    # The first one's epochs are shorter than its part of a batch.
    run(TrainingStream(sources, 0), 40, ranks=2)


def test_an_epoch_begun_in_the_middle_closes_too(shards):
    stream = TrainingStream([Source(shards, shuffled(120, 3), 18)], 0)
    run(stream, 20, first=5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [0, 4, 6, 13])
def test_a_sample_that_no_rank_saw_is_an_error_at_the_end_of_the_epoch(shards, ranks, step):
    stream = TrainingStream([Source(shards, shuffled(120, 3), 18)], 0)

    def lose_one(now, rank, batch):
        if (now, rank) == (step, ranks - 1):
            batch.ids[0] = batch.ids[1]  # instead of the first, the second comes twice
        return batch

    message = "1 of 120 samples were neither seen nor found corrupt in the epoch that ended"
    with pytest.raises(UserError, match=message):
        run(stream, 20, ranks, change=lose_one)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_reports_what_all_ranks_lost(tmp_path, caplog, ranks):
    directory = write_uneven(tmp_path, [40, 7, 13, 60])
    shards = open_shards(str(directory), Data(damage="skip", damage_share=0.1), "train")
    for number in (3, 44, 118):
        garble(directory, number)
    stream = TrainingStream([Source(shards, shuffled(120, 3), 30)], 0)
    with caplog.at_level(logging.INFO, "referral"):
        accounts = run(stream, 8, ranks)
    lines = [record.message for record in caplog.records]
    expected = [f"epoch {e} of train: 3 of 120 samples" for e in (1, 2)]
    assert [line.split(" corrupt")[0] for line in lines] == expected
    assert "(2.50%), e.g. " in lines[0] and "has changed since the shard was indexed" in lines[0]
    lost = accounts[0].all_lost(lambda _: [account.lost for account in accounts])
    assert sorted(sample for _, sample, _ in lost) == [3, 44, 118]
    again = EpochAccounting(stream, 8, lost=lost)
    assert again.lost[0].keys() == {3, 44, 118}


def test_the_fraction_lost_is_that_of_all_ranks(tmp_path):
    directory = write_uneven(tmp_path, [60, 60])
    shards = open_shards(str(directory), Data(damage="skip", damage_share=0.02), "train")
    for number in (3, 44, 118):
        garble(directory, number)
    stream = TrainingStream([Source(shards, shuffled(120, 3), 30)], 0)
    message = "3 of 120 samples are corrupt, above data.damage_share = 0.02; e.g. "
    with pytest.raises(UserError, match=message):
        run(stream, 8, ranks=2)


def test_lost_samples_are_merged_over_epochs_and_stages(tmp_path):
    directory = write_uneven(tmp_path, [40, 7, 13, 60])
    write_tar(directory / "train-000001.tar", tar_files(range(40, 46)) + tar_files([46])[:1])
    losses = LostSamples()
    shards = open_shards(str(directory), Data(damage="skip", damage_share=0.1), "train")
    losses.add(shards, {})
    losses.add(shards, {2: "is no picture"})
    losses.add(shards, {2: "is no picture", 50: "is no picture"})
    opening = shards.lost
    assert opening >= 1 and count(losses.splits["train"]) == opening + 2
    other = LostSamples()
    other.add(shards, {7: "is no picture"})
    train = summary(merged([losses.splits, other.splits]))["train"]
    assert train["samples"] == 120 and train["lost"] == opening + 3
    assert train["share"] == (opening + 3) / 120
    assert any("is no picture" in line for line in train["examples"])
    with pytest.raises(UserError, match="above data.damage_share"):
        losses.add(shards, {sample: "is no picture" for sample in range(20, 40)})
    assert summary(merged([{}, {"val": {"samples": 9, "where": {}}}])) == {}
