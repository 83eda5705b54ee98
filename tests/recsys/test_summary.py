import shlex

from recsys.artifacts import (
    Estimate,
    EvaluationReport,
    IndexPoint,
    IndexReport,
    Promotion,
    RegisteredModel,
    Scoring,
)
from recsys.drift_report import Distribution, DriftReport, Finding, Moved
from recsys.summary import (
    Recommendation,
    decision_lines,
    drift_table,
    impressions_table,
    index_table,
    lifts_table,
    metrics_table,
    recommendation_lines,
    slices_table,
    trials_table,
    tuning_lines,
)
from recsys.tuning_report import TrialReport, TuningReport

METRICS = {
    f"{name}@20": Estimate(value=0.5, low=0.4, high=0.6)
    for name in ("recall", "ndcg", "mrr", "coverage", "novelty")
}
REPORT = EvaluationReport(
    num_queries=10,
    num_candidates=20,
    window=(None, None),
    data_fingerprint="f",
    model=METRICS,
    baselines={"popularity": {k: Estimate(value=0.25, low=0, high=1) for k in METRICS}},
    lifts={"popularity": {"ndcg@20": Estimate(value=1.0, low=0.8, high=1.25)}},
    slices={"user": {"cold": {"queries": 10.0, "ndcg@20": 0.125}}},
    per_query="x.npz",
)


def test_metrics_stand_in_columns_with_intervals():
    lines = metrics_table(REPORT, 20).splitlines()
    assert lines[0].split() == list(METRICS)
    assert lines[1].split() == ["model", *["0.5000"] * 5]
    assert lines[2].split() == ["0.4000-0.6000"] * 5
    assert lines[3].split() == ["popularity", *["0.2500"] * 5]
    assert len({len(line) for line in lines}) == 1


def test_lifts_and_slices():
    assert "+100.0%  +80.0% to +125.0%" in lifts_table(REPORT, "ndcg@20")
    assert slices_table(REPORT.slices, "ndcg@20").splitlines()[1].split() == [
        "user",
        "cold",
        "10",
        "0.1250",
    ]


def test_the_chosen_index_is_marked_among_the_others():
    exact = IndexPoint(
        kind="brute_force", parameters={}, recall=1, bytes=2**20, milliseconds_per_query=2
    )
    tree = exact.model_copy(
        update={"kind": "tree", "parameters": {"reorder": 40, "avq": 2.5}, "recall": 0.96}
    )
    report = IndexReport(**tree.model_dump(), k=10, curve=(tree, exact))
    assert [line.split() for line in index_table(report).splitlines()] == [
        ["index", "recall@10", "ms", "a", "query", "MiB", "settings"],
        ["tree", "*", "0.9600", "2.0000", "1.0", "reorder=40", "avq=2.5"],
        ["brute_force", "1.0000", "2.0000", "1.0"],
    ]


def test_the_verdict_has_its_reasons(tmp_path):
    registered = RegisteredModel(name="m", model_version="2", uri="models:/m/2", run_id="r")
    refused = Promotion(
        name="m",
        alias="champion",
        promoted=False,
        previous_version="1",
        model_version="2",
        reasons=["loses to markov"],
    )
    scoring = Scoring(destination="a.table", num_users=3, k=5, name="m", model_version="1")
    lines = decision_lines(registered, refused, scoring)
    assert lines[0] == "version    models:/m/2 (MLflow run r)"
    assert lines[1] == "gate       not promoted"
    assert lines[2].endswith("- loses to markov")
    assert lines[3] == "scores     3 users, top 5, by version 1: a.table"


def test_users_are_shown_with_their_latest_items():
    shown = [Recommendation("u", list("abcdefg"), [("x", 0.5)]), Recommendation("v", [], [])]
    assert recommendation_lines(shown) == [
        "user u: c > d > e > f > g",
        "  1. x  (0.500)",
        "user v: nothing yet",
    ]


