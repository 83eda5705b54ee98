import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from pyspark.sql.functions import struct

from serving_export.pyfunc import Recommender
from serving_export.registry import connect

FRESH = """
import json, os, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tiny@challenger")
frame = pd.DataFrame({"history": [["Ærtikel 00001"], None], "member": ["user 1", None]})
answer = model.predict(frame, params={"k": 3})
package = [name for name in sys.modules if name.split(".")[0] in ("recsys", "serving_export")]
keras = os.environ.get("TF_USE_LEGACY_KERAS")
scann = "scann" in sys.modules
print(json.dumps({"ids": answer["ids"].tolist(), "ours": package, "scann": scann, "keras": keras}))
"""


@pytest.fixture(scope="module")
def loaded(registry):
    connect(registry.uri)
    return mlflow.pyfunc.load_model("models:/tiny/1")


def test_answers_as_the_saved_model(loaded, world, tiny):
    histories = [[tiny.item(n), tiny.item(n + 1)] for n in range(6)] + [[]]
    exclusions = [[tiny.item(n)] for n in range(6)] + [[tiny.item(0), tiny.item(1)]]
    frame = pd.DataFrame({"history": histories, "exclusions": exclusions})
    answer = loaded.predict(frame, params={"k": 4})
    ids, scores = tiny.ask(world.models["exact"], histories, k=4, exclusions=exclusions)
    assert answer["ids"].tolist() == ids
    np.testing.assert_allclose(np.array(answer["scores"].tolist()), scores, atol=1e-5)


def test_absent_columns_and_missing_cells_mean_unknown(loaded, tiny):
    popular = [tiny.item(n) for n in range(3)]
    frames = [
        pd.DataFrame({"history": [None], "member": [None], "basket": [None]}),
        pd.DataFrame({"history": [np.array([], object)], "basket": [np.nan], "taste": [None]}),
        pd.DataFrame({"member": [""], "exclusions": [None]}),
    ]
    answers = [loaded.predict(frame, params={"k": 3}) for frame in frames]
    assert [answer["ids"].tolist() for answer in answers] == [[popular]] * 3
    # MLflow's own check of the input loses the rows of a table without any column.
    alone = loaded.unwrap_python_model().predict(None, pd.DataFrame(index=[7]), {"k": 3})
    assert alone["ids"].to_dict() == {7: popular}


def test_a_history_that_nobody_has_is_as_wide_as_the_others(shop_of_events, tiny):
    """An answer does not depend on who else is asked for."""
    model = Recommender()
    folders = {name: str(shop_of_events / "artifacts" / name) for name in ("exact", "scann")}
    model.load_context(SimpleNamespace(artifacts=folders))
    histories = [[tiny.item(3), tiny.item(7)], [tiny.item(9)], [tiny.item(1)]]
    frame = pd.DataFrame({"history": histories, "event_history": [None, [], ["dk"]]})
    expected = model.predict(None, frame, {"k": 4})["ids"].tolist()[:2]
    for few in (frame[:2], frame[["history"]][:2]):
        assert model.predict(None, few, {"k": 4})["ids"].tolist() == expected


def test_lists_end_where_nothing_is_left(loaded, tiny):
    excluded = [tiny.item(n) for n in range(2, tiny.num_items)]
    answer = loaded.predict(pd.DataFrame({"exclusions": [excluded, []]}), params={"k": 4})
    assert answer["ids"].tolist()[0] == [tiny.item(0), tiny.item(1)]
    assert [len(row) for row in answer["scores"]] == [2, 4]


def test_many_rows_and_none(loaded, tiny):
    histories = [[tiny.item(n % 40)] for n in range(2100)]
    answer = loaded.predict(pd.DataFrame({"history": histories}), params={"k": 2})
    assert len(answer) == 2100
    assert answer["ids"].iloc[2080] == answer["ids"].iloc[0]
    assert len(loaded.predict(pd.DataFrame({"history": []}), params={"k": 2})) == 0


def test_signature_refuses_a_column_of_another_type(loaded):
    with pytest.raises(mlflow.exceptions.MlflowException, match="member"):
        loaded.predict(pd.DataFrame({"member": [1.5]}))


def test_a_column_of_lists_is_a_vector(loaded, world, tiny):
    tastes = [[3.0, 0.0, -1.0], [0.0, 4.0, 0.5], None]
    ids, scores = tiny.ask(
        world.models["exact"], [[tiny.item(9)]] * 3, k=4, taste=[t or [0.0] * 3 for t in tastes]
    )
    histories = [[tiny.item(9)]] * 3
    for cells in (tastes, [None if t is None else np.array(t) for t in tastes]):
        frame = pd.DataFrame({"history": histories, "taste": cells})
        answer = loaded.predict(frame, params={"k": 4})
        assert answer["ids"].tolist() == ids
        np.testing.assert_allclose(np.array(answer["scores"].tolist()), scores, atol=1e-5)
    assert len({tuple(row) for row in ids}) == 3


