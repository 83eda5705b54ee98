from collections import Counter

import numpy as np
import pytest
import tensorflow as tf

from recsys.sequences import Order, training_batches
from recsys.shards import WHOLE, Share

BATCH = 29


def in_files(prepared, folder, shares):
    """The training sequences in files, of which each has its share."""
    records = [r.numpy() for r in tf.data.TFRecordDataset(prepared.files(prepared.train))]
    ends = (np.cumsum(shares) * len(records) / sum(shares)).astype(int)
    (folder / "train").mkdir()
    for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        with tf.io.TFRecordWriter(str(folder / f"train/part-{number:05d}.tfrecord")) as writer:
            for record in records[start:stop]:
                writer.write(record)
    counts = tuple(np.diff([0, *ends]).tolist())
    train = prepared.train.model_copy(
        update={"num_files": len(counts), "sequences_by_file": counts}
    )
    return prepared.model_copy(update={"directory": folder, "train": train})


@pytest.fixture(scope="module")
def uneven(prepared, tmp_path_factory):
    """Six files, one of them empty, that cannot be dealt out evenly."""
    return in_files(prepared, tmp_path_factory.mktemp("uneven"), [1, 2, 0, 8, 3, 50])


@pytest.fixture(scope="module")
def even(prepared, tmp_path_factory):
    return in_files(prepared, tmp_path_factory.mktemp("even"), [1] * 6)


def worker(rank, workers):
    return Share(range(rank, rank + 1), workers)


def stream(data, share, skip=0, cache_mib=0, epochs=range(1), batch_size=BATCH):
    order = Order(epochs, 1, 10_000, skip)
    found = training_batches(data, [data.train], batch_size, order, share, cache_mib)
    return [{name: values.numpy() for name, values in batch.items()} for batch in found]


def ids(batch):
    """What tells the labels of a batch apart."""
    return Counter(zip(batch["user_id"], batch["clicked"], batch["label"], strict=True))


def test_replicas_share_each_global_batch(prepared):
    whole = stream(prepared, WHOLE, cache_mib=1)
    parts = [stream(prepared, worker(rank, 3), cache_mib=1) for rank in range(3)]
    both = stream(prepared, Share(range(2), 3), cache_mib=1)
    assert sum(len(batch["label"]) for batch in whole) == prepared.train.num_examples
    for number, batch in enumerate(whole):
        own = [part[number] for part in parts]
        assert all((o["pool"] == batch["label"]).all() for o in own)
        assert all((o["pool"][o["place"]] == o["label"]).all() for o in own)
        places = np.concatenate([o["place"] for o in own])
        assert sorted(places) == list(range(len(batch["label"])))
        for rank in range(2):
            np.testing.assert_array_equal(both[2 * number + rank]["label"], own[rank]["label"])
    rest = stream(prepared, worker(1, 3), skip=4, cache_mib=1)
    assert len(rest) == len(whole) - 4
    np.testing.assert_array_equal(rest[0]["label"], parts[1][4]["label"])


def test_a_replica_may_have_no_sequence(prepared):
    batch = stream(prepared, worker(1, 2), cache_mib=1, batch_size=1)[0]
    assert len(batch["label"]) == 0
    assert len(batch["pool"]) > 0
    assert batch["history"].shape[0] == 0


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_files_that_are_read_by_all_give_each_sequence_once_an_epoch(uneven, workers):
    alone = stream(uneven, WHOLE, epochs=range(2))
    steps = -(-uneven.train.num_sequences // BATCH)
    every = sum(map(ids, stream(uneven, WHOLE, cache_mib=1)), Counter())
    assert set(every.values()) == {1}
    assert sum(map(ids, alone[:steps]), Counter()) == every
    assert sum(map(ids, alone[steps:]), Counter()) == every
    assert [*map(ids, alone[:steps])] != [*map(ids, alone[steps:])]
    sizes = [len(batch["history"]) for batch in alone]
    assert max(sizes) - min(sizes) <= len(uneven.train.sequences_by_file)
    shares = [stream(uneven, worker(rank, workers), epochs=range(2)) for rank in range(workers)]
    assert {len(share) for share in shares} == {2 * steps}
    for batches in zip(alone, *shares, strict=True):
        batch, *parts = map(ids, batches)
        assert sum(parts, Counter()) == batch


def test_own_files_give_the_same_batches_also_to_fewer_workers_from_the_middle_on(even):
    """What happens when one of three workers is lost, and then another."""
    three = [stream(even, worker(rank, 3)) for rank in range(3)]
    two = [stream(even, worker(rank, 2), skip=4) for rank in range(2)]
    one = stream(even, WHOLE, skip=9)
    assert "pool" not in three[0][0], "they have read their own files alone"
    assert "pool" not in two[0][0]
    assert "pool" in one[0]
    for step in range(9, len(three[0])):
        batch = ids(one[step - 9])
        assert sum((ids(part[step]) for part in three), Counter()) == batch
        assert sum((ids(part[step - 4]) for part in two), Counter()) == batch
    seen = [part[step] for part in three for step in range(4)]
    seen += [part[step] for part in two for step in range(5)]
    every = sum(map(ids, stream(even, WHOLE, cache_mib=1)), Counter())
    assert sum(map(ids, [*seen, *one]), Counter()) == every
