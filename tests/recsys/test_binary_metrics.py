import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from recsys.binary_metrics import auc, expected_calibration_error, grouped_auc, log_loss


@pytest.fixture
def drawn():
    """Labels, log odds with many ties, and users."""
    random = np.random.default_rng(3)
    scores = np.round(random.normal(size=4000), 1)
    labels = random.random(4000) < expit(scores - 2)
    return labels, scores, random.integers(0, 300, 4000)


def test_auc_is_that_of_scikit_learn(drawn):
    labels, scores, _ = drawn
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_grouped_auc_is_the_mean_of_scikit_learns_by_user(drawn):
    labels, scores, users = drawn
    values, sizes = [], []
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            values.append(roc_auc_score(labels[own], scores[own]))
            sizes.append(own.sum())
    assert 0 < len(values) < 300
    expected = np.average(values, weights=sizes)
    assert grouped_auc(labels, scores, users) == pytest.approx(expected, abs=1e-12)


def test_log_loss_is_that_of_scikit_learn(drawn):
    labels, scores, _ = drawn
    assert log_loss(labels, scores) == pytest.approx(sklearn_log_loss(labels, expit(scores)))


def test_labels_that_are_all_equal_have_no_auc():
    ones = np.ones(3, int)
    assert np.isnan(auc(ones, np.arange(3.0)))
    assert np.isnan(grouped_auc(ones, np.arange(3.0), np.arange(3)))


def test_true_probabilities_have_nearly_no_calibration_error(drawn):
    labels, scores, _ = drawn
    right = expected_calibration_error(labels, scores - 2)
    assert right < 0.02
    assert expected_calibration_error(labels, scores) > 10 * right


def test_calibration_error_by_hand():
    labels = np.array([0, 1, 1, 1])
    odds = np.log(np.array([0.25, 0.25, 0.5, 0.5]) / (1 - np.array([0.25, 0.25, 0.5, 0.5])))
    # Two bins: 0.25 beside 0.5, and 0.5 beside 1.
    assert expected_calibration_error(labels, odds, bins=2) == pytest.approx((0.25 + 0.5) / 2)
