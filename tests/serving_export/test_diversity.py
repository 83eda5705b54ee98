import json

import numpy as np
import pytest
import tensorflow as tf

from recsys import list_config
from recsys.dataset import raw_batches, read_corpus
from recsys.models.embed import embed, in_batches, load_towers
from serving_export import verify
from serving_export.diversity import Diversity, follows
from serving_export.savedmodel import export

NUM_ITEMS, DIM = 60, 4


def by_hand(settings, scores, embeddings, k):
    """Positions of one list in the order of MMR, by loops; then what is behind the pool."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    pool = [n for n in range(min(settings.pool, len(scores))) if np.isfinite(scores[n])]
    span = scores[pool[0]] - scores[pool[-1]] if pool else 0
    chosen = []
    for _ in range(min(k, len(pool))):
        values = {
            n: settings.relevance * (scores[n] - scores[pool[-1]]) / (span or 1)
            - (1 - settings.relevance) * max((unit[n] @ unit[m] for m in chosen), default=0)
            for n in pool
            if n not in chosen
        }
        chosen.append(max(values, key=values.get))
    return (chosen + [n for n in range(len(scores)) if n not in chosen])[:k]


@pytest.fixture(scope="module")
def lists():
    """Embeddings, and lists of 20 sorted scores, of which some places are empty."""
    random = np.random.default_rng(1)
    embeddings = random.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    rows = np.stack([random.permutation(NUM_ITEMS)[:20] for _ in range(12)]).astype(np.int32)
    scores = -np.sort(-random.normal(size=rows.shape)).astype(np.float32)
    scores[0] = -np.inf
    scores[1, 3:] = -np.inf
    scores[2] = 0.5
    return embeddings, rows, scores


@pytest.mark.parametrize("k", [0, 1, 6, 15])
@pytest.mark.parametrize("relevance", [0.0, 0.3, 1.0])
def test_the_graph_chooses_as_loops_do(lists, relevance, k):
    """Behind a pool of eight the order stays; with relevance alone it stays everywhere."""
    embeddings, rows, scores = lists
    settings = list_config.Diversity(relevance=relevance, pool=8)
    made = Diversity(settings, tf.Variable(embeddings))
    found, theirs = tf.function(made.arranged)(rows, scores, tf.constant(k))
    assert found.shape == rows.shape
    for n in range(len(rows)):
        order = by_hand(settings, scores[n], embeddings[rows[n]], k)
        assert found[n, :k].numpy().tolist() == rows[n, order].tolist()
        np.testing.assert_array_equal(theirs[n, :k], scores[n, order])
        assert sorted(found[n].numpy()) == sorted(rows[n])
        if relevance == 1:
            assert order == list(range(k))


def test_the_check_takes_the_right_answer_alone(lists):
    embeddings, rows, scores = lists
    whole = np.full((len(rows), NUM_ITEMS), -np.inf, np.float32)
    np.put_along_axis(whole, rows, scores, axis=1)
    settings = list_config.Diversity(relevance=0.5, pool=8)
    orders = [by_hand(settings, scores[n], embeddings[rows[n]], 12) for n in range(len(rows))]
    answer = np.take_along_axis(rows, np.array(orders), axis=1)
    answer[~np.isfinite(np.take_along_axis(whole, answer, axis=1))] = -1
    certain = np.arange(len(rows)) != 2  # one query's scores are equal: any pool will do
    assert follows(settings, whole, embeddings, answer)[certain].all()
    by_score = np.where(np.isfinite(scores), rows, -1)[:, :12]
    assert follows(settings, whole, embeddings, by_score)[certain].mean() < 0.9
    twice = answer.copy()
    twice[:, 1] = twice[:, 0]
    assert not follows(settings, whole, embeddings, twice)[3:, 1].any()
    missing = answer.copy()
    missing[:, 11] = -1
    assert not follows(settings, whole, embeddings, missing)[3:, 11].any()


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("diverse")
    data = tiny.write_data(root / "data")
    config = tiny.run_config(diversity={"relevance": 0.5, "pool": 20}, filters=["price"])
    model = tiny.write_model(data, root / "model")
    return config, data, model, export(config, data, model, root / "export")


def test_an_export_answers_so_in_a_fresh_process(served, tiny):
    _, data, _, exported = served
    assert exported.parity == {"scann": 1.0, "exact": 1.0}
    contract = (exported.directory / "scann" / "assets.extra" / "contract.json").read_text()
    assert json.loads(contract)["diversity"] == {"relevance": 0.5, "pool": 20}
    model = tf.saved_model.load(str(exported.directory / "exact")).signatures["recommend"]
    specs = {n: s for n, s in model.structured_input_signature[1].items() if n != "k"}
    empty = {n: tf.zeros([2, *s.shape[1:].as_list()][: s.shape.rank], s.dtype)
             for n, s in specs.items() if n not in ("history", "exclusions", "filter_price")}  # fmt: skip
    request = empty | {
        "history": tf.constant([[tiny.item(1), tiny.item(2)], [tiny.item(5), ""]]),
        "exclusions": tf.zeros([2, 0], tf.string),
        "filter_price": tf.fill([2, 2], np.nan),
    }
    ids, scores = (model(k=tf.constant(30), **request)[n].numpy() for n in ("ids", "scores"))
    # The pool is ordered by MMR, the rest by score; a longer list begins with a shorter one.
    assert (np.diff(scores[:, :20]) > 0).any(axis=1).all()
    assert (np.diff(scores[:, 20:]) <= 0).all()
    assert (scores[:, :20].min(axis=1) >= scores[:, 20]).all()
    short = model(k=tf.constant(7), **request)["ids"].numpy()
    assert short.tolist() == ids[:, :7].tolist()
    assert len(read_corpus(data)) == tiny.num_items


def test_another_rule_than_that_of_the_model_is_told(served, monkeypatch):
    """The comparison is with NumPy, not with itself."""
    config, data, model, exported = served
    towers, corpus = load_towers(model.directory / model.towers), read_corpus(data)
    queries = next(iter(raw_batches(data, data.test, 16).as_numpy_iterator()))
    expectation = verify.Expectation(
        data=data,
        corpus=corpus,
        queries=queries,
        embeddings=embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"],
        embedded=embed(towers, "embed_query", in_batches(queries)),
    )
    variants = {name: exported.directory / path for name, path in exported.variants.items()}
    monkeypatch.setattr(verify, "ask", answers_here)
    assert verify.verify(expectation, variants, exported.index, config.export)["exact"] == 1
    other = list_config.Diversity(relevance=0.9, pool=20)
    asked = config.export.model_copy(update={"diversity": other})
    with pytest.raises(verify.ArtifactError, match=r"exact SavedModel.* gives 0\.\d+ of the exp"):
        verify.verify(expectation, variants, exported.index, asked)


def answers_here(variants, request):
    """As `verify.ask`, without a process of its own."""
    inputs = {name: tf.constant(values) for name, values in request.items()}
    answers = {}
    for name, folder in variants.items():
        answer = tf.saved_model.load(str(folder)).signatures["recommend"](**inputs)
        ids, scores = answer["ids"].numpy().astype(bytes), answer["scores"].numpy()
        answers[name] = {"ids": ids, "scores": scores}
    return answers
