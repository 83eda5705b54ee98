import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError, EvaluationReport
from recsys.dataset import read_corpus, read_interactions
from recsys.ranks import candidate_lists, rank_queries
from training.embeddings import two_tower_scorer
from training.evaluate import evaluate_savedmodel
from training.outcomes import Outcomes
from training.two_stage import (
    TwoStages,
    exported_rank,
    impressions,
    rank_lists,
    task_quality,
)

TRAIN = [("u", "b", "a"), ("v", "c", "ab")]
# Retrieval: the letter after the last one is first, then all by price.
TEST = [("u", "b", "a"), ("v", "b", "ab"), ("w", "f", "c"), ("x", "zz", "d")]


@pytest.fixture
def stage(tiny_data, tiny_towers):
    """Data, their test queries and the first stage."""
    data = tiny_data(TRAIN, [("w", "a", "c")], TEST)
    corpus = read_corpus(data)
    queries = read_interactions(data, data.test, corpus)
    return data, queries, two_tower_scorer(tiny_towers(), data, corpus, queries.history)


def last_in_the_alphabet(raw, items, scores):
    return {"scores": np.where(items < 0, -np.inf, items).astype(np.float32)}


def lists_of(stage, rank=last_in_the_alphabet, k=3):
    data, queries, scorer = stage
    return rank_lists(rank, data, data.test, candidate_lists("c", scorer, queries, 6, k))


def test_candidates_come_first_in_the_order_of_the_ranker(stage):
    _, queries, scorer = stage
    lists = lists_of(stage)
    assert lists.items.tolist() == [[1, 0, 2], [2, 0, 1], [3, 0, 1], [4, 0, 1]]
    ranking = rank_queries("both", TwoStages(scorer, lists), queries, 6, 6, seed=1)
    assert ranking.recommended.tolist() == [
        [2, 1, 0, 3, 4, 5],
        [2, 1, 0, 3, 4, 5],
        [3, 1, 0, 2, 4, 5],
        [4, 1, 0, 2, 3, 5],
    ]
    # A label that is no candidate keeps its rank; one that is unknown cannot be found.
    assert ranking.rank.tolist() == [2, 2, 6, 0]


def test_equal_scores_leave_the_order_of_retrieval(stage):
    _, queries, scorer = stage
    lists = lists_of(stage, lambda raw, items, scores: {"scores": np.zeros_like(scores)})
    both = rank_queries("both", TwoStages(scorer, lists), queries, 6, 6, seed=1)
    alone = rank_queries("alone", scorer, queries, 6, 6, seed=1)
    assert both.recommended.tolist() == alone.recommended.tolist()
    assert both.rank.tolist() == alone.rank.tolist()


def test_the_ranker_gets_each_request_with_its_candidates(stage):
    asked = []

    def rank(raw, items, scores):
        asked.extend(zip(raw["history"].numpy()[:, 0].tolist(), items.tolist(), strict=True))
        return {"scores": scores}

    lists_of(stage, rank)
    assert asked == [(b"a", [1, 0, 2]), (b"a", [2, 0, 1]), (b"c", [3, 0, 1]), (b"d", [4, 0, 1])]


def test_impressions_compare_both_scorers_on_the_same_candidates(stage):
    found = impressions(lists_of(stage), stage[1])
    assert set(found) == {"model", "retrieval"}
    assert found["model"]["candidates"] == found["retrieval"]["candidates"] == 12
    assert found["model"]["positives"] == 2
    # First and third place by retrieval, second twice by the ranker.
    assert found["retrieval"]["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["model"]["mrr"] == pytest.approx(1 / 2)


def test_all_labels_of_a_query_are_relevant(stage):
    queries = dataclasses.replace(
        stage[1], label=np.array([1, 2, 0, 5, -1]), splits=np.array([0, 2, 3, 4, 5])
    )
    assert impressions(lists_of(stage), queries)["model"]["positives"] == 3


def test_each_task_is_judged_by_its_own_log_odds(stage):
    def rank(raw, items, scores):
        odds = np.stack([-items, items, items], axis=-1).astype(np.float32)
        return {"scores": odds[..., 0], "log_odds": odds}

    # Query 0 has candidates 1 0 2, query 3 has 4 0 1.
    item = np.array([0, 2, 4], np.int32)
    outcomes = Outcomes(("buy", "cart", "fav"), np.array([0, 0, 3]), item, np.array([0, 1, 1]))
    found = task_quality(lists_of(stage, rank), stage[1], outcomes)
    assert list(found) == ["buy", "cart", "fav"]
    assert found["buy"]["request_auc"] == found["cart"]["request_auc"] == 1.0
    assert [found[task]["positives"] for task in found] == [1, 2, 0]
    # Of what never came there is no AUC.
    assert "auc" not in found["fav"]
    assert found["fav"]["log_loss"] > 0


def test_scores_that_are_no_number_are_refused(stage):
    with pytest.raises(ArtifactError, match=r"diverged.*ranking\.learning_rate"):
        lists_of(stage, lambda raw, items, scores: {"scores": scores * np.nan})


class Exported(tf.Module):
    """Towers with a second stage that likes what is last in the alphabet."""

    def __init__(self, towers):
        super().__init__()
        self.towers = towers
        specs = {
            "history": tf.TensorSpec([None, None], tf.string, "history"),
            "candidates": tf.TensorSpec([None, None], tf.string, "candidates"),
        }
        self.letters = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(list("abcdef"), tf.range(6.0)), -np.inf
        )
        rank = tf.function(self.rank).get_concrete_function(**specs)
        self.by_name = dict(towers.signatures) | {"rank": rank}

    def rank(self, history, candidates):
        return {"scores": self.letters.lookup(candidates)}


def test_a_champion_of_two_stages_is_judged_by_both(stage, tiny_config, tiny_towers, tmp_path):
    data, _, _ = stage
    first = tiny_towers("first")
    assert exported_rank(first, read_corpus(data)) is None
    folder = tmp_path / "champion"
    module = Exported(tf.saved_model.load(str(first)))
    tf.saved_model.save(module, str(folder), signatures=module.by_name)
    (folder / "assets.extra").mkdir()
    contract = folder / "assets.extra" / "contract.json"
    contract.write_text(json.dumps({"ranking": {"candidates": 3}}))
    report = evaluate_savedmodel(tiny_config, data, folder, tmp_path / "evaluation")
    with np.load(report.directory / report.per_query) as stored:
        assert stored["rank_model"].tolist() == [2, 2, 6, 0]
    assert EvaluationReport.load(tmp_path / "evaluation").impressions == {}
    rank, _ = exported_rank(folder, read_corpus(data))
    raw = {"history": tf.constant([["a"]]), "country": tf.constant(["AT"])}
    found = rank(raw, np.array([[5, 0, -1]]), None)["scores"]
    assert found.tolist() == [[5, 0, -np.inf]]
