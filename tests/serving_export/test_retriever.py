from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from recsys.dataset import raw_batches, read_corpus
from recsys.models.embed import embed, in_batches
from recsys.schema import Schema
from serving_export.index import Effort, ExactIndex, ScannIndex
from serving_export.retriever import Retriever, _latest, log_prior
from serving_export.searcher import Structure, train
from serving_export.verify import Expectation

UNKNOWN = "🤷 no such id"


@pytest.fixture(params=["scann", "exact"])
def model(world, request):
    return world.models[request.param]


@pytest.fixture(scope="module")
def seen_world(tiny, tmp_path_factory):
    """Retrievers that exclude seen items, on exact search and on a small tree."""
    root = tmp_path_factory.mktemp("seen")
    data = tiny.write_data(root / "data", num_items=400, exclude_seen=True)
    towers = tf.saved_model.load(str(tiny.write_model(data, root / "model").directory / "towers"))
    corpus = read_corpus(data)
    candidates = {n: tf.constant(v) for n, v in corpus.features.items()}
    embeddings = towers.signatures["embed_candidate"](**candidates)["embedding"].numpy()
    tree = tree_over(embeddings, leaves_to_search=4)
    return {
        name: SimpleNamespace(signatures=Retriever(towers, search, corpus, data).signatures())
        for name, search in (("exact", ExactIndex(embeddings)), ("tree", tree))
    }


def tree_over(embeddings, leaves_to_search):
    effort = Effort(k=10, num_leaves=20, leaves_to_search=leaves_to_search, reorder=40)
    return ScannIndex(train(embeddings, Structure("tree", 20, 2.0)), len(embeddings), effort)


class Repeating(tf.Module):
    """Towers whose queries add to the scores of what they have seen, most to the first event."""

    def __init__(self, towers, length):
        super().__init__()
        self.towers = towers
        names = towers.signatures["embed_query"].structured_input_signature[1]
        self.signatures = {
            "embed_candidate": towers.signatures["embed_candidate"],
            "embed_query": tf.function(self.embed_query).get_concrete_function(**names),
        }
        self.length = length

    def embed_query(self, **raw):
        embedding = self.towers.signatures["embed_query"](**raw)["embedding"]
        places = tf.range(tf.shape(raw["history"])[1], 0, -1)
        repeat = tf.ones_like(embedding[:, :1]) * (20.0 * tf.cast(places, tf.float32) - 50.0)
        return {"embedding": embedding, "repeat": tf.where(raw["history"] == "", 0.0, repeat)}


def test_seen_items_get_the_score_that_the_towers_add(tiny, tmp_path):
    """Also where the index finds them not, once each, and less where the score is negative."""
    data = tiny.write_data(tmp_path / "data", num_items=400)
    towers = tf.saved_model.load(str(tiny.write_model(data, tmp_path / "m").directory / "towers"))
    corpus = read_corpus(data)
    length = data.features.history_length
    towers = Repeating(towers, length)
    queries = next(iter(raw_batches(data, data.test, 40).as_numpy_iterator()))
    queries = {name: values.copy() for name, values in queries.items()}
    long = queries["history"][:, 2] != b""
    queries["history"][long, 2] = queries["history"][long, 0]
    embedded = embed(towers, "embed_query", in_batches(queries))
    embeddings = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    expected = Expectation(data, corpus, queries, embeddings, embedded).scores()
    tree = tree_over(embeddings, leaves_to_search=10)
    plain = Expectation(
        data, corpus, queries, embeddings, embedded | {"repeat": 0 * embedded["repeat"]}
    )
    assert not np.allclose(expected, plain.scores())
    for search, least in ((ExactIndex(embeddings), 1.0), (tree, 0.7)):
        made = Retriever(towers, search, corpus, data, embeddings).signatures()["recommend"]
        request = {name: tf.constant(v) for name, v in queries.items()}
        answer = made(**request, k=tf.constant(10), exclusions=tf.constant([[""]] * 40))
        best = -np.sort(-expected, axis=1)[:, :10]
        found = np.isclose(answer["scores"].numpy(), best, atol=1e-3)
        assert found.mean() >= least
        ids = answer["ids"].numpy()
        assert all(len(set(row)) == 10 for row in ids)
        top = corpus.item[expected.argmax(axis=1)]
        assert (ids[:, 0] == top).mean() >= least


