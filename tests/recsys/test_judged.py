import tensorflow as tf

from recsys.judged import flat_judged, judged_spec, judgements, missing_judgements
from recsys.schema import Feature, Schema

SCHEMA = Schema(
    features=(
        Feature(name="history", side="query", kind="history", of="item_id", length=3),
        Feature(name="age", side="query", kind="number"),
        Feature(name="taste", side="query", kind="vector", dim=2),
        Feature(name="item_id", side="candidate", kind="id", column="item"),
    )
)


def ragged(values):
    return tf.ragged.constant(values)


def test_events_of_sequences_become_rows():
    rows = {
        "label": ragged([["a"], [], ["b"]]),
        "judged.item": ragged([["a", "c"], [], ["b"]]),
        "judged.known": ragged([[0, 2], [], [1]]),
        "judged.event": ragged([["like", "dislike"], [], ["like"]]),
        "judged.weight": ragged([[1.0, 1.0], [], [2.0]]),
        "judged.age": ragged([[1.0, 2.0], [], [3.0]]),
        "judged.taste": ragged([[1.0, 2.0, 3.0, 4.0], [], [5.0, 6.0]]),
    }
    flat = flat_judged(rows, SCHEMA)
    assert flat["sequence"].numpy().tolist() == [0, 0, 2]
    assert flat["known"].numpy().tolist() == [0, 2, 1]
    assert flat["taste"].numpy().tolist() == [[1, 2], [3, 4], [5, 6]]
    assert flat_judged({"label": rows["label"]}, SCHEMA) == {}
    corpus = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b"]), tf.range(2)), -1
    )
    told = judgements(flat, corpus, num_warm=1, positive=["like"])
    assert told["outcome"].numpy().tolist() == [1, 0, 1]
    # c is no candidate, b has no vector of its own to learn.
    assert told["row"].numpy().tolist() == [0, 0, 0]
    assert told["weight"].numpy().tolist() == [1, 0, 0]
    assert "item" not in told


def test_data_without_judged_events_are_read_as_before(prepared):
    assert judged_spec(prepared) == {}
    told = prepared.model_copy(update={"judged": {"train": {"like": 1}}})
    assert {n.removeprefix("judged.") for n in judged_spec(told)} == {
        *("item", "known", "event", "weight"),
        *("user_id", "clicked"),
    }


def test_what_is_missing_is_named():
    good = {"like": 3, "dislike": 1}
    assert missing_judgements({"train": good, "recent": good}, ["like"]) is None
    assert "recent has no judged event that is of" in missing_judgements(
        {"train": good, "recent": {"dislike": 1}}, ["like"]
    )
    assert "train has no judged event that is not of" in missing_judgements(
        {"train": {"like": 2}, "recent": good}, ["like"]
    )
    assert "recent has no" in missing_judgements({"train": good, "recent": {}}, ["like"])
