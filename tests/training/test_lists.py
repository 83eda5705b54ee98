import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.dataset import Interactions, read_corpus, read_interactions
from training.embeddings import two_tower_scorer
from training.lists import HELD_OUT, TRAIN, Requests, label_places, latest, write_lists
from training.outcomes import Outcomes
from training.shown import read_shown

TRAINING = [("u", "b", "a"), ("v", "c", "ab")]
# The letter after the last one is first, then all by price: a b c d e f.
VALIDATION = [("u", "b", "a"), ("v", "f", "ab"), ("w", "zz", "c"), ("x", "e", "dd")]


@pytest.fixture
def data(tiny_data):
    return tiny_data(TRAINING, VALIDATION, [("n", "a", "a")])


def written(data, towers, folder, held_out, depth=3):
    corpus = read_corpus(data)
    queries = read_interactions(data, data.validation, corpus)
    scorer = two_tower_scorer(towers, data, corpus, queries.history, data.validation)
    requests = Requests(data.validation, queries, np.array(held_out))
    return write_lists(data, scorer, requests, depth, folder)


def test_a_list_is_the_request_with_the_best_of_retrieval(data, tiny_towers, tmp_path):
    lists = written(data, tiny_towers(), tmp_path / "lists", [False, False, True, False])
    assert lists.requests == {TRAIN: 3, HELD_OUT: 1}
    assert lists.with_label == {TRAIN: 2, HELD_OUT: 0}
    (batch,) = lists.read(data, TRAIN, 10)
    assert batch["candidates"].numpy().tolist() == [[1, 0, 2], [2, 0, 1], [4, 0, 1]]
    # What retrieval does not find is not put into the list.
    assert batch["label_place"].numpy().tolist() == [0, -1, 0]
    assert batch["history"].numpy().tolist()[1] == [b"a", b"b", b"", b""]
    assert batch["weight"].numpy().tolist() == [1, 1, 1]
    scores = batch["retrieval_scores"].numpy()
    assert (np.diff(scores, axis=1) <= 0).all()
    assert lists.score_mean == pytest.approx(scores.mean())
    assert lists.score_std == pytest.approx(scores.std(), rel=1e-5)
    (held,) = lists.read(data, HELD_OUT, 10)
    assert held["label_place"].numpy().tolist() == [-1]


def test_with_outcomes_each_candidate_has_a_label_for_each_task(data, tiny_towers, tmp_path):
    corpus = read_corpus(data)
    queries = read_interactions(data, data.validation, corpus)
    scorer = two_tower_scorer(tiny_towers(), data, corpus, queries.history, data.validation)
    # The last query buys its label and its second candidate; the second has no outcome at all.
    query, item, task = np.array([0, 3, 3, 3]), np.array([0, 4, 0, 0]), np.array([1, 0, 0, 1])
    outcomes = Outcomes(("buy", "cart"), query, item.astype(np.int32), task)
    held_out = np.array([False, False, False, True])
    requests = Requests(data.validation, queries, held_out, outcomes)
    lists = write_lists(data, scorer, requests, 3, tmp_path / "lists")
    assert lists.with_label == {TRAIN: 1, HELD_OUT: 1}
    assert {part: n.tolist() for part, n in lists.positives.items()} == {
        TRAIN: [0, 1],
        HELD_OUT: [2, 1],
    }
    (held,) = lists.read(data, HELD_OUT, 10)
    assert held["candidates"].numpy().tolist() == [[4, 0, 1]]
    assert held["task_labels"].numpy().tolist() == [[[1, 0], [1, 1], [0, 0]]]