def tuning_report(best):
    plain = TrialReport(number=0, state="complete", value=0.4, epochs=6, overrides=[])
    wide = ["model.hidden=[64, 32]", "train.optimizer=adam"]
    better = TrialReport(number=2, state="complete", value=0.5, epochs=6, overrides=wide)
    failed = TrialReport(
        number=1, state="failed", value=None, epochs=0, overrides=["model.dropout=0.9"]
    )
    chosen = better if best == 2 else plain
    return TuningReport(
        study="s",
        monitor="ndcg@20",
        best_trial=best,
        best_value=chosen.value,
        best_overrides=chosen.overrides,
        best_model=f"trial-{best:04d}",
        trials=[better, plain, failed],
    )


def test_trials_and_the_command_that_uses_the_best(tmp_path):
    lines = trials_table(tuning_report(2)).splitlines()
    assert lines[0].split() == ["settings", "trial", "validation", "ndcg@20", "epochs", "state"]
    assert lines[1].startswith("model.hidden=[64, 32] train.optimizer=adam ")
    assert lines[2].split() == ["config", "as", "it", "is", "0", "0.4000", "6", "complete"]
    assert lines[3].split() == ["model.dropout=0.9", "1", "0", "failed"]
    told, command = tuning_lines(tuning_report(2), tmp_path / "one").splitlines()
    assert told == "best: trial 2, ndcg@20 0.5000, +25.0% over the config as it is"
    assert shlex.split(command)[4:] == [
        "--run-dir", f"{tmp_path}/one-tuned", "--set", "model.hidden=[64, 32]", "--set", "train.optimizer=adam"
    ]  # fmt: skip


def test_nothing_was_better(tmp_path):
    told = tuning_lines(tuning_report(0), tmp_path)
    assert told.endswith("nothing was better than the config as it is")


def test_impressions_compare_the_stages_and_hide_what_means_nothing():
    values = {"auc": 0.9, "user_auc": 0.8, "request_auc": 0.7, "ndcg@10": 0.6, "mrr": 0.5}
    both = values | {"log_loss": 0.25, "calibration_error": 0.125}
    # Of an event that never came there is no AUC.
    scorers = {"model": both, "retrieval": both, "task fav": {"log_loss": 0.5}}
    scorers["retrieval, as shown"] = both
    model, retrieval, fav, shown = impressions_table(scorers).splitlines()[1:]
    # Scores of retrieval are no log odds, whatever the lists.
    assert len(shown.split()) == len(retrieval.split()) + 2
    assert fav.split() == ["task", "fav", "0.5000"]
    assert model.split()[-2:] == ["0.2500", "0.1250"]
    assert retrieval.split() == ["retrieval", *(f"{v:.4f}" for v in values.values())]


def test_drift_marks_what_exceeds_and_shows_the_limits():
    moved = Moved(bin="dk", reference=0.1, today=0.45)
    counted = {"reference_values": 300, "today_values": 200, "num_bins": 3, "moved": (moved,)}
    report = DriftReport(
        name="shop",
        model_version="3",
        reference="runs/monday/data",
        reference_users=300,
        users=200,
        k=20,
        sample_users=150,
        coverage=(0.5, 0.2),
        distributions=(
            Distribution(name="country", **counted),
            Distribution(name="price", **counted | {"moved": ()}),
        ),
        findings=(
            Finding(of="country", measure="psi", found=0.61, allowed=0.25),
            Finding(of="country", measure="unknown_rise", found=-0.1, allowed=None),
            Finding(of="price", measure="psi", found=0.0, allowed=0.25),
            Finding(of="recommended.coverage", measure="coverage_drop", found=0.6, allowed=0.2),
        ),
    )
    first, _, country, price, last = drift_table(report).splitlines()
    assert first == "200 users scored by shop/3, compared with 300 of runs/monday/data"
    assert country.split() == [
        "country",
        "!",
        "0.6100/0.25",
        "-0.1000",
        "300",
        "->",
        "200",
        "dk",
        "10.0%",
        "->",
        "45.0%",
    ]
    assert price.split() == ["price", "0.0000/0.25", "300", "->", "200"]
    assert last == "coverage@20 of 150 users: 0.5000 -> 0.2000, drop ! 0.6000/0.20"
