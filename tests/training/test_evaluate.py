import numpy as np
import pytest

from recsys.artifacts import MANIFEST, ArtifactError, EvaluationReport, TrainedModel
from recsys.metrics import per_query
from recsys.schema import Schema
from training.evaluate import evaluate, evaluate_savedmodel

TRAIN = [("u", "b", "a"), ("u", "a", "ab"), ("v", "b", "a"), ("v", "c", "ab"), ("w", "a", "c")]
VALIDATION = [("w", "a", "ca"), ("v", "b", "abc")]
TEST = [
    ("u", "b", "aba"),  # the letter after the last: first
    ("u", "f", "abab"),  # c first, then a, b, d, e, f by price
    ("n", "zz", "a"),  # not in the corpus
    ("n", "e", "d"),
    ("n", "a", ""),  # all by price
]
MODEL_RANKS = [1, 6, 0, 1, 1]


@pytest.fixture
def data(tiny_data):
    return tiny_data(TRAIN, VALIDATION, TEST)


@pytest.fixture
def model(tmp_path, tiny_config, tiny_towers):
    tiny_towers()
    return trained(tmp_path, tiny_config.schema_)


def trained(tmp_path, schema):
    return TrainedModel(
        directory=tmp_path / "model",
        towers="towers",
        features=schema,
        embedding_dim=7,
        best_epoch=1,
        monitor="ndcg@3",
        curves={},
        mlflow_run_id=None,
        versions={},
    )


def with_evaluation(config, **changes):
    evaluation = config.evaluation.model_copy(update=changes)
    return config.model_copy(update={"evaluation": evaluation})


def arrays(report):
    with np.load(report.directory / report.per_query) as stored:
        return {name: stored[name] for name in stored.files}


def test_ranks_and_metrics_by_hand(tiny_config, data, model, tmp_path):
    report = evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
    stored = arrays(report)
    assert stored["rank_model"].tolist() == MODEL_RANKS
    assert stored["label"].tolist() == [1, 5, -1, 4, 0]
    assert stored["user"].tolist() == [1, 1, 0, 0, 0]
    # After a came b, always. A label outside the corpus is a miss for every scorer.
    assert stored["rank_markov"][[0, 2]].tolist() == [1, 0]
    assert stored["rank_last_viewed"][2] == 0
    assert {name: a.dtype.name for name, a in stored.items() if name != "user"} == {
        name: "int32" for name in stored if name != "user"
    }
    assert report.num_queries == 5
    assert report.num_candidates == 6
    assert report.window == (data.test.first_at, data.test.last_at)
    assert report.data_fingerprint == data.fingerprint
    assert report.model["recall@1"].value == pytest.approx(3 / 5)
    assert report.model["mrr@3"].value == pytest.approx(3 / 5)
    assert report.model["hit_rate@3"].value == pytest.approx(3 / 5)
    # First places: b, c, b (though that label is unknown), e and a.
    assert report.model["coverage@1"].value == pytest.approx(4 / 6)
    assert report.model["coverage@1"].low == report.model["coverage@1"].high


def test_report_holds_every_metric_baseline_and_lift(tiny_config, data, model, tmp_path):
    report = evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
    accuracy = {f"{m}@{k}" for m in ("recall", "hit_rate", "ndcg", "mrr") for k in (1, 3)}
    beyond = {f"{m}@{k}" for m in ("coverage", "novelty") for k in (1, 3)}
    assert set(report.model) == accuracy | beyond
    assert set(report.baselines) == set(report.lifts) == set(tiny_config.evaluation.baselines)
    stored = arrays(report)
    for name, metrics in report.baselines.items():
        assert set(metrics) == accuracy | beyond
        assert set(report.lifts[name]) == accuracy
        mean = per_query(stored[f"rank_{name}"], [3])["ndcg@3"].mean()
        assert metrics["ndcg@3"].value == pytest.approx(mean)
        assert metrics["ndcg@3"].low <= mean <= metrics["ndcg@3"].high
        lift = (report.model["ndcg@3"].value - mean) / max(mean, 1 / 5)
        assert report.lifts[name]["ndcg@3"].value == pytest.approx(lift)
    queries = {name: sum(b["queries"] for b in s.values()) for name, s in report.slices.items()}
    assert queries == {"user": 5, "history_length": 5, "item_popularity": 5}
    assert report.slices["user"]["cold"]["queries"] == 3
    assert report.slices["item_popularity"]["cold"]["queries"] == 2
    assert report.slices["item_popularity"]["cold"]["recall@3"] == 0


def test_novelty_is_that_of_the_lists(tiny_config, data, model, tmp_path):
    report = evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
    p = (np.array([7, 5, 4, 2, 1, 0]) + 1) / (19 + 6)
    firsts = [1, 2, 1, 4, 0]
    assert report.model["novelty@1"].value == pytest.approx(-np.log2(p[firsts]).mean())


