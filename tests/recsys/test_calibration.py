import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from recsys.binary_metrics import expected_calibration_error, log_loss
from recsys.calibration import fit_calibration


@pytest.fixture
def overconfident():
    """Labels of rare events, and scores that are too large and too high."""
    random = np.random.default_rng(5)
    odds = random.normal(-3, 1, 20_000)
    return random.random(20_000) < expit(odds), 2.5 * odds + 4


def test_scale_and_offset_are_found(overconfident):
    calibration = fit_calibration(*overconfident)
    assert calibration.scale == pytest.approx(0.4, rel=0.1)
    assert calibration.offset == pytest.approx(-1.6, rel=0.1)


def test_it_is_the_logistic_regression_of_scikit_learn(overconfident):
    labels, scores = overconfident
    peer = LogisticRegression(C=np.inf, tol=1e-8).fit(scores[:, np.newaxis], labels)
    calibration = fit_calibration(labels, scores)
    assert calibration.scale == pytest.approx(peer.coef_[0, 0], rel=1e-3)
    assert calibration.offset == pytest.approx(peer.intercept_[0], rel=1e-3)


def test_calibrated_scores_can_be_believed_and_keep_their_order(overconfident):
    labels, scores = overconfident
    calibrated = fit_calibration(labels, scores)(scores)
    assert expected_calibration_error(labels, scores) > 0.05
    assert expected_calibration_error(labels, calibrated) < 0.005
    assert log_loss(labels, calibrated) < log_loss(labels, scores)
    assert np.array_equal(np.argsort(scores), np.argsort(calibrated))


def test_scores_that_point_the_wrong_way_are_flattened_not_turned(overconfident):
    labels, scores = overconfident
    assert 0 < fit_calibration(labels, -scores).scale <= 0.0101


def test_without_both_labels_scores_stay_as_they_are():
    assert fit_calibration(np.zeros(3), np.arange(3.0)) == (1.0, 0.0)
