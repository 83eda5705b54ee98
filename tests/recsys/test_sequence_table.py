import numpy as np
import tensorflow as tf

from recsys.dataset import sequence_spec
from recsys.sequence_table import SequenceTable


def test_rows_are_the_records_in_order(prepared):
    files = prepared.files(prepared.train)
    table = SequenceTable.read(files, sequence_spec(prepared), 8, 2, "history")
    assert table.starts[-1] == prepared.train.num_sequences
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(files[1])]
    last = table.rows(tf.range(table.starts[-1]), table.starts[-1:] - 1)
    for name, values in last.items():
        feature = records[-1].features.feature[name]
        expected = getattr(feature, feature.WhichOneof("kind")).value
        assert values[0].numpy().tolist() == [*expected]


def test_an_epoch_has_every_row_once_and_batches_of_about_equal_length(prepared):
    files = prepared.files(prepared.train)
    table = SequenceTable.read(files, sequence_spec(prepared), 8, 4, "history")
    batches = list(table.batches(tf.constant(3, tf.int64), 1, 10_000).as_numpy_iterator())
    assert sorted(np.concatenate(batches)) == list(range(prepared.train.num_sequences))
    assert {len(batch) for batch in batches[:-1]} <= {8, prepared.train.num_sequences % 8}
    lengths = table.columns["history"].row_lengths().numpy()
    spread = [np.ptp(lengths[batch]) for batch in batches]
    assert np.mean(spread) < 0.5 * np.ptp(lengths)
