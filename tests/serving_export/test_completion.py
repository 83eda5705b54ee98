"""Restricted answers of whole retrievers, beside what NumPy makes of all scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from recsys.dataset import raw_batches, read_corpus
from recsys.models.embed import embed, in_batches
from serving_export.filters import Between, OneOf
from serving_export.index import Effort, ExactIndex, ScannIndex
from serving_export.restrictions import Restrictions
from serving_export.retriever import Policy, Retriever
from serving_export.searcher import Structure, train
from serving_export.unavailable import Unavailable, listing
from serving_export.verify import Expectation

NUM_ITEMS = 400
OVERFETCH = 3
#: The least popular items: no index finds them for everybody among three times k.
RARE = [390, 394, 397]
OUT = [0, 1, 7, 250]


class Repeating(tf.Module):
    """Towers whose queries add to the scores of what they have seen."""

    def __init__(self, towers):
        super().__init__()
        self.towers = towers
        specs = towers.signatures["embed_query"].structured_input_signature[1]
        embed_query = tf.function(self.embed_query).get_concrete_function(**specs)
        self.signatures = dict(towers.signatures) | {"embed_query": embed_query}

    def embed_query(self, **raw):
        embedding = self.towers.signatures["embed_query"](**raw)["embedding"]
        places = tf.cast(tf.range(tf.shape(raw["history"])[1]), tf.float32)
        repeat = tf.ones_like(embedding[:, :1]) * (10.0 - 4.0 * places)
        return {"embedding": embedding, "repeat": tf.where(raw["history"] == "", 0.0, repeat)}


@pytest.fixture(scope="module")
def shop(tiny, tmp_path_factory):
    """Retrievers by exact search and by a tree that searches little, on 400 items."""
    root = tmp_path_factory.mktemp("shop")
    data = tiny.write_data(root / "data", num_items=NUM_ITEMS)
    towers = tf.saved_model.load(str(tiny.write_model(data, root / "model").directory / "towers"))
    towers, corpus = Repeating(towers), read_corpus(data)
    embeddings = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    groups = np.array([[b"even", b"odd", b"third"][row % 3] for row in range(NUM_ITEMS)], object)
    groups[RARE] = b"rare"
    prices = np.random.default_rng(5).permutation(NUM_ITEMS).astype(np.float32)
    prices[::9] = np.nan
    (root / "out").write_text(listing([tiny.item(row) for row in OUT]))
    effort = Effort(k=10, num_leaves=20, leaves_to_search=2, reorder=40)
    tree = ScannIndex(train(embeddings, Structure("tree", 20, 2.0)), NUM_ITEMS, effort)
    signatures = {}
    for name, index in (("exact", ExactIndex(embeddings)), ("tree", tree)):
        restrictions = Restrictions(
            {"group": OneOf(groups), "price": Between(prices)},
            Unavailable(root / "out", corpus.item),
            OVERFETCH,
        )
        policy = Policy(True, restrictions)
        made = Retriever(towers, index, corpus, data, embeddings, policy)
        signatures[name] = made.signatures()["recommend"]
    queries = next(iter(raw_batches(data, data.test, 40).as_numpy_iterator()))
    embedded = embed(towers, "embed_query", in_batches(queries))
    expectation = Expectation(data, corpus, queries, embeddings, embedded)
    return SimpleNamespace(
        corpus=corpus, groups=groups, prices=prices, signatures=signatures, queries=queries,
        expectation=expectation, scores=expectation.scores(),
    )  # fmt: skip


def ask(shop, index, k, groups=None, prices=None, exclusions=None):
    size = len(shop.scores)
    answer = shop.signatures[index](
        **{name: tf.constant(values) for name, values in shop.queries.items()},
        k=tf.constant(k),
        exclusions=tf.constant([[""]] * size if exclusions is None else exclusions, tf.string),
        filter_group=tf.constant([[""]] * size if groups is None else groups, tf.string),
        filter_price=tf.constant([[np.nan] * 2] * size if prices is None else prices, tf.float32),
    )
    return answer["ids"].numpy(), answer["scores"].numpy()


def assert_exact(shop, answer, allowed, k):
    """The best k of what is allowed, with their scores, then nothing."""
    scores = np.where(allowed, shop.scores, -np.inf)
    scores[:, OUT] = -np.inf
    best = -np.sort(-scores, axis=1)[:, :k]
    ids, found = answer
    assert found.shape == best.shape
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-5)
    rows = {item: row for row, item in enumerate(shop.corpus.item)}
    for query, (row, own) in enumerate(zip(ids.tolist(), found, strict=True)):
        filled = [rows[item] for item in row if item]
        assert len(filled) == np.isfinite(own).sum() == len(set(filled))
        np.testing.assert_allclose(scores[query, filled], own[: len(filled)], rtol=1e-5, atol=1e-5)


def test_there_are_known_unknown_and_cold_queries(shop):
    cold = np.array(list(shop.expectation._cold()))
    empty = (shop.queries["history"] == b"").all(axis=1)
    assert cold.any()
    assert (empty & ~cold).any()
    assert (~empty & ~cold).any()


def test_unavailable_items_never_come_back(shop):
    assert_exact(shop, ask(shop, "exact", 12), np.ones(NUM_ITEMS, bool), 12)
    ids, scores = ask(shop, "tree", 12)
    assert np.isfinite(scores).all()
    assert not set(ids.ravel()) & set(shop.corpus.item[OUT])
    popular = shop.corpus.item[[2, 3, 4, 5, 6, 8]].tolist()
    cold = np.array(list(shop.expectation._cold()))
    assert ids[cold][:, :6].tolist() == [popular] * cold.sum()


@pytest.mark.parametrize("k", [1, 12, 1000])
def test_each_query_has_filters_of_its_own(shop, k):
    """By one value, by several, by a range with open ends, by both, by nothing."""
    size, random = len(shop.scores), np.random.default_rng(3)
    groups = random.choice(["", "odd", "rare", "no such"], (size, 2))
    prices = np.sort(random.integers(0, NUM_ITEMS, (size, 2)), axis=1).astype(np.float32)
    prices[random.random((size, 2)) < 0.5] = np.nan
    allowed = np.ones(shop.scores.shape, bool)
    for query in range(size):
        values = [value.encode() for value in groups[query] if value]
        if values:
            allowed[query] &= np.isin(shop.groups, values)
        least, most = prices[query]
        if np.isfinite(prices[query]).any():
            allowed[query] &= ~np.isnan(shop.prices)
            allowed[query] &= ~(shop.prices < least) & ~(shop.prices > most)
    assert 0 < (allowed.sum(axis=1) == 0).sum() < size
    answer = ask(shop, "exact", k, groups, prices)
    assert_exact(shop, answer, allowed, min(k, NUM_ITEMS))
    ids, scores = ask(shop, "tree", k, groups, prices)
    assert (np.isfinite(scores) == np.isfinite(answer[1])).all()
    rows = {item: row for row, item in enumerate(shop.corpus.item)}
    for query, row in enumerate(ids.tolist()):
        assert all(allowed[query, rows[item]] for item in row if item)


def test_a_rare_category_is_searched_for_exactly(shop):
    """The tree alone does not find it among as many as are fetched; the answer is exact still."""
    size, k = len(shop.scores), 4
    index_finds = np.argsort(-shop.scores, axis=1)[:, :100]
    assert not all(set(RARE) & set(row) for row in index_finds.tolist())
    groups = [["rare"]] * size
    for index in ("tree", "exact"):
        assert_exact(shop, ask(shop, index, k, groups), shop.groups == b"rare", k)
    # In one batch with others, whose answers stay.
    groups = [["rare"] if n % 2 else [""] for n in range(size)]
    ids, scores = ask(shop, "tree", k, groups)
    alone_ids, alone = ask(shop, "tree", k, [["rare"]] * size)
    np.testing.assert_allclose(scores[1::2], alone[1::2], rtol=1e-5)
    assert ids[1::2].tolist() == alone_ids[1::2].tolist()
    assert np.isfinite(scores[::2]).all()


def test_excluded_items_stay_excluded_when_searched_for_exactly(shop):
    size = len(shop.scores)
    exclusions = [[shop.corpus.item[RARE[0]], b"no such"] if n % 2 else [b"", b""]
                  for n in range(size)]  # fmt: skip
    allowed = np.tile(shop.groups == b"rare", (size, 1))
    allowed[1::2, RARE[0]] = False
    for index in ("tree", "exact"):
        answer = ask(shop, index, 4, [["rare"]] * size, exclusions=exclusions)
        assert_exact(shop, answer, allowed, 4)
    everything = [shop.corpus.item.tolist()] * size
    ids, scores = ask(shop, "tree", 3, [["rare"]] * size, exclusions=everything)
    assert not ids.any()
    assert np.isneginf(scores).all()


def test_restricted_answers_are_the_same_whoever_else_is_asked_for(shop):
    """Each with its own k, filters and exclusions: some are completed, most are not."""
    size, random = len(shop.scores), np.random.default_rng(7)
    request = shop.queries | {
        "k": random.choice([1, 5, 30], size).astype(np.int32),
        "filter_group": random.choice(["", "odd", "rare"], (size, 1)).astype(object),
        "filter_price": np.where(random.random((size, 2)) < 0.8, np.nan, np.float32([50, 300])),
    }
    excluded = [random.choice(shop.corpus.item, row % 3 * row // 2).tolist() for row in range(size)]

    def answer(few):
        inputs = {name: tf.constant(values[few]) for name, values in request.items()}
        lists = tf.ragged.constant(excluded[few], tf.string, 1).to_tensor()
        return shop.signatures["tree"](**inputs, exclusions=lists)["ids"].numpy().tolist()

    together = [[item for item in row if item] for row in answer(slice(None))]
    assert len({len(row) for row in together}) > 1
    for step in (1, 7):
        for start in range(0, size, step):
            for place, row in enumerate(answer(slice(start, start + step))):
                assert [item for item in row if item] == together[start + place]


def test_an_empty_batch(shop):
    inputs = {name: tf.constant(values[:0]) for name, values in shop.queries.items()}
    answer = shop.signatures["exact"](
        **inputs, k=tf.constant(5), exclusions=tf.zeros([0, 0], tf.string),
        filter_group=tf.zeros([0, 1], tf.string), filter_price=tf.zeros([0, 2]),
    )  # fmt: skip
    assert answer["ids"].shape == (0, 5)
