import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError, ExportedModel, TrainedRanker
from recsys.calibration import Calibration
from recsys.config import Export
from recsys.dataset import raw_batches, read_corpus
from recsys.features import FeatureEncoder
from recsys.list_config import Diversity, EpsilonGreedy
from recsys.models.embed import embed, in_batches, load_towers
from recsys.models.multitask import Multitask
from recsys.models.ranker_features import KnownItems
from recsys.ranking_config import Ranking
from serving_export.diversity import follows
from serving_export.exploration import explains
from serving_export.index import ExactIndex
from serving_export.list_end import Options
from serving_export.restrictions import restrictions
from serving_export.retriever import Policy
from serving_export.savedmodel import export
from serving_export.two_stage import Stages, TwoStageRecommender, load_second
from serving_export.verify import Expectation, _close, ask, verify

CANDIDATES = 12
UNKNOWN = "🤷 no such id"


def write_ranker(data, corpus, directory):
    """A ranker of two tasks that was not trained, but differs from retrieval."""
    tf.keras.utils.set_random_seed(3)
    random = np.random.default_rng(4).normal
    size = len(corpus)
    items = KnownItems(
        corpus,
        random(size=(size, 4)).astype(np.float32),
        random(size=(size, 2)).astype(np.float32),
    )
    config = Ranking(
        candidates=CANDIDATES,
        attention_dim=4,
        hidden=(8,),
        tasks={"buy": 1.0, "cart": 1.0},
        order={"buy": 1.0, "cart": 0.25},
    )
    encoder = FeatureEncoder(data)
    ranker = Multitask(config, data.features, encoder, items, seed=1, prior=np.zeros(2))
    ranker.features.standardise_scores(0.0, 10.0)
    queries = next(iter(raw_batches(data, data.test, 4)))
    rows = tf.tile(tf.range(5)[tf.newaxis], [4, 1])
    request = queries | {"candidates": rows, "retrieval_scores": tf.zeros([4, 5])}
    ranker(ranker.features(request))
    for tower in ranker.network.head._towers:
        tower._output.kernel.assign(random(size=tower._output.kernel.shape))
    calibrations = Calibration(0.7, -1.0), Calibration(1.3, -2.0)
    ranker.save_ranker(directory / "ranker", items.statistics, *calibrations)
    return TrainedRanker(
        directory=directory,
        ranker="ranker",
        lists={},
        with_label={},
        candidates=CANDIDATES,
        features=data.features,
        best_epoch=1,
        curves={},
        held_out={},
        tasks={"buy": {}, "cart": {}},
        versions={},
    ).save()


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """An export of two stages, and what the offline pipeline needs to answer the same."""
    root = tmp_path_factory.mktemp("two")
    data = tiny.write_data(root / "data")
    model = tiny.write_model(data, root / "model")
    corpus = read_corpus(data)
    ranker = write_ranker(data, corpus, root / "ranking")
    exported = export(tiny.run_config(), data, model, root / "export", ranker)
    towers = load_towers(model.directory / model.towers)
    return SimpleNamespace(
        data=data,
        model=model,
        corpus=corpus,
        ranker=ranker,
        towers=towers,
        exported=exported,
        variants={n: exported.directory / p for n, p in exported.variants.items()},
        embeddings=embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"],
        second=load_second(ranker),
    )


@pytest.fixture(params=["scann", "exact"])
def served(made, request):
    return tf.saved_model.load(str(made.variants[request.param]))


def queries_of(tiny, histories, members):
    """Raw features of queries; what is not given is missing."""
    n, width = len(histories), 5
    padded = [[*h, *[""] * (width - len(h))] for h in histories]
    return {
        "history": np.array([[i.encode() for i in row] for row in padded], object),
        "member": np.array([m.encode() for m in members], object),
        "country": np.array([b""] * n, object),
        "basket": np.full(n, np.nan, np.float32),
        "clicked_at": np.full(n, -1, np.int64),
        "taste": np.zeros((n, 3), np.float32),
    }


