import pytest
import tensorflow as tf

from recsys.dataset import sequence_spec
from recsys.file_order import FileOrder


def order(prepared, counts, own=(0, 1)):
    files = prepared.files(prepared.train)
    return FileOrder(files, counts, own, sequence_spec(prepared), 9, 4, "history")


def sizes(batches):
    return [int(batch["label"].nrows()) for batch in batches]


def test_each_step_has_its_part_of_each_file(prepared):
    counts = prepared.train.sequences_by_file
    by_file = [
        sizes(order(prepared, counts, [number]).batches(tf.constant(0, tf.int64), 1, 100))
        for number in range(2)
    ]
    for found, count in zip(by_file, counts, strict=True):
        assert sum(found) == count
        assert max(found) - min(found) <= 1
    both = order(prepared, counts).batches(tf.constant(0, tf.int64), 1, 100)
    # A part's batches of different lengths come in random order, the same one for every file.
    assert sizes(both) == [sum(parts) for parts in zip(*by_file, strict=True)]


def test_a_file_that_lacks_sequences_is_named(prepared):
    counts = (prepared.train.sequences_by_file[0] + 9, prepared.train.sequences_by_file[1])
    batches = order(prepared, counts).batches(tf.constant(0, tf.int64), 1, 100)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"part-00000.*holds fewer sequences"):
        sizes(batches)