def test_seen_items_are_excluded_for_model_and_baselines(tiny_config, tiny_data, model, tmp_path):
    # The label e follows d; the seen d and a leave the list, so b is second, not third.
    data = tiny_data(TRAIN, [], [("n", "b", "ad"), ("n", "a", "ad")], exclude_seen=True)
    report = evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
    stored = arrays(report)
    assert stored["rank_model"].tolist() == [2, 0]
    assert stored["rank_popularity"].tolist() == [1, 0]
    assert stored["rank_last_viewed"].tolist() == [1, 0]


def test_baselines_learn_from_validation_but_not_from_test(tiny_config, tiny_data, model, tmp_path):
    validation = [("w", "f", "a")] * 9
    data = tiny_data(TRAIN, validation, [("n", "f", "a"), *[("n", "e", "d")] * 20])
    report = evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
    stored = arrays(report)
    assert stored["rank_popularity"][0] == 1
    assert stored["rank_markov"][0] == 1
    assert np.all(stored["rank_popularity"][1:] >= 5)


def test_an_evaluation_repeats_exactly(tiny_config, data, model, tmp_path):
    one, same = (evaluate(tiny_config, data, model, None, tmp_path / n) for n in ("1", "2"))
    assert one.model_dump(exclude={"created_at"}) == same.model_dump(exclude={"created_at"})
    assert (tmp_path / "1/per_query.npz").read_bytes() == (
        tmp_path / "2/per_query.npz"
    ).read_bytes()
    assert EvaluationReport.load(tmp_path / "1").model == one.model


def test_a_failed_evaluation_leaves_nothing_that_looks_finished(
    tiny_config, data, model, tmp_path, monkeypatch
):
    directory = tmp_path / "evaluation"
    evaluate(tiny_config, data, model, None, directory)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(tiny_config, data, model, None, directory)
    assert not (directory / MANIFEST).exists()


def test_a_model_of_another_schema_names_the_features(tiny_config, data, model, tmp_path):
    features = tiny_config.schema_.model_dump()["features"]
    features[3]["name"] = "cost"
    features[1]["kind"] = "text"
    other = trained(tmp_path, Schema.model_validate({"features": features}))
    with pytest.raises(
        ArtifactError, match=r"'price' is new; 'cost' is missing; 'country'\.kind was"
    ):
        evaluate(tiny_config, data, other, None, tmp_path / "evaluation")


def test_a_model_with_reordered_features_is_of_another_schema(tiny_config, data, model, tmp_path):
    other = trained(tmp_path, Schema(features=tiny_config.schema_.features[::-1]))
    with pytest.raises(ArtifactError, match="the features stand in another order"):
        evaluate(tiny_config, data, other, None, tmp_path / "evaluation")


def test_a_champion_is_evaluated_by_its_savedmodel_alone(tiny_config, data, tiny_towers, tmp_path):
    report = evaluate_savedmodel(
        tiny_config, data, tiny_towers("champion"), tmp_path / "evaluation"
    )
    assert arrays(report)["rank_model"].tolist() == MODEL_RANKS
    assert report.baselines == report.lifts == {}
    assert EvaluationReport.load(tmp_path / "evaluation").model == report.model


def test_a_champion_that_reads_what_the_data_lack_is_refused(
    tiny_config, data, tiny_towers, tmp_path
):
    champion = tiny_towers("champion", history="basket")
    with pytest.raises(ArtifactError, match=r"\['basket'\]"):
        evaluate_savedmodel(tiny_config, data, champion, tmp_path / "evaluation")
    assert not EvaluationReport.exists(tmp_path / "evaluation")


def test_als_is_asked_for_only_with_spark(tiny_config, data, model, tmp_path):
    config = with_evaluation(tiny_config, baselines=("als",))
    with pytest.raises(ValueError, match="no Spark session"):
        evaluate(config, data, model, None, tmp_path / "evaluation")


@pytest.mark.spark
def test_als_is_ranked_like_the_others(spark, tiny_config, data, model, tmp_path):
    config = with_evaluation(tiny_config, baselines=("als",))
    report = evaluate(config, data, model, spark, tmp_path / "evaluation")
    ranks = arrays(report)["rank_als"]
    assert ranks[2] == 0
    assert np.all((ranks[[0, 1, 3, 4]] >= 1) & (ranks[[0, 1, 3, 4]] <= 6))
    assert set(report.lifts) == {"als"}


def test_data_without_a_test_example_say_what_to_change(tiny_config, tiny_data, model, tmp_path):
    data = tiny_data(TRAIN, VALIDATION, [])
    with pytest.raises(ArtifactError, match=r"no test example; change data\.split"):
        evaluate(tiny_config, data, model, None, tmp_path / "evaluation")