def test_histories_of_a_query_keep_in_step_where_a_value_is_missing():
    items = tf.constant([["", "a", "b", "c"], ["a", "", "", ""]])
    kinds = tf.constant([["", "x", "", "z"], ["", "", "", ""]])
    happened = items != ""
    assert _latest(items, happened, 2).numpy().tolist() == [[b"b", b"c"], [b"a", b""]]
    assert _latest(kinds, happened, 2).numpy().tolist() == [[b"", b"z"], [b"", b""]]


def test_both_variants_answer_alike(world, tiny):
    histories = [[tiny.item(n), tiny.item(2 * n)] for n in range(20)]
    ids, scores = tiny.ask(world.models["exact"], histories, k=12)
    their_ids, their_scores = tiny.ask(world.models["scann"], histories, k=12)
    assert ids == their_ids
    assert len({tuple(row) for row in ids}) > 10
    np.testing.assert_allclose(scores, their_scores, atol=1e-5)
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize(("k", "width"), [(-3, 0), (0, 0), (1, 1), (7, 7), (60, 60), (1000, 60)])
def test_k_is_chosen_by_the_caller(model, tiny, k, width):
    ids, scores = tiny.ask(model, [[tiny.item(1)], [tiny.item(2)]], k=k)
    assert scores.shape == (2, width)
    assert [len(set(row)) for row in ids] == [width, width]
    assert np.isfinite(scores).all()


def test_each_query_may_want_a_number_of_its_own(model, tiny):
    histories = [[tiny.item(1)], [tiny.item(2)], []]
    whole, their_scores = tiny.ask(model, histories, k=6)
    ids, scores = tiny.ask(model, histories, k=[2, 6, 0])
    assert ids == [whole[0][:2] + [""] * 4, whole[1], [""] * 6]
    np.testing.assert_allclose(scores[1], their_scores[1], rtol=1e-6)
    assert np.isneginf(scores[2]).all()


def test_a_longer_list_begins_with_the_shorter(model, tiny):
    (longer,), _ = tiny.ask(model, [[tiny.item(3)]], k=30)
    (shorter,), _ = tiny.ask(model, [[tiny.item(3)]], k=4)
    assert longer[:4] == shorter


def test_excluded_items_give_their_place_to_the_next(model, tiny):
    histories = [[tiny.item(1)], [tiny.item(2)]]
    ids, _ = tiny.ask(model, histories, k=12)
    exclusions = [ids[0][:5], [ids[1][0], UNKNOWN]]
    answered, _ = tiny.ask(model, histories, k=6, exclusions=exclusions)
    assert answered == [ids[0][5:11], ids[1][1:7]]


def test_exclusions_of_one_query_do_not_touch_another(model, tiny):
    (alone,), _ = tiny.ask(model, [[tiny.item(1)]], k=5)
    answered, _ = tiny.ask(model, [[tiny.item(1)]] * 2, k=5, exclusions=[alone, []])
    assert answered[1] == alone
    assert not set(answered[0]) & set(alone)


def test_what_is_left_comes_first_then_nothing(model, tiny):
    left = {tiny.item(5), tiny.item(40), tiny.item(59)}
    excluded = [tiny.item(n) for n in range(tiny.num_items) if tiny.item(n) not in left]
    (ids,), (scores,) = tiny.ask(model, [[tiny.item(1)]], k=5, exclusions=[excluded])
    assert set(ids[:3]) == left
    assert ids[3:] == ["", ""]
    assert np.isfinite(scores[:3]).all()
    assert np.isneginf(scores[3:]).all()


