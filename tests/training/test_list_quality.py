import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from training.list_quality import list_quality


def test_metrics_of_random_lists_are_those_of_scikit_learn():
    random = np.random.default_rng(1)
    scores = random.normal(size=(200, 30))
    relevant = np.zeros((200, 30), bool)
    relevant[np.arange(150), random.integers(0, 30, 150)] = True
    present = np.ones_like(relevant)
    present[:, 25:] = random.random((200, 5)) < 0.5
    quality = list_quality(relevant, present, scores, np.arange(200) // 2)
    own = relevant & present
    assert quality["candidates"] == present.sum()
    assert quality["positives"] == own.sum()
    assert quality["auc"] == pytest.approx(roc_auc_score(own[present], scores[present]))
    some = own.any(axis=1)
    hidden = np.where(present, scores, -99)
    expected = ndcg_score(own[some].astype(float), hidden[some], k=10)
    assert quality["ndcg@10"] == pytest.approx(expected)
    places = [
        (row[own_row] <= row).sum() for row, own_row in zip(hidden[some], own[some], strict=True)
    ]
    assert quality["mrr"] == pytest.approx(np.mean(1 / np.array(places)))


def test_a_constant_scorer_earns_nothing():
    relevant = np.array([[True, False, False]])
    quality = list_quality(relevant, np.ones_like(relevant), np.zeros((1, 3)), np.zeros(1, int))
    assert quality["mrr"] == pytest.approx(1 / 3)
    assert quality["auc"] == quality["request_auc"] == 0.5


def test_lists_without_a_label_order_nothing():
    relevant = np.zeros((2, 3), bool)
    quality = list_quality(relevant, ~relevant, np.zeros((2, 3)), np.arange(2))
    assert quality["ndcg@10"] == quality["mrr"] == 0.0
    assert np.isnan(quality["auc"])
    assert quality["log_loss"] == pytest.approx(np.log(2))