def test_a_vector_of_another_length_is_named(loaded, tiny):
    frame = pd.DataFrame({"taste": [[1.0, 2.0, 3.0], [1.0, 2.0]]}, index=["a", "b"])
    with pytest.raises(ValueError, match="column 'taste', row 'b': expected 3 numbers, found 2"):
        loaded.predict(frame)


def test_exact_variant_stands_in_for_missing_ops(loaded, tiny, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    monkeypatch.delitem(sys.modules, "scann.scann_ops.py.scann_ops", raising=False)
    fallback = mlflow.pyfunc.load_model("models:/tiny/1")
    assert "ScaNN is not available" in caplog.text
    frame = pd.DataFrame({"history": [[tiny.item(3)]]})
    assert fallback.predict(frame).ids.tolist() == loaded.predict(frame).ids.tolist()


def test_loads_in_a_fresh_process_without_the_package(registry, world, tiny, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TF_USE_LEGACY_KERAS")
    }
    connect(registry.uri)
    mlflow.MlflowClient().set_registered_model_alias("tiny", "challenger", "1")
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, registry.uri],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    ids, _ = tiny.ask(world.models["exact"], [[tiny.item(1)], []], k=3, member=["user 1", ""])
    assert answer == {"ids": ids, "ours": [], "scann": True, "keras": None}


@pytest.fixture(scope="module")
def endpoint(registry, served):
    """Address of `mlflow models serve` on the registered model."""
    with served(registry.uri, "models:/tiny/1") as address:
        yield address


def test_mlflow_serves_it_over_http(endpoint, world, tiny):
    frame = pd.DataFrame({"history": [[tiny.item(1)], [tiny.item(4), tiny.item(2)]]})
    body = {"dataframe_split": frame.to_dict("split", index=False), "params": {"k": 3}}
    request = urllib.request.Request(
        f"{endpoint}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        rows = json.load(answer)["predictions"]
    ids, scores = tiny.ask(world.models["exact"], frame["history"].tolist(), k=3)
    assert [row["ids"] for row in rows] == ids
    np.testing.assert_allclose([row["scores"] for row in rows], scores, atol=1e-5)


@pytest.mark.spark
def test_spark_calls_it_as_a_function(spark, registry, world, tiny):
    connect(registry.uri)
    recommend = mlflow.pyfunc.spark_udf(
        spark,
        "models:/tiny/1",
        result_type="ids array<string>, scores array<double>",
        env_manager="local",
        params={"k": 3},
    )
    histories = [[tiny.item(n), tiny.item(n + 1)] for n in range(4)] + [None]
    rows = [(f"user {n}", history) for n, history in enumerate(histories)]
    users = spark.createDataFrame(rows, "member string, history array<string>")
    answers = users.select("member", recommend(struct("member", "history")).alias("top"))
    found = {row["member"]: row["top"] for row in answers.collect()}
    ids, scores = tiny.ask(
        world.models["exact"], [h or [] for h in histories], k=3, member=[m for m, _ in rows]
    )
    for n, (member, _) in enumerate(rows):
        assert found[member]["ids"] == ids[n]
        np.testing.assert_allclose(found[member]["scores"], scores[n], atol=1e-5)


def test_the_environment_that_it_declares_installs_and_answers(registry, world, tiny, tmp_path):
    """MLflow makes a virtual environment of the declared requirements alone, and asks in there."""
    frame = pd.DataFrame({"history": [[tiny.item(1)], []], "exclusions": [[""], [tiny.item(0)]]})
    body = {"dataframe_split": frame.to_dict("split", index=False), "params": {"k": 3}}
    (tmp_path / "asked.json").write_text(json.dumps(body))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", "models:/tiny/1"]
    command += ["--env-manager", "uv", "-t", "json", "-i", "asked.json", "-o", "answer.json"]
    # MLflow looks for `uv` on the path, as in an environment that was activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": registry.uri}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "answer.json").read_text())["predictions"]
    ids, scores = tiny.ask(
        world.models["exact"], [[tiny.item(1)], []], k=3, exclusions=[[""], [tiny.item(0)]]
    )
    assert [row["ids"] for row in rows] == ids
    np.testing.assert_allclose([row["scores"] for row in rows], scores, atol=1e-5)


def test_the_environment_that_it_declares_is_the_one_that_is_tested(registry, tmp_path):
    """Each requirement is a line of constraints.txt, which is resolved and installed as a whole."""
    connect(registry.uri)
    file = mlflow.pyfunc.get_model_dependencies("models:/tiny/1", format="pip")
    declared = set(Path(file).read_text().split())
    constraints = Path(__file__).parents[2] / "constraints.txt"
    assert declared <= set(constraints.read_text().split())