def offline(made, queries, excluded):
    """Scores of both stages, `[queries, N]`, by the pipeline that evaluation uses."""
    expectation = Expectation(
        data=made.data,
        corpus=made.corpus,
        queries=queries,
        embeddings=made.embeddings,
        embedded=embed(made.towers, "embed_query", in_batches(queries)),
        second=made.second,
    )
    first = expectation.scores()
    for query, items in enumerate(excluded):
        first[query, items] = -np.inf
    return expectation.ranked(first)[0]


def test_the_export_was_compared_in_a_fresh_process(made):
    assert made.exported.parity == {"scann": 1.0, "exact": 1.0}
    assert ExportedModel.load(made.exported.directory) == made.exported


def test_a_fresh_process_answers_as_the_offline_pipeline_scores(made, tiny):
    """Known users, unknown users, empty histories, k larger than the corpus, all excluded."""
    everything = list(range(len(made.corpus)))
    queries = queries_of(
        tiny,
        [
            [tiny.item(3), tiny.item(9)],
            [tiny.item(1)],
            [],
            [UNKNOWN],
            [],
            [tiny.item(2)],
            [tiny.item(4)],
        ],
        ["user 1", UNKNOWN, "user 2", "user 3", UNKNOWN, "user 5", "user 4"],
    )
    excluded = [[], [], [], [], [], everything, [0, 1, 2, *everything[8:]]]
    width = len(everything)
    exclusions = np.full((len(excluded), width), b"", object)
    for row, items in enumerate(excluded):
        exclusions[row, : len(items)] = made.corpus.item[items]
    request = queries | {"exclusions": exclusions, "k": np.int32(1000)}
    scores = offline(made, queries, excluded)
    best = -np.sort(-scores, axis=1)[:, :CANDIDATES]
    for answer in ask(made.variants, request).values():
        assert answer["ids"].shape == (len(excluded), CANDIDATES)
        assert _close(answer["scores"], best).all()
        rows = {item: row for row, item in enumerate(made.corpus.item)}
        for query, (ids, found) in enumerate(zip(answer["ids"], answer["scores"], strict=True)):
            own = [scores[query, rows[i]] if i else -np.inf for i in ids.tolist()]
            assert _close(found, np.array(own)).all()
        # Everything was excluded: no answer. Five were left: five answers.
        assert not answer["ids"][5].any()
        assert np.isneginf(answer["scores"][5]).all()
        assert np.count_nonzero(answer["ids"][6]) == 5
        # Of the unknown user without a history nothing is known: popularity, which is not ranked.
        assert answer["ids"][4].tolist() == made.corpus.item[:CANDIDATES].tolist()


def test_the_second_stage_decides_the_order(served, tiny):
    histories = [[tiny.item(n), tiny.item(2 * n)] for n in range(1, 9)]
    request = queries_of(tiny, histories, [f"user {n % 6}" for n in range(8)])
    request = {name: tf.constant(values) for name, values in request.items()}
    tail = {"k": tf.constant(CANDIDATES), "exclusions": tf.constant([[""]] * 8)}
    ranked = served.signatures["recommend"](**request, **tail)["ids"].numpy()
    found = served.signatures["retrieve"](**request, **tail)["ids"].numpy()
    assert [set(row) for row in ranked] == [set(row) for row in found]
    assert (ranked != found).mean() > 0.3
    more = tail | {"k": tf.constant(1000)}
    assert served.signatures["retrieve"](**request, **more)["ids"].shape == (8, tiny.num_items)
    few = tail | {"k": tf.constant(3)}
    short = served.signatures["recommend"](**request, **few)["ids"].numpy()
    assert short.tolist() == ranked[:, :3].tolist()


def test_rank_scores_the_candidates_that_are_given(served, tiny):
    histories, members = [[tiny.item(3)], [tiny.item(7)], []], ["user 1", "user 2", UNKNOWN]
    request = queries_of(tiny, histories, members)
    request = {name: tf.constant(values) for name, values in request.items()}
    tail = {"k": tf.constant(CANDIDATES), "exclusions": tf.constant([[""]] * 3)}
    answer = served.signatures["recommend"](**request, **tail)
    turned = tf.reverse(answer["ids"], [1])
    again = served.signatures["rank"](**request, candidates=turned)["scores"].numpy()
    assert _close(again[:, ::-1], answer["scores"].numpy()).all()
    strange = tf.concat([turned[:, :1], [[UNKNOWN], [""], [UNKNOWN]]], axis=1)
    scores = served.signatures["rank"](**request, candidates=strange)["scores"].numpy()
    assert np.isneginf(scores[:, 1]).all()
    assert np.isfinite(scores[:, 0]).all()


