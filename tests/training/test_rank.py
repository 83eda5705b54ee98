import dataclasses
import shutil

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import (
    ArtifactError,
    EvaluationReport,
    Statistics,
    TrainedModel,
    TrainedRanker,
    VocabularyFile,
)
from recsys.config import RunConfig
from recsys.dataset import raw_batches
from recsys.ranking_config import Multitask
from training.evaluate import evaluate
from training.lists import HELD_OUT, TRAIN
from training.rank import rank
from training.shown import read_shown

ITEMS = "abcdef"


@pytest.fixture
def settings(tiny_config):
    """The tiny config in two stages."""
    ranking = {"candidates": 3, "epochs": 2, "attention_dim": 4, "hidden": [4], "held_out": 0.3}
    return RunConfig.model_validate(
        tiny_config.model_dump() | {"ranking": ranking, "scoring": {"k": 3}}
    )


@pytest.fixture
def data(tiny_data):
    """The letter after the last one is what retrieval expects; it is taken every other time."""
    validation = [
        (f"u{n}", ITEMS[(n + 1 + n % 2) % 6], ITEMS[max(n % 6 - 1, 0)] + ITEMS[n % 6])
        for n in range(60)
    ]
    followed = [[(label, "buy" if n % 3 else "cart")] for n, (_, label, _) in enumerate(validation)]
    outcomes = {"validation": followed, "test": [[("b", "cart"), ("c", "buy")]]}
    train, test = [("t", "b", "a"), ("t", "c", "ab")], [("n", "a", "a")]
    data = tiny_data(train, validation, test, outcomes=outcomes)
    vocabularies = {}
    for name, values in (("item_id", list(ITEMS)), ("country", ["AT"])):
        (data.directory / f"{name}.txt").write_text("".join(f"{v}\n" for v in values))
        vocabularies[name] = VocabularyFile(path=f"{name}.txt", size=len(values), oov=1)
    price = {"price": Statistics(mean=3.0, std=2.0)}
    return data.model_copy(update={"vocabularies": vocabularies, "statistics": price})


@pytest.fixture
def model(tmp_path, settings, tiny_towers):
    tiny_towers()
    return TrainedModel(
        directory=tmp_path / "model",
        towers="towers",
        features=settings.schema_,
        embedding_dim=7,
        best_epoch=1,
        monitor="ndcg@3",
        curves={},
        mlflow_run_id=None,
        versions={},
    )


def test_the_manifest_tells_what_was_learned_from(settings, data, model, tiny_towers, tmp_path):
    ranker = rank(settings, data, model, tmp_path / "ranking")
    assert TrainedRanker.load(tmp_path / "ranking") == ranker
    assert sum(ranker.lists.values()) == 60
    assert 0 < ranker.lists[HELD_OUT] < ranker.lists[TRAIN]
    assert len(ranker.curves["loss"]) == len(ranker.curves["held_out_loss"]) == 2
    assert ranker.best_epoch == 1 + int(np.argmin(ranker.curves["held_out_loss"]))
    calibrated, raw = ranker.held_out["ranker"], ranker.held_out["uncalibrated"]
    assert calibrated["log_loss"] <= raw["log_loss"]
    assert calibrated["auc"] == pytest.approx(raw["auc"])
    signature = tf.saved_model.load(str(tmp_path / "ranking" / ranker.ranker)).signatures["rank"]
    raw_queries = next(iter(raw_batches(data, data.test, 1)))
    scores = signature(
        **raw_queries,
        candidates=tf.constant([[1, 0, -1]]),
        retrieval_scores=tf.constant([[1.0, 0.5, -np.inf]]),
    )["scores"].numpy()
    assert np.isfinite(scores[0, :2]).all()
    assert np.isneginf(scores[0, 2])
    # It repeats exactly; of two pairs of towers those before the refit are read.
    tiny_towers("model/before")
    before = model.model_copy(update={"towers": "not there", "before_refit": "before"})
    again = rank(settings, data, before, tmp_path / "again")
    assert again.curves == ranker.curves
    assert again.held_out == ranker.held_out


