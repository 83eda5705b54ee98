import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tensorflow as tf

from recsys.dataset import raw_batches, read_corpus
from recsys.list_config import Diversity, EpsilonGreedy
from recsys.models.embed import embed, in_batches, load_towers
from serving_export import batch, verify
from serving_export.arrow_scorer import ArrowScorer
from serving_export.list_end import ListEnd, Options
from serving_export.pyfunc import Recommender
from serving_export.registry import ModelVersion
from serving_export.savedmodel import export

SLOTS = 2
MMR = {"relevance": 0.5, "pool": 20}
EXPLORE = {"kind": "epsilon_greedy", "epsilon": 0.5, "slots": SLOTS, "pool": 24, "seed": 3}


def test_options_decide_how_many_candidates_are_needed():
    assert Options().pool == 0
    assert not any(Options())
    both = Options(Diversity(pool=5), EpsilonGreedy(kind="epsilon_greedy", pool=9))
    end = ListEnd(both, tf.Variable(tf.zeros([30, 2])))
    needed = end.needed(tf.constant([0, 4, 12, 20]), 20)
    assert needed.numpy().tolist() == [9, 9, 12, 20]
    assert int(end.needed(tf.constant(3), 6)) == 6


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """An export with all options, compared with NumPy in a fresh process."""
    root = tmp_path_factory.mktemp("end")
    data = tiny.write_data(root / "data")
    config = tiny.run_config(diversity=MMR, exploration=EXPLORE, filters=["price"])
    model = tiny.write_model(data, root / "model")
    exported = export(config, data, model, root / "export")
    return SimpleNamespace(config=config, data=data, model=model, exported=exported)


def request(tiny, histories, model):
    """All that the signature takes, but `k`; filters and exclusions are empty."""
    specs = model.structured_input_signature[1]
    rows = {
        name: tf.zeros([len(histories), *spec.shape[1:].as_list()], spec.dtype)
        for name, spec in specs.items()
        if name not in ("k", "history", "exclusions", "filter_price")
    }
    return rows | {
        "history": tf.constant([[tiny.item(n) for n in history] for history in histories]),
        "exclusions": tf.zeros([len(histories), 0], tf.string),
        "filter_price": tf.fill([len(histories), 2], np.nan),
    }


def test_an_export_answers_so_in_a_fresh_process(served, tiny):
    exported = served.exported
    assert exported.parity == {"scann": 1.0, "exact": 1.0}
    assert exported.explores
    contract = json.loads((exported.directory / "scann/assets.extra/contract.json").read_text())
    assert contract["diversity"] == MMR
    assert contract["exploration"] == EXPLORE
    assert "propensities" in contract["signatures"]["recommend"]["outputs"]
    model = tf.saved_model.load(str(exported.directory / "exact")).signatures["recommend"]
    asked = request(tiny, [[1, 2], [5, 7], [9, 9]], model)
    answer = {n: v.numpy() for n, v in model(k=tf.constant([10, 4, 0]), **asked).items()}
    assert (answer["propensities"][0, :8] == 1).all()
    assert (answer["propensities"][0, 8:] < 1).all()
    assert (answer["propensities"][1, 2:4] < 1).all()
    assert (answer["propensities"][1, 4:] == 0).all()
    assert not answer["ids"][2].any()
    assert not answer["propensities"][2].any()
    assert [len(set(row)) for row in answer["ids"].tolist()] == [10, 5, 1]
    # What does not explore is the beginning of any longer list, not sorted by score.
    longer = model(k=tf.constant(22), **asked)
    assert longer["ids"][0, :8].numpy().tolist() == answer["ids"][0, :8].tolist()
    assert (np.diff(answer["scores"][0, :8]) > 0).any()


def test_each_answer_is_drawn_anew(served, tiny):
    model = tf.saved_model.load(str(served.exported.directory / "scann")).signatures["recommend"]
    asked = request(tiny, [[1, 2]] * 40, model)
    drawn = [model(k=tf.constant(6), **asked)["ids"][:, 4:].numpy().tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert len({tuple(row) for row in drawn[0]}) > 5


def test_propensities_reach_mlflow_arrow_and_the_table_of_a_scoring(served, tiny, tmp_path):
    folders = {n: str(served.exported.directory / n) for n in ("scann", "exact")}
    model = Recommender()
    model.load_context(SimpleNamespace(artifacts=folders))
    histories = [[tiny.item(1)], [tiny.item(2), tiny.item(3)]]
    frame = model.predict(None, pd.DataFrame({"history": histories}), {"k": 5})
    assert frame.columns.tolist() == ["ids", "scores", "propensities"]
    assert [row[:3] for row in frame["propensities"]] == [[1.0] * 3] * 2
    assert all(0 < chance < 1 for row in frame["propensities"] for chance in row[3:])

    shutil.copytree(served.exported.directory, tmp_path / "artifacts")
    answer = ArrowScorer(tmp_path).answer({"history": pa.array(histories)}, 2, 5)
    assert [field.name for field in answer.type] == ["items", "scores", "propensities"]
    users = pa.record_batch({"user": ["a", "b"], "_inputs": pa.array([1, 2], pa.int64())})
    rows = batch._rows(users, answer.flatten(), ModelVersion("tiny", "1"))
    assert rows.schema == batch._schema(batch.number_lists(tmp_path))
    assert rows.schema.names[-2:] == ["inputs", "propensities"]
    assert rows["propensities"].to_pylist() == answer.field("propensities").to_pylist()


def test_another_rule_than_that_of_the_model_is_told(served, monkeypatch):
    """The comparison is with NumPy, not with itself."""
    data, model, exported = served.data, served.model, served.exported
    towers, corpus = load_towers(model.directory / model.towers), read_corpus(data)
    queries = next(iter(raw_batches(data, data.test, 16).as_numpy_iterator()))
    expectation = verify.Expectation(
        data=data,
        corpus=corpus,
        queries=queries,
        embeddings=embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"],
        embedded=embed(towers, "embed_query", in_batches(queries)),
    )
    settings = served.config.export
    variants = {name: exported.directory / path for name, path in exported.variants.items()}
    monkeypatch.setattr(verify, "ask", answers_here)
    assert verify.verify(expectation, variants, exported.index, settings)["exact"] == 1
    others = [
        {"diversity": Diversity(relevance=0.9, pool=20)},
        {"exploration": settings.exploration.model_copy(update={"epsilon": 0.1})},
        {"exploration": settings.exploration.model_copy(update={"slots": 1})},
    ]
    for other in others:
        asked = settings.model_copy(update=other)
        with pytest.raises(verify.ArtifactError, match=r"exact SavedModel.* gives 0\.\d+ of the"):
            verify.verify(expectation, variants, exported.index, asked)


def answers_here(variants, request):
    """As `verify.ask`, without a process of its own."""
    inputs = {name: tf.constant(values) for name, values in request.items()}
    answers = {}
    for name, folder in variants.items():
        answer = tf.saved_model.load(str(folder)).signatures["recommend"](**inputs)
        answers[name] = {output: values.numpy() for output, values in answer.items()}
        answers[name]["ids"] = answers[name]["ids"].astype(bytes)
    return answers
