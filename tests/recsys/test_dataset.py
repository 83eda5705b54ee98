import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.dataset import (
    named_corruption,
    raw_batches,
    read_corpus,
    read_interactions,
    read_sequences,
)
from recsys.schema import Schema
from recsys.sequences import Order, _flat_labels, training_batches


@pytest.fixture
def copied(prepared, tmp_path):
    """Prepared data that a test may damage."""
    shutil.copytree(prepared.directory, tmp_path / "data")
    return prepared.model_copy(update={"directory": tmp_path / "data"})


def epoch(prepared, epochs, seed=1):
    batches = training_batches(prepared, [prepared.train], 16, Order(epochs, seed, 10_000))
    return [record for batch in batches for record in rows_of(batch)]


def rows_of(batch):
    labels, times = batch["label"].numpy(), batch["clicked"].numpy()
    users = batch["user_id"].numpy()
    return list(zip(users.tolist(), times.tolist(), labels.tolist(), strict=True))


def test_corpus_is_in_the_order_of_the_manifest(prepared):
    corpus = read_corpus(prepared)
    assert len(corpus) == prepared.corpus.num_items == 60
    assert (np.diff(corpus.count) <= 0).all()
    assert corpus.labels.sum() == prepared.train.num_examples
    assert corpus.features["price"].dtype == np.float32
    rows = corpus.rows().lookup(tf.constant([*corpus.item[:3], b"nobody"]))
    assert rows.numpy().tolist() == [0, 1, 2, -1]


def test_interactions_follow_the_planted_transitions(prepared, planted):
    corpus = read_corpus(prepared)
    found = read_interactions(prepared, prepared.test, corpus)
    assert len(found) == prepared.test.num_examples > 100
    numbers = np.array([int(item.decode()[1:]) for item in corpus.item])
    lengths = (found.history >= 0).sum(axis=1)
    assert lengths.min() == 1
    last = numbers[found.history[np.arange(len(found)), lengths - 1]]
    follows = planted.successor[0, last] == numbers[found.label]
    assert 0.75 < follows.mean() < 0.9
    assert found.exclusions is None
    assert len(np.unique(found.user)) == len(set(found.user_id))
    clicked = [batch["clicked"].numpy() for batch in raw_batches(prepared, prepared.test, 512)]
    np.testing.assert_array_equal(found.at, np.concatenate(clicked))


def test_each_example_is_seen_once_an_epoch_and_orders_differ_by_epoch_only(prepared):
    first, second = epoch(prepared, range(1)), epoch(prepared, range(1, 2))
    assert len(first) == prepared.train.num_examples
    assert sorted(first) == sorted(second)
    assert first != second
    assert first == epoch(prepared, range(1))
    assert first != epoch(prepared, range(1), seed=2)


def test_a_stream_that_starts_later_continues_an_earlier_one(prepared):
    assert epoch(prepared, range(3))[-len(epoch(prepared, range(1))) :] == epoch(
        prepared, range(2, 3)
    )


def test_batches_hold_the_history_of_every_label(prepared):
    """What a label knows in a batch is what it knows when it is read as an example."""
    corpus = read_corpus(prepared)
    batches = training_batches(prepared, [prepared.train], 16, Order(range(1), 1, 10_000))
    found = []
    for batch in batches:
        longest = max(known for known in batch["known"].numpy())
        assert batch["history"].shape == (batch["history"].shape[0], longest)
        listed = batch["history"].numpy()[batch["sequence"]]
        for history, known, label in zip(listed, batch["known"], batch["label"], strict=True):
            found.append((tuple(history[:known]), label.numpy()))
    read = read_sequences(prepared, prepared.train, corpus)
    expected = [
        (tuple(corpus.item[history[history >= 0]]), corpus.item[label])
        for history, label in zip(read.history, read.label, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    assert len(np.unique(read.user)) == len(set(read.user_id))


def test_sequences_of_a_batch_are_about_equally_long(prepared):
    batches = training_batches(prepared, [prepared.train], 16, Order(range(1), 1, 10_000))
    padded = held = 0
    for batch in batches:
        padded += batch["history"].shape[0] * batch["history"].shape[1]
        held += np.count_nonzero(batch["history"].numpy())
    assert held > 0.9 * padded


def test_a_batch_of_empty_histories_has_a_place_to_look_at():
    empty = tf.RaggedTensor.from_row_lengths(tf.constant([], tf.string), [0, 0])
    one = tf.ragged.constant([[b"a"], [b"b", b"c"]])
    rows = {"label": one, "known": tf.ragged.constant([[0], [0, 0]]), "history": empty}
    schema = Schema.model_validate(
        {
            "features": [
                {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
                {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
            ]
        }
    )
    batch = _flat_labels(rows, schema)
    assert batch["history"].numpy().tolist() == [[b""], [b""]]
    assert batch["sequence"].numpy().tolist() == [0, 1, 1]


def test_the_latest_labels_join_the_training_ones(prepared):
    both = [prepared.train, prepared.recent]
    batches = training_batches(prepared, both, 16, Order(range(1), 1, 10_000))
    labels = sum(len(batch["label"]) for batch in batches)
    assert labels == prepared.train.num_examples + prepared.validation.num_examples


def test_raw_batches_have_the_types_of_the_schema(prepared):
    batch = next(iter(raw_batches(prepared, prepared.test, 8)))
    assert batch["history"].shape == (8, 5)
    assert batch["history"].dtype == tf.string
    assert batch["clicked"].dtype == tf.int64
    assert set(batch) == {"history", "user_id", "clicked"}


def test_a_corrupt_shard_is_named(copied):
    file = Path(copied.files(copied.train)[1])
    with file.open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\xff\xff\xff\xff")
    with pytest.raises(ArtifactError, match=f"{file} is corrupt: .* run `recsys prepare` again"):
        with named_corruption(copied, copied.train):
            for _ in training_batches(copied, [copied.train], 16, Order(range(1), 1, 100)):
                pass


def test_a_truncated_corpus_is_named(copied):
    file = Path(copied.files(copied.corpus)[0])
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ArtifactError, match=f"{file} is corrupt"):
        read_corpus(copied)


def test_missing_shards_say_what_to_do(copied):
    shutil.rmtree(copied.directory / "test")
    with pytest.raises(ArtifactError, match="holds no shards: run `recsys prepare` again"):
        raw_batches(copied, copied.test, 8)


def test_a_corpus_of_another_size_is_refused(prepared):
    corpus = prepared.corpus.model_copy(update={"num_items": 61})
    with pytest.raises(ArtifactError, match="holds 60 items, its manifest says 61"):
        read_corpus(prepared.model_copy(update={"corpus": corpus}))