def test_what_was_shown_takes_the_place_of_what_is_retrieved(tiny_data, tiny_towers, tmp_path):
    prices = [3.0, 5.0, np.nan, 4.0]
    lists = [
        ("u", "a", ["f", "zz", "b", "c"], "b", prices),
        ("v", "ab", ["a", "c"], "", [2.0, 1.0]),
    ]
    shown = {"validation": lists, "test": lists}
    data = tiny_data(TRAINING, VALIDATION, [("n", "a", "a")], shown=shown)
    corpus, split = read_corpus(data), data.impressions.validation
    queries = read_interactions(data, split, corpus)
    scorer = two_tower_scorer(tiny_towers(), data, corpus, queries.history, split)
    held_out = np.array([False, True])
    asked = Requests(split, queries, held_out, shown=read_shown(data, split, corpus, 3))
    written = write_lists(data, scorer, asked, 3, tmp_path / "lists")
    assert written.requests == {TRAIN: 1, HELD_OUT: 1}
    assert written.listed == {TRAIN: 3, HELD_OUT: 2}
    assert written.with_label == {TRAIN: 1, HELD_OUT: 0}
    (train,) = written.read(data, TRAIN, 10)
    # In the order of the log; what is no candidate leaves the positions of the others.
    assert train["candidates"].numpy().tolist() == [[5, 1, 2]]
    assert train["positions"].numpy().tolist() == [[1, 3, 4]]
    assert train["task_labels"].numpy().tolist() == [[[0], [1], [0]]]
    np.testing.assert_equal(train["as_shown_price"].numpy(), np.float32([[3, np.nan, 4]]))
    np.testing.assert_allclose(train["retrieval_scores"], [[0.01, 1.05, 0.04]], rtol=1e-5)
    (held,) = written.read(data, HELD_OUT, 10)
    assert held["candidates"].numpy().tolist() == [[0, 2, -1]]
    np.testing.assert_equal(held["as_shown_price"].numpy(), np.float32([[2, 1, np.nan]]))
    assert np.isneginf(held["retrieval_scores"].numpy()[0, 2])


def test_what_was_seen_is_no_candidate_where_it_is_excluded(tiny_data, tiny_towers, tmp_path):
    data = tiny_data(TRAINING, [("u", "c", "abdef")], [("n", "a", "a")], exclude_seen=True)
    lists = written(data, tiny_towers(), tmp_path / "lists", [False])
    (batch,) = lists.read(data, TRAIN, 10)
    assert batch["candidates"].numpy().tolist() == [[2, -1, -1]]
    assert np.isneginf(batch["retrieval_scores"].numpy()[0, 1:]).all()


def test_shuffled_lists_are_the_same_lists(data, tiny_towers, tmp_path):
    lists = written(data, tiny_towers(), tmp_path / "lists", [False] * 4)
    orders = [
        np.concatenate([b["label_place"].numpy() for b in lists.shuffled(data, TRAIN, 2, seed)])
        for seed in range(8)
    ]
    assert {tuple(sorted(o)) for o in orders} == {(-1, -1, 0, 0)}
    assert len({tuple(o) for o in orders}) > 1


def test_labels_have_their_place():
    items = np.array([[3, 1, -1], [2, 0, 1]])
    assert label_places(items, np.array([1, 5])).tolist() == [1, -1]
    assert label_places(items, np.array([-1, 2])).tolist() == [-1, 0]


@pytest.fixture
def queries():
    n = 1000
    return Interactions(
        user=np.arange(n) // 2,
        user_id=np.array([f"u{i // 2}".encode() for i in range(n)], object),
        label=np.zeros(n, np.int32),
        history=np.zeros((n, 0), np.int32),
        weight=np.ones(n, np.float32),
        exclusions=None,
        at=np.random.default_rng(1).permutation(n),
    )


def test_the_latest_are_held_out(queries):
    chosen = latest(queries, 0.2, timed=True)
    assert np.count_nonzero(chosen) == 200
    assert queries.at[chosen].min() > queries.at[~chosen].max()


@pytest.mark.parametrize("case", ["no time", "one day"])
def test_without_moments_it_is_a_share_of_the_users(queries, case):
    timed = case == "one day"
    if timed:
        queries = dataclasses.replace(queries, at=np.full(len(queries), 7))
    chosen = latest(queries, 0.2, timed=timed)
    assert 0.1 < chosen.mean() < 0.3
    assert not set(queries.user[chosen]) & set(queries.user[~chosen])


def test_a_corrupt_shard_is_named(data, tiny_towers, tmp_path):
    towers = tiny_towers()
    corpus = read_corpus(data)
    queries = read_interactions(data, data.validation, corpus)
    scorer = two_tower_scorer(towers, data, corpus, queries.history, data.validation)
    (file,) = data.files(data.validation)
    whole = tf.io.gfile.GFile(file, "rb").read()
    with tf.io.gfile.GFile(file, "wb") as stream:
        stream.write(whole[:-3])
    with pytest.raises(ArtifactError, match=r"part-00000\.tfrecord is corrupt"):
        requests = Requests(data.validation, queries, np.zeros(4, bool))
        write_lists(data, scorer, requests, 3, tmp_path / "lists")