def test_rank_tells_the_probability_of_each_task(served, tiny):
    request = queries_of(tiny, [[tiny.item(3)], [tiny.item(7)]], ["user 1", "user 2"])
    request = {name: tf.constant(values) for name, values in request.items()}
    candidates = tf.constant([[tiny.item(n) for n in range(5)] + [UNKNOWN, ""]] * 2)
    answer = served.signatures["rank"](**request, candidates=candidates)
    chance = answer["probabilities"].numpy()
    assert chance.shape == (2, 7, 2)
    assert (chance[:, 5:] == 0).all()
    assert ((chance[:, :5] > 0) & (chance[:, :5] < 1)).all()
    mixed = chance[:, :5] @ [0.8, 0.2]
    assert _close(answer["scores"].numpy()[:, :5], np.log(mixed / (1 - mixed))).all()


def test_what_may_not_be_returned_is_not_ranked(made, tiny, tmp_path):
    """Few pass: all of them are ranked, though the index alone would not find them all."""
    settings = Export(filters=("price",), availability=True, overfetch=2)
    restricted = restrictions(settings, made.corpus, made.data.features, tmp_path)
    served = TwoStageRecommender(
        Stages(made.towers, made.second), ExactIndex(made.embeddings), made.corpus, made.data,
        made.embeddings, Policy(True, restricted),
    )  # fmt: skip
    histories = [[tiny.item(n)] for n in range(1, 7)] + [[]]
    queries = queries_of(tiny, histories, ["user 1"] * 6 + [UNKNOWN])
    ends = np.array([[0.5, np.nan]] * 3 + [[0.9, 1]] * 3 + [[0.2, 0.3]], np.float32)
    prices = made.corpus.features["price"]
    dropped = [np.flatnonzero((prices < least) | (prices > most)) for least, most in ends]
    expected = -np.sort(-offline(made, queries, dropped), axis=1)[:, :CANDIDATES]
    request = {name: tf.constant(values) for name, values in queries.items()}
    answer = tf.function(served.recommend)(
        **request, k=tf.constant(100), exclusions=tf.constant([[""]] * 7), filter_price=ends
    )
    assert _close(answer["scores"].numpy(), expected).all()
    assert np.isfinite(expected).sum(axis=1).tolist() == [12, 12, 12, 6, 6, 6, 7]
    rows = {item: row for row, item in enumerate(made.corpus.item)}
    for (least, most), ids in zip(ends, answer["ids"].numpy().tolist(), strict=True):
        found = prices[[rows[item] for item in ids if item]]
        assert not ((found < least) | (found > most)).any()


def test_what_was_ranked_is_made_diverse(made, tiny):
    """By the ranker's scores within a pool; retrieval alone stays as it was."""
    settings = Diversity(relevance=0.4, pool=8)
    parts = ExactIndex(made.embeddings), made.corpus, made.data, made.embeddings
    served = [
        TwoStageRecommender(Stages(made.towers, made.second), *parts, Policy(end=Options(chosen)))
        for chosen in (None, settings)
    ]
    queries = queries_of(tiny, [[tiny.item(n)] for n in range(1, 7)] + [[]], ["user 1"] * 7)
    tail = {"k": tf.constant(10), "exclusions": tf.constant([[""]] * 7)}
    request = {name: tf.constant(values) for name, values in queries.items()} | tail
    plain, diverse = (tf.function(s.recommend)(**request) for s in served)
    scores = offline(made, queries, [[]] * 7)
    rows = {item: row for row, item in enumerate(made.corpus.item)}
    found = np.array([[rows[i] for i in ids] for ids in diverse["ids"].numpy().tolist()])
    assert follows(settings, scores, made.embeddings, found).all()
    assert _close(diverse["scores"].numpy(), np.take_along_axis(scores, found, axis=1)).all()
    assert (diverse["ids"] != plain["ids"]).numpy()[:, :8].mean() > 0.3
    assert (diverse["ids"] == plain["ids"]).numpy()[:, 8:].all()
    found = [tf.function(s.retrieve)(**request)["ids"].numpy().tolist() for s in served]
    assert found[0] == found[1]


