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


def visits(data, split):
    """The items of each sequence in their order, the last label too."""
    found = []
    for record in tf.data.TFRecordDataset(data.files(split)):
        lists = tf.train.Example.FromString(record.numpy()).features.feature
        history = list(lists["history"].bytes_list.value)
        found.append([*history, lists["label"].bytes_list.value[-1]])
    return found


def counted(sequences, row):
    pairs = defaultdict(Counter)
    for items in sequences:
        for place, item in enumerate(items):
            for steps, other in enumerate(items[place + 1 : place + 1 + _WINDOW], 1):
                if item != other and item in row and other in row:
                    pairs[row[item]][row[other]] += 1 / steps
                    pairs[row[other]][row[item]] += 1 / steps
    return pairs


def test_neighbours_are_those_that_counting_one_by_one_finds(prepared, encoder):
    vocabulary = encoder.vocabulary("item_id")
    row = {v.encode(): n for n, v in enumerate(vocabulary) if n >= encoder.reserved_rows("item_id")}
    pairs = counted(visits(prepared, prepared.train), row)
    found = neighbours(prepared, [prepared.train], encoder, NUMBER)
    assert found.shape == (len(vocabulary), NUMBER)
    assert pairs
    for item, near in enumerate(found):
        best = sorted(pairs[item].values(), reverse=True)[:NUMBER]
        np.testing.assert_allclose([pairs[item][other] for other in near if other], best)
        assert np.count_nonzero(near) == len(best)
        assert item not in near


def test_later_sequences_change_them(prepared, encoder):
    alone = neighbours(prepared, [prepared.train], encoder, NUMBER)
    both = neighbours(prepared, [prepared.train, prepared.recent], encoder, NUMBER)
    assert (alone != both).any()


def test_pairs_that_do_not_fit_into_memory_are_added_up(prepared, encoder, monkeypatch):
    whole = neighbours(prepared, [prepared.train], encoder, NUMBER)
    monkeypatch.setattr("recsys.neighbours._HELD", 10)
    monkeypatch.setattr("recsys.dataset._READ_BATCH", 3)
    np.testing.assert_array_equal(neighbours(prepared, [prepared.train], encoder, NUMBER), whole)


def test_of_equals_the_more_frequent_is_closer():
    total = sparse.csr_array(np.array([[0, 0, 0], [2, 0, 2], [1, 3, 0]], float))
    np.testing.assert_array_equal(_closest(total, 2), [[0, 0], [0, 2], [1, 0]])


def test_a_corrupt_shard_is_named(prepared, encoder, tmp_path):
    folder = tmp_path / prepared.train.path
    folder.mkdir()
    for file in map(Path, prepared.files(prepared.train)):
        (folder / file.name).write_bytes(file.read_bytes()[:-5])
    moved = PreparedData.load(prepared.directory).model_copy(update={"directory": tmp_path})
    with pytest.raises(ArtifactError, match=r"is corrupt"):
        neighbours(moved, [moved.train], encoder, NUMBER)