def test_everything_excluded(model, tiny):
    everything = [tiny.item(n) for n in range(tiny.num_items)]
    ids, scores = tiny.ask(model, [[tiny.item(1)], []], k=3, exclusions=[everything] * 2)
    assert ids == [["", "", ""]] * 2
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("history", [[], [UNKNOWN], ["", ""]])
def test_cold_query_gets_popularity(model, tiny, history):
    excluded = [tiny.item(1), tiny.item(3)]
    ids, scores = tiny.ask(model, [history], k=4, exclusions=[excluded], member=[UNKNOWN])
    assert ids == [[tiny.item(n) for n in (0, 2, 4, 5)]]
    labels = np.maximum(50 - np.arange(60), 0)
    expected = np.log((labels + 1) / (labels + 1).sum())[[0, 2, 4, 5]]
    np.testing.assert_allclose(scores, [expected], rtol=1e-5)


def test_known_user_or_known_item_is_not_cold(model, tiny):
    popular = [tiny.item(n) for n in range(4)]
    ids, _ = tiny.ask(
        model, [[], [UNKNOWN, tiny.item(7)], []], k=4, member=["user 2", UNKNOWN, UNKNOWN]
    )
    assert ids[0] != popular
    assert ids[1] != popular
    assert ids[2] == popular


def test_batches_of_none_and_one(model, tiny):
    ids, scores = tiny.ask(model, [], k=5)
    assert ids == []
    assert scores.shape == (0, 5)
    ids, scores = tiny.ask(model, [[]], k=5)
    assert scores.shape == (1, 5)


def test_answers_do_not_depend_on_the_batch(model, tiny):
    histories = [[tiny.item(n)] for n in range(5)] + [[]]
    together, _ = tiny.ask(model, histories, k=5)
    assert together == [tiny.ask(model, [history], k=5)[0][0] for history in histories]


def test_long_history_is_cut_to_what_training_saw(model, tiny):
    long = [tiny.item(n) for n in range(20)]
    ids, scores = tiny.ask(model, [long, long[-5:]], k=5)
    assert ids[0] == ids[1]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_towers_answer_as_their_own_signatures(model, tiny):
    candidates = {"item_id": tf.constant([tiny.item(1), UNKNOWN]), "price": tf.constant([0.0, 1.0])}
    embedding = model.signatures["embed_candidate"](**candidates)["embedding"]
    assert embedding.shape == (2, 8)
    assert "embed_query" in model.signatures
    assert set(model.signatures["recommend"].structured_outputs) == {"ids", "scores"}


@pytest.mark.parametrize("kind", ["exact", "tree"])
@pytest.mark.parametrize("width", [1, 30, 390])
def test_no_seen_item_returns_while_others_are_left(seen_world, tiny, kind, width):
    seen = [[tiny.item((start + n) % 400) for n in range(width)] for start in range(0, 40, 4)]
    ids, scores = tiny.ask(seen_world[kind], seen, k=10)
    assert np.isfinite(scores).all()
    checked = 0
    for row, history in zip(ids, seen, strict=True):
        assert len(set(row)) == 10
        assert not set(row) & set(history)
        checked += 1
    assert checked == 10


def test_seen_and_excluded_add_up(seen_world, tiny):
    seen = [tiny.item(n) for n in range(200)]
    excluded = [tiny.item(n) for n in range(200, 397)]
    for retriever in seen_world.values():
        (ids,), _ = tiny.ask(retriever, [seen], k=5, exclusions=[excluded])
        assert set(ids[:3]) == {tiny.item(n) for n in (397, 398, 399)}
        assert ids[3:] == ["", ""]