def test_the_last_places_explore_what_was_ranked(made, tiny):
    settings = EpsilonGreedy(kind="epsilon_greedy", epsilon=0.4, slots=2, pool=10, seed=1)
    served = TwoStageRecommender(
        Stages(made.towers, made.second), ExactIndex(made.embeddings), made.corpus, made.data,
        made.embeddings, Policy(end=Options(None, settings)),
    )  # fmt: skip
    queries = queries_of(tiny, [[tiny.item(n)] for n in range(1, 7)] + [[]], ["user 1"] * 7)
    tail = {"k": tf.constant(5), "exclusions": tf.constant([[""]] * 7)}
    request = {name: tf.constant(values) for name, values in queries.items()} | tail
    answer = {n: v.numpy() for n, v in tf.function(served.recommend)(**request).items()}
    rows = {item: row for row, item in enumerate(made.corpus.item)}
    found = np.array([[rows[i] for i in ids] for ids in answer["ids"].tolist()])
    scores = offline(made, queries, [[]] * 7)
    assert explains(settings, scores, found, answer["propensities"], arranged=False).all()
    assert (answer["propensities"][:, :3] == 1).all()


def test_the_contract_says_how_many_are_ranked(made):
    for folder in made.variants.values():
        contract = json.loads((folder / "assets.extra" / "contract.json").read_text())
        assert contract["ranking"] == {"candidates": CANDIDATES, "tasks": ["buy", "cart"]}
        assert {"recommend", "retrieve", "rank"} < set(contract["signatures"])
        assert contract["signatures"]["rank"]["inputs"]["candidates"] == {
            "dtype": "string",
            "shape": [None, None],
        }


def test_the_digest_follows_the_ranker(made, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("serving_export.savedmodel.verify", lambda *_: {})
    alone = export(tiny.run_config(), made.data, made.model, tmp_path / "alone")
    assert alone.digest != made.exported.digest
    contract = tmp_path / "alone" / "exact" / "assets.extra" / "contract.json"
    assert "ranking" not in json.loads(contract.read_text())


def test_a_ranker_of_another_schema_is_refused(made, tiny, tmp_path):
    features = made.data.features
    shorter = features.model_copy(update={"features": features.features[:-1]})
    other = made.ranker.model_copy(update={"features": shorter})
    with pytest.raises(ArtifactError, match=r"'price' is new.*Run `recsys rank` again"):
        export(tiny.run_config(), made.data, made.model, tmp_path / "export", other)


def test_other_answers_than_those_of_the_ranker_are_refused(made, monkeypatch):
    """The export is compared with the ranker, not with itself."""

    def ask(variants, request):
        inputs = {name: tf.constant(values) for name, values in request.items()}
        return {
            name: {
                key: values.numpy().astype(bytes) if key == "ids" else values.numpy()
                for key, values in tf.saved_model.load(str(folder))
                .signatures["recommend"](**inputs)
                .items()
            }
            for name, folder in variants.items()
        }

    monkeypatch.setattr("serving_export.verify.ask", ask)
    queries = next(iter(raw_batches(made.data, made.data.test, 16).as_numpy_iterator()))
    expectation = Expectation(
        data=made.data,
        corpus=made.corpus,
        queries=queries,
        embeddings=made.embeddings,
        embedded=embed(made.towers, "embed_query", in_batches(queries)),
        second=made.second,
    )
    settings = made.exported.index, Export()
    assert verify(expectation, made.variants, *settings)["exact"] == 1.0
    fewer = made.second._replace(candidates=CANDIDATES - 1)
    other = dataclasses.replace(expectation, second=fewer)
    with pytest.raises(ArtifactError, match=r"exact SavedModel.* gives 0\.\d+ of the expected"):
        verify(other, made.variants, *settings)