def test_towers_that_have_learned_the_labels_are_refused(settings, data, model, tmp_path):
    train = settings.train.model_copy(update={"refit": True})
    refitted = settings.model_copy(update={"train": train})
    with pytest.raises(ArtifactError, match=r"have learned the validation labels.*recsys fit"):
        rank(refitted, data, model, tmp_path / "ranking")
    assert not (tmp_path / "ranking").exists()


def test_retrieval_that_finds_no_label_is_refused_and_leaves_nothing(
    settings, data, model, tmp_path, monkeypatch
):
    def none(items, labels):
        return np.full(len(items), -1, np.int32)

    monkeypatch.setattr("training.lists.label_places", none)
    with pytest.raises(ArtifactError, match=r"finds none of the \d+ labels.*ranking\.candidates"):
        rank(settings, data, model, tmp_path / "ranking")
    assert [p.name for p in tmp_path.iterdir() if "ranking" in p.name] == []


def with_tasks(settings, **tasks):
    multitask = Multitask(kind="shared_bottom", tower=())
    update = {"tasks": tasks, "multitask": multitask, "epochs": 1, "loss": "listwise"}
    return settings.model_copy(update={"ranking": settings.ranking.model_copy(update=update)})


def test_several_tasks_are_calibrated_and_told_one_by_one(settings, data, model, tmp_path):
    ranker = rank(with_tasks(settings, buy=1.0, cart=0.5), data, model, tmp_path / "ranking")
    assert list(TrainedRanker.load(tmp_path / "ranking").tasks) == ["buy", "cart"]
    assert ranker.tasks["buy"] == pytest.approx(ranker.held_out["ranker"])
    told = ranker.tasks.values()
    assert sum(task["positives"] for task in told) == ranker.with_label[HELD_OUT]
    assert all({"auc", "user_auc", "log_loss", "calibration_error"} < set(task) for task in told)
    signature = tf.saved_model.load(str(tmp_path / "ranking" / ranker.ranker)).signatures["rank"]
    answer = signature(
        **next(iter(raw_batches(data, data.test, 1))),
        candidates=tf.constant([[1, 0, -1]]),
        retrieval_scores=tf.constant([[1.0, 0.5, -np.inf]]),
    )
    assert answer["log_odds"].shape == (1, 3, 2)
    scores = answer["scores"].numpy()
    np.testing.assert_allclose(scores[0, :2], answer["log_odds"][0, :2, 0], rtol=1e-5)
    assert np.isneginf(scores[0, 2])
    # The test window is judged by task too.
    evaluation = settings.evaluation.model_copy(update={"baselines": ()})
    judged = settings.model_copy(update={"evaluation": evaluation})
    evaluate(judged, data, model, None, tmp_path / "evaluation", ranker)
    report = EvaluationReport.load(tmp_path / "evaluation")
    assert {task: own["positives"] for task, own in report.tasks.items()} == {"buy": 1, "cart": 1}
    assert report.tasks["cart"]["candidates"] == report.impressions["model"]["candidates"] == 3