def test_tree_finds_what_exact_search_finds_behind_many_exclusions(seen_world, tiny):
    seen = [[tiny.item(n) for n in range(100, 350)]]
    exact, scores = tiny.ask(seen_world["exact"], seen, k=20)
    tree, their_scores = tiny.ask(seen_world["tree"], seen, k=20)
    assert exact == tree
    np.testing.assert_allclose(scores, their_scores, atol=1e-5)


def test_schema_without_users_and_histories_is_never_cold(tiny, tmp_path):
    data = tiny.write_data(tmp_path)
    plain = [f for f in data.features.features if f.name not in ("history", "member")]
    data = data.model_copy(update={"features": Schema(features=tuple(plain))})
    last = np.zeros((60, 2), np.float32)
    last[59, 0] = 1

    def towers(**features):
        return {"embedding": tf.ones([tf.shape(next(iter(features.values())))[0], 2])}

    made = Retriever(
        SimpleNamespace(signatures={"embed_query": towers, "embed_candidate": towers}),
        ExactIndex(last),
        read_corpus(data),
        data,
    )
    answer = made.signatures()["recommend"](
        country=tf.constant([UNKNOWN]),
        basket=tf.constant([float("nan")]),
        clicked_at=tf.constant([-1], tf.int64),
        taste=tf.zeros([1, 3]),
        k=tf.constant(1),
        exclusions=tf.zeros([1, 0], tf.string),
    )
    assert answer["ids"].numpy()[0, 0].decode() == tiny.item(59)


def test_empty_vocabulary_makes_every_query_cold(tiny, tmp_path):
    data = tiny.write_data(tmp_path)
    towers = tf.saved_model.load(
        str(tiny.write_model(data, tmp_path / "model").directory / "towers")
    )
    emptied = {}
    for name, file in data.vocabularies.items():
        (data.directory / file.path).write_text("")
        emptied[name] = file.model_copy(update={"size": 0})
    data = data.model_copy(update={"vocabularies": emptied})
    made = Retriever(towers, ExactIndex(np.zeros((60, 8), np.float32)), read_corpus(data), data)
    model = SimpleNamespace(signatures=made.signatures())
    assert tiny.ask(model, [[tiny.item(9)]], k=2, member=["user 1"])[0] == [
        [tiny.item(0), tiny.item(1)]
    ]


def test_prior_is_a_distribution_without_zeros(tiny, tmp_path):
    corpus = read_corpus(tiny.write_data(tmp_path))
    assert (corpus.labels == 0).any()
    assert np.exp(log_prior(corpus)).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("variant", ["scann", "exact"])
def test_an_answer_is_up_to_its_own_query(shop, tiny, variant):
    """Alone, among 7 or 64: other histories, exclusions and k in a batch change no id of it."""
    random = np.random.default_rng(6)
    lengths = random.integers(0, 6, 64), random.integers(0, 60, 64) * random.integers(0, 2, 64)
    history, exclusions = (
        [[tiny.item(int(row)) for row in random.choice(400, n, replace=False)] for n in each]
        for each in lengths
    )
    wanted = random.choice([3, 10, 25], 64)
    model = tf.saved_model.load(str(shop / "artifacts" / variant))

    def ask(first, size):
        """Lists are as wide as the longest of the batch."""
        few = range(first, min(first + size, 64))
        return model.signatures["recommend"](
            user_id=tf.constant([f"user {n}" for n in few]),
            history=tf.ragged.constant([history[n] for n in few], tf.string, 1).to_tensor(),
            exclusions=tf.ragged.constant([exclusions[n] for n in few], tf.string, 1).to_tensor(),
            k=tf.constant(wanted[few], tf.int32),
        )["ids"].numpy()

    together = [row[:n].tolist() for row, n in zip(ask(0, 64), wanted, strict=True)]
    assert all(all(row) for row in together)
    for size in (1, 7):
        found = [row for first in range(0, 64, size) for row in ask(first, size)]
        assert [row[:n].tolist() for row, n in zip(found, wanted, strict=True)] == together
