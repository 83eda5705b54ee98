from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import sparse

from recsys.artifacts import ArtifactError, PreparedData
from recsys.features import FeatureEncoder
from recsys.neighbours import _WINDOW, _closest, neighbours

NUMBER = 5


@pytest.fixture(scope="module")
def encoder(prepared):
    return FeatureEncoder(prepared)


def lists(record):
    """Values of each field of a serialised record."""
    features = tf.train.Example.FromString(record).features.feature
    return {
        name: list(getattr(f, f.WhichOneof("kind")).value) if f.WhichOneof("kind") else []
        for name, f in features.items()
    }


def counted(records, row):
    """Sum of 1 / steps of each pair of rows, one label and one step at a time."""
    pairs = defaultdict(Counter)
    for record in records:
        for label, known in zip(record["label"], record["known"], strict=True):
            for steps in range(1, min(_WINDOW, known) + 1):
                ends = row.get(record["history"][known - steps]), row.get(label)
                if None not in ends and ends[0] != ends[1]:
                    for left, right in (ends, ends[::-1]):
                        pairs[left][right] += 1 / steps
    return pairs


def rows(encoder):
    """Row of each item of the vocabulary."""
    reserved = encoder.reserved_rows("item_id")
    return {v.encode(): n for n, v in enumerate(encoder.vocabulary("item_id")) if n >= reserved}


def alone(prepared, folder, *records):
    """The data, with these records for the training sequences."""
    shards = folder / prepared.train.path
    shards.mkdir()
    with tf.io.TFRecordWriter(str(shards / "part-00000.tfrecord")) as writer:
        for history, label, known in records:
            feature = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
                for name, values in (("history", history), ("label", label))
            }
            feature["known"] = tf.train.Feature(int64_list=tf.train.Int64List(value=known))
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return prepared.model_copy(update={"directory": folder})


def test_neighbours_are_those_that_counting_one_by_one_finds(prepared, encoder):
    files = prepared.files(prepared.train)
    records = [lists(record.numpy()) for record in tf.data.TFRecordDataset(files)]
    pairs = counted(records, rows(encoder))
    found = neighbours(prepared, [prepared.train], encoder, NUMBER)
    assert found.shape == (len(encoder.vocabulary("item_id")), NUMBER)
    assert len(pairs) > 20
    for item, near in enumerate(found):
        best = sorted(pairs[item].values(), reverse=True)[:NUMBER]
        np.testing.assert_allclose([pairs[item][other] for other in near if other], best)
        assert np.count_nonzero(near) == len(best)


def test_labels_of_one_moment_count_and_events_after_them_do_not(prepared, encoder, tmp_path):
    row = rows(encoder)
    a, b, c, d, e, f = list(row)[:6]
    # Both labels know a and b alone; what came later is there for judged events.
    data = alone(prepared, tmp_path, ([a, b, e, f], [c, d], [2, 2]))
    found = neighbours(data, [data.train], encoder, NUMBER)
    expected = {a: [c, d], b: [c, d], c: [b, a], d: [b, a], e: [], f: []}
    for item, near in expected.items():
        assert [n for n in found[row[item]] if n] == [row[other] for other in near]
    assert np.count_nonzero(found) == 8


def test_a_pair_in_two_pieces_of_a_history_counts_once(prepared, encoder, tmp_path):
    row = rows(encoder)
    a, b, c = list(row)[:3]
    pieces = [([a, b], [b], [1]), ([a, b], [c], [2]), ([c], [b], [1])]
    data = alone(prepared, tmp_path, *pieces)
    # Of b, c was visited twice in a step, a only once.
    assert neighbours(data, [data.train], encoder, 2)[row[b]].tolist() == [row[c], row[a]]


def test_later_sequences_change_them(prepared, encoder):
    before = neighbours(prepared, [prepared.train], encoder, NUMBER)
    both = neighbours(prepared, [prepared.train, prepared.recent], encoder, NUMBER)
    assert (before != both).any()


def test_pairs_are_added_up_part_by_part_to_the_same_sum(prepared, encoder, monkeypatch):
    whole = neighbours(prepared, [prepared.train], encoder, NUMBER)
    monkeypatch.setattr("recsys.neighbours._HELD", 10)
    monkeypatch.setattr("recsys.dataset._READ_BATCH", 30)
    np.testing.assert_array_equal(neighbours(prepared, [prepared.train], encoder, NUMBER), whole)


def test_of_equals_the_more_frequent_is_closer():
    counts = np.zeros((5, 5), np.int64)
    counts[2, 3], counts[2, 4], counts[3, 4] = 2, 2, 7
    found = _closest(sparse.csr_array(counts), 2)
    np.testing.assert_array_equal(found, [[0, 0], [0, 0], [3, 4], [4, 2], [3, 2]])
    np.testing.assert_array_equal(_closest(sparse.csr_array(counts), 1)[2:], [[3], [4], [3]])


def test_neighbours_of_many_items_are_chosen_block_by_block(prepared, encoder, monkeypatch):
    whole = neighbours(prepared, [prepared.train], encoder, NUMBER)
    monkeypatch.setattr("recsys.neighbours._BLOCK", 7)
    np.testing.assert_array_equal(neighbours(prepared, [prepared.train], encoder, NUMBER), whole)


def test_a_corrupt_shard_is_named(prepared, encoder, tmp_path):
    folder = tmp_path / prepared.train.path
    folder.mkdir()
    for file in map(Path, prepared.files(prepared.train)):
        (folder / file.name).write_bytes(file.read_bytes()[:-5])
    moved = PreparedData.load(prepared.directory).model_copy(update={"directory": tmp_path})
    with pytest.raises(ArtifactError, match=r"is corrupt"):
        neighbours(moved, [moved.train], encoder, NUMBER)