@pytest.fixture
def shown_data(tiny_data, data):
    """Of two letters that are shown the later one is clicked; retrieval prefers the earlier."""
    lists = [
        (f"u{n}", ITEMS[n % 6], [ITEMS[n % 6], ITEMS[(n + 1 + n // 6 % 5) % 6], "zz"][: 2 + n % 2])
        for n in range(60)
    ]
    lists = [(user, last, shown, max(shown[:2])) for user, last, shown in lists]
    train, test = [("t", "b", "a"), ("t", "c", "ab")], [("n", "a", "a")]
    shutil.rmtree(data.directory)
    shown = {"validation": lists, "test": lists[:20]}
    made = tiny_data(train, [("v", "b", "a")], test, shown=shown)
    for name in data.vocabularies:
        values = list(ITEMS) if name == "item_id" else ["AT"]
        (made.directory / f"{name}.txt").write_text("".join(f"{v}\n" for v in values))
    return made.model_copy(
        update={"vocabularies": data.vocabularies, "statistics": data.statistics}
    )


def test_the_ranker_learns_from_what_was_shown(settings, shown_data, model, tmp_path):
    update = {"epochs": 15, "batch_size": 8, "loss": "pairwise", "learning_rate": 0.02}
    ranking = settings.ranking.model_copy(update=update)
    evaluation = settings.evaluation.model_copy(update={"baselines": ()})
    judged = settings.model_copy(update={"ranking": ranking, "evaluation": evaluation})
    ranker = rank(judged, shown_data, model, tmp_path / "ranking")
    assert sum(ranker.lists.values()) == 60
    assert sum(ranker.with_label.values()) == 60
    assert ranker.held_out["ranker"]["request_auc"] > 0.9
    assert ranker.held_out["retrieval"]["request_auc"] < 0.6
    evaluate(judged, shown_data, model, None, tmp_path / "evaluation", ranker)
    report = EvaluationReport.load(tmp_path / "evaluation")
    assert report.shown["model"]["candidates"] == 40
    assert report.shown["model"]["request_auc"] > 0.9
    assert report.shown["retrieval"]["request_auc"] < 0.6
    # What retrieval finds is judged beside it, as ever.
    assert report.impressions["model"]["candidates"] == 3


def test_prices_are_those_of_the_moment(settings, shown_data, model, tiny_data, tmp_path):
    """Of two items the one that was cheaper when shown is clicked; the item table knows nothing."""
    lists, rng = [], np.random.default_rng(1)
    for n in range(80):
        prices = rng.permutation([2.0, 5.0]).tolist()
        items = [ITEMS[n % 6], ITEMS[(n + 1 + n // 6 % 5) % 6]]
        lists.append((f"u{n}", ITEMS[n % 6], items, items[int(np.argmin(prices))], prices))
    shutil.rmtree(shown_data.directory)
    shown = {"validation": lists, "test": lists[:20]}
    train = [("t", "b", "a"), ("t", "c", "ab")]
    data = tiny_data(train, [("v", "b", "a")], [("n", "a", "a")], shown=shown)
    for name in shown_data.vocabularies:
        values = list(ITEMS) if name == "item_id" else ["AT"]
        (data.directory / f"{name}.txt").write_text("".join(f"{v}\n" for v in values))
    told = {n: getattr(shown_data, n) for n in ("vocabularies", "statistics")}
    data = data.model_copy(update=told)
    update = {"epochs": 12, "batch_size": 8, "loss": "pairwise", "learning_rate": 0.02}
    ranking = settings.ranking.model_copy(update=update)
    evaluation = settings.evaluation.model_copy(update={"baselines": ()})
    judged = settings.model_copy(update={"ranking": ranking, "evaluation": evaluation})
    ranker = rank(judged, data, model, tmp_path / "ranking")
    assert ranker.held_out["ranker"]["request_auc"] > 0.95
    evaluate(judged, data, model, None, tmp_path / "evaluation", ranker)
    report = EvaluationReport.load(tmp_path / "evaluation")
    assert report.shown["model"]["request_auc"] > 0.95
    saved = tf.saved_model.load(str(tmp_path / "ranking" / ranker.ranker)).signatures
    inputs = {name: set(s.structured_input_signature[1]) for name, s in saved.items()}
    assert inputs["rank_as_shown"] - inputs["rank"] == {"as_shown_price"}


def test_lists_without_a_click_are_refused(settings, shown_data, model, tmp_path, monkeypatch):
    def unclicked(*arguments):
        shown = read_shown(*arguments)
        return dataclasses.replace(shown, clicked=np.zeros_like(shown.clicked))

    monkeypatch.setattr("training.rank.read_shown", unclicked)
    with pytest.raises(
        ArtifactError, match=r"0 of the \d+ shown items .* train .*lengthen the val"
    ):
        rank(settings, shown_data, model, tmp_path / "ranking")
    assert not (tmp_path / "ranking").exists()


def test_a_task_that_never_happens_is_named(settings, data, model, tmp_path):
    tasks = with_tasks(settings, buy=1.0, fav=1.0)
    with pytest.raises(ArtifactError, match=r"none of the events 'fav' after \d+ .*ranking\.tasks"):
        rank(tasks, data, model, tmp_path / "ranking")


def test_data_without_outcomes_are_refused(settings, data, model, tmp_path):
    older = data.model_copy(update={"outcomes": False})
    with pytest.raises(ArtifactError, match=r"prepared without ranking\.tasks.*recsys prepare"):
        rank(with_tasks(settings, buy=1.0), older, model, tmp_path / "ranking")
