import numpy as np
import pytest

from recsys.artifacts import ArtifactError
from serving_export.gate import against_baselines, against_champion


def test_each_counting_baseline_is_compared_and_als_is_not(tiny, tmp_path):
    lifts = {"popularity": 0.5, "als": -0.9, "markov": -0.02, "last_viewed": 0.0}
    report = tiny.write_report(tmp_path, [1], lifts)
    made = against_baselines(tiny.run_config(), report)
    assert {c.rival: c.holds for c in made} == {
        "popularity": True,
        "last_viewed": False,
        "markov": False,
    }
    asked = "an interval above +0.0% is asked for"
    assert [str(c) for c in made if not c.holds] == [
        f"ndcg@10 +0.0% over last_viewed (interval -4.0% to +4.0%; fails, {asked})",
        f"ndcg@10 -2.0% over markov (interval -6.0% to +2.0%; fails, {asked})",
    ]


@pytest.mark.parametrize(
    ("least", "lift", "margin", "holds"),
    [
        (0.0, 0.018, 0.2, False),  # the gain may be chance
        (0.0, 0.018, 0.01, True),
        (0.06, 0.05, 0.01, False),
        (0.06, 0.07, 0.05, True),  # enough, and surely a gain
        (0.06, 0.07, 0.08, False),
        (-0.01, -0.002, 0.004, True),  # surely loses less than 1 %
        (-0.01, -0.002, 0.02, False),
    ],
)
def test_margin_and_interval_decide(tiny, tmp_path, least, lift, margin, holds):
    report = tiny.write_report(tmp_path, [1], {"popularity": lift}, margin=margin)
    config = tiny.run_config(gate={"metric": "ndcg@10", "min_lift_over_baselines": least})
    assert [c.holds for c in against_baselines(config, report)] == [holds]


def test_a_champion_is_not_beaten_by_chance(tiny, tmp_path):
    noise = np.random.default_rng(7).integers(0, 9, (2, 60))
    ours = tiny.write_report(tmp_path / "ours", noise[0], {})
    theirs = tiny.write_report(tmp_path / "theirs", noise[1], {})
    pairs = [(ours, theirs), (theirs, ours)]
    luckier, other = [against_champion(tiny.run_config(), *pair, "4") for pair in pairs]
    if other.lift.value > 0:
        luckier, other = other, luckier
    assert luckier.lift.value > 0 > luckier.lift.low
    assert [luckier.holds, other.holds] == [False, False]


def test_a_second_stage_must_beat_the_first_but_by_no_margin(tiny, tmp_path):
    config = tiny.run_config(gate={"metric": "ndcg@10", "min_lift_over_baselines": 0.06})
    for lift, holds in ((0.01, True), (0.001, False), (-0.01, False)):
        lifts = {"popularity": 0.5, "retrieval": lift}
        report = tiny.write_report(tmp_path, [1], lifts, margin=0.005)
        made = {c.rival: c.holds for c in against_baselines(config, report)}
        assert made == {"popularity": True, "retrieval": holds}


def test_no_counting_baseline_is_an_error(tiny, tmp_path):
    report = tiny.write_report(tmp_path, [1], {"als": 3.0, "retrieval": 3.0})
    with pytest.raises(ArtifactError, match=r"evaluation\.baselines"):
        against_baselines(tiny.run_config(), report)


def test_missing_metric_is_an_error(tiny, tmp_path):
    report = tiny.write_report(tmp_path, [1], {"popularity": 3.0})
    config = tiny.run_config(gate={"metric": "mrr@10"})
    with pytest.raises(ArtifactError, match=r"lacks mrr@10 over popularity.*'ndcg@10'"):
        against_baselines(config, report)


def test_champion_is_compared_query_by_query(tiny, tmp_path):
    ours = tiny.write_report(tmp_path / "ours", [1, 1, 1, 0] * 10, {})
    theirs = tiny.write_report(tmp_path / "theirs", [1, 1, 0, 0] * 10, {})
    config = tiny.run_config()
    better = against_champion(config, ours, theirs, "4")
    worse = against_champion(config, theirs, ours, "4")
    assert better.rival == "champion version 4"
    assert better.lift.value == pytest.approx(0.5)
    assert better.holds
    assert worse.lift.value == pytest.approx(-1 / 3)
    assert worse.lift.low <= worse.lift.value <= worse.lift.high
    assert not worse.holds


def test_several_labels_of_a_query_are_one_value(tiny, tmp_path):
    # Of two relevant items one is found first, by both; of one, only by ours.
    splits = [0, 2, 3]
    ours = tiny.write_report(tmp_path / "ours", [1, 0, 1], {}, splits=splits)
    theirs = tiny.write_report(tmp_path / "theirs", [0, 1, 2], {}, splits=splits)
    lift = against_champion(tiny.run_config(), ours, theirs, "4").lift
    first = 1 / (1 + 1 / np.log2(3))
    assert lift.value == pytest.approx((first + 1) / (first + 1 / np.log2(3)) - 1)


def test_the_same_labels_of_other_queries_are_not_compared(tiny, tmp_path):
    ours = tiny.write_report(tmp_path / "ours", [1, 0, 1], {}, splits=[0, 2, 3])
    theirs = tiny.write_report(tmp_path / "theirs", [1, 0, 1], {}, splits=[0, 1, 3])
    with pytest.raises(ArtifactError, match="different queries"):
        against_champion(tiny.run_config(), ours, theirs, "4")


@pytest.mark.parametrize(
    ("ranks", "fingerprint"), [([1, 2, 3], "same data"), ([1, 2], "other data")]
)
def test_reports_of_different_queries_are_not_compared(tiny, tmp_path, ranks, fingerprint):
    ours = tiny.write_report(tmp_path / "ours", [1, 2], {})
    theirs = tiny.write_report(tmp_path / "theirs", ranks, {}, fingerprint)
    with pytest.raises(ArtifactError, match="different queries"):
        against_champion(tiny.run_config(), ours, theirs, "4")
