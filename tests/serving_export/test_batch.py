import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.errors import PythonException

from recsys.artifacts import ArtifactError, Scoring
from serving_export import batch
from serving_export import registry as registry_module
from serving_export.batch import register_function, score
from serving_export.registry import connect

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def users(tiny, tmp_path_factory):
    rows = [
        {
            "user": f"user {n}",
            "history": [tiny.item(n), tiny.item(n + 1)] if n % 3 else [],
            "member": f"user {n}",
            "basket": float(n) if n % 2 else None,
            "taste": [0.5, float(n), -1.0] if n % 4 else None,
            "exclusions": [tiny.item(0)],
        }
        for n in range(30)
    ]
    folder = tmp_path_factory.mktemp("users")
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return str(folder), rows


@pytest.fixture
def config(registry, tiny):
    connect(registry.uri)
    return tiny.run_config(scoring={"k": 4})


def test_every_user_gets_what_the_saved_model_answers(spark, users, config, world, tiny, tmp_path):
    folder, rows = users
    scoring = score(config, spark, folder, tmp_path / "scoring", "tiny@challenger")

    assert Scoring.load(tmp_path / "scoring") == scoring
    assert (scoring.num_users, scoring.k, scoring.model_version) == (30, 4, "1")
    frame = pd.read_parquet(scoring.directory / scoring.destination).set_index("user")
    assert set(frame["model"]) == {"tiny"}
    assert set(frame["model_version"]) == {"1"}
    assert sorted(p.name for p in scoring.directory.iterdir()) == [
        "manifest.json", "recommendations",
    ]  # fmt: skip
    ids, scores = tiny.ask(
        world.models["exact"],
        [row["history"] for row in rows],
        k=4,
        exclusions=[row["exclusions"] for row in rows],
        member=[row["member"] for row in rows],
        basket=[float("nan") if row["basket"] is None else row["basket"] for row in rows],
        taste=[row["taste"] or [0.0] * 3 for row in rows],
    )
    names = [row["user"] for row in rows]
    assert [frame.loc[name, "items"].tolist() for name in names] == ids
    np.testing.assert_allclose(np.stack(frame.loc[names, "scores"]), scores, atol=1e-5)
    assert len({tuple(row) for row in frame["items"]}) > 5


def test_champion_is_scored_and_rescoring_replaces(spark, users, config, tmp_path):
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("tiny", "champion", "1")
    try:
        for k in (4, 2):
            wanted = config.model_copy(
                update={"scoring": config.scoring.model_copy(update={"k": k})}
            )
            score(wanted, spark, users[0], tmp_path)
            frame = pd.read_parquet(tmp_path / "recommendations")
            assert frame["items"].map(len).tolist() == [k] * 30
    finally:
        client.delete_registered_model_alias("tiny", "champion")


def test_what_is_listed_as_not_available_is_recommended_to_nobody(
    spark, users, config, world, tiny, tmp_path
):
    (tmp_path / "out.csv").write_text(f"item\n{tiny.item(3)}\nno such\n", "utf-8")
    answers = {}
    for file in (None, str(tmp_path / "out.csv")):
        scoring = config.scoring.model_copy(update={"unavailable": file, "k": 59})
        wanted = config.model_copy(update={"scoring": scoring})
        score(wanted, spark, users[0], tmp_path / "scoring", "tiny/1")
        frame = pd.read_parquet(tmp_path / "scoring" / "recommendations").set_index("user")
        answers[file] = frame["items"].map(list).sort_index().tolist()
        register_function(wanted, spark, tmp_path, "tiny/1")
        table = spark.read.parquet(users[0]).selectExpr(
            "user", "recommend(struct(*), 59) AS answer"
        )
        asked = table.toPandas().set_index("user")["answer"].sort_index()
        assert [list(answer["items"]) for answer in asked] == answers[file]
    before, after = answers.values()
    assert all(tiny.item(3) in items for items in before)
    assert after == [[i for i in items if i != tiny.item(3)] for items in before]


def test_table(spark, users, config, tmp_path):
    spark.sql(f"CREATE DATABASE scored LOCATION '{tmp_path / 'warehouse'}'")
    try:
        wanted = config.model_copy(
            update={"scoring": config.scoring.model_copy(update={"table": "scored.daily"})}
        )
        spark.sql("CREATE TABLE scored.daily AS SELECT 'yesterday' AS user")
        scoring = score(wanted, spark, users[0], tmp_path / "scoring", "tiny/1")
        assert scoring.destination == "scored.daily"
        assert spark.table("scored.daily").count() == 30
        changes = {"table": "scored.daily", "only_changed": True}
        wanted = config.model_copy(update={"scoring": config.scoring.model_copy(update=changes)})
        again = score(wanted, spark, users[0], tmp_path / "scoring", "tiny/1")
        assert (again.num_users, again.num_kept) == (30, 30)
        assert spark.table("scored.daily").count() == 30
        assert [p.name for p in (tmp_path / "scoring").iterdir()] == ["manifest.json"]
    finally:
        spark.sql("DROP DATABASE scored CASCADE")


def test_each_version_answers_for_itself_although_the_folder_is_the_same(
    spark, users, config, tmp_path
):
    """Spark keeps its Python workers, and they keep their models."""
    client = mlflow.MlflowClient()
    first = client.get_model_version("tiny", "1")
    answers = {}
    other = client.create_model_version("tiny", _other_vocabulary(first.source, tmp_path))
    try:
        for version in ("1", str(other.version)):
            score(config, spark, users[0], tmp_path / "scoring", f"tiny/{version}")
            frame = pd.read_parquet(tmp_path / "scoring" / "recommendations").set_index("user")
            assert set(frame["model_version"]) == {version}
            answers[version] = frame["items"].map(tuple).to_dict()
    finally:
        client.delete_model_version("tiny", other.version)
    assert answers["1"] != answers[str(other.version)]


def _other_vocabulary(source, tmp_path):
    """A copy of a model that takes each item of a history for another one."""
    copy = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path / "copy")))
    vocabularies = list(copy.glob("artifacts/scann/assets/item_id.txt*"))
    assert vocabularies
    for file in vocabularies:
        file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")
    return str(copy)


def test_an_attempt_goes_on_where_the_last_one_failed(spark, users, config, tmp_path):
    """One part cannot be written; the others are not scored again, and nothing is left over."""
    wanted = config.model_copy(
        update={"scoring": config.scoring.model_copy(update={"users_per_part": 5})}
    )
    reference = score(wanted, spark, users[0], tmp_path / "reference", "tiny/1")
    expected = pd.read_parquet(reference.directory / "recommendations").set_index("user")
    directory = tmp_path / "scoring"
    partial = tmp_path / ".scoring.partial" / "recommendations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "download", _into_the_way_of_part_3(partial))
        with pytest.raises(Exception, match=r"part-00003.parquet"):
            score(wanted, spark, users[0], directory, "tiny/1")
    assert not directory.exists()
    done = {file.name: file.stat().st_mtime_ns for file in partial.glob("part-*.parquet")}
    assert len(done) > 1
    (partial / "part-00003.parquet").rmdir()
    del done["part-00003.parquet"]

    scoring = score(wanted, spark, users[0], directory, "tiny/1")

    result = scoring.directory / "recommendations"
    assert sorted(f.name for f in result.iterdir()) == [f"part-{n:05d}.parquet" for n in range(6)]
    assert {name: (result / name).stat().st_mtime_ns for name in done} == done
    frame = pd.read_parquet(result).set_index("user")
    assert frame["items"].map(tuple).to_dict() == expected["items"].map(tuple).to_dict()
    assert scoring.num_users == 30
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_users_who_have_not_changed_keep_their_answers_also_after_a_kill(
    spark, users, config, tiny, tmp_path, caplog
):
    """Three have clicked, one is new, one is gone, one has other items; the answer is that to all."""
    changes = {"users_per_part": 5, "only_changed": True}
    wanted = config.model_copy(update={"scoring": config.scoring.model_copy(update=changes)})
    directory = tmp_path / "scoring"
    first = score(wanted, spark, users[0], directory, "tiny/1")
    assert first.num_kept == 0
    rows = [dict(row) for row in users[1] if row["user"] != "user 29"]
    for row in rows[:3]:
        row["history"] = [*row["history"], tiny.item(7)]
    rows[3]["exclusions"] = []
    today = tmp_path / "today"
    today.mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, rows[4] | {"user": "new"}]), today / "part.parquet")

    partial = tmp_path / ".scoring.partial" / "recommendations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "download", _into_the_way_of_part_3(partial))
        with pytest.raises(Exception, match=r"part-00003.parquet"):
            score(wanted, spark, str(today), directory, "tiny/1")
    (partial / "part-00003.parquet").rmdir()
    assert Scoring.load(directory) == first.model_copy(update={"directory": directory})
    with caplog.at_level("INFO"):
        second = score(wanted, spark, str(today), directory, "tiny/1")

    assert (second.num_users, second.num_kept) == (30, 25)
    assert "25 of 30 users keep their answers: nothing has changed" in caplog.text
    every = score(config, spark, str(today), tmp_path / "every", "tiny/1")
    assert every.num_kept == 0
    kept, scored = (
        pd.read_parquet(one.directory / "recommendations").set_index("user").sort_index()
        for one in (second, every)
    )
    assert kept["items"].map(tuple).to_dict() == scored["items"].map(tuple).to_dict()
    np.testing.assert_allclose(np.stack(kept["scores"]), np.stack(scored["scores"]), atol=1e-6)
    pd.testing.assert_frame_equal(
        kept.drop(columns=["items", "scores"]), scored.drop(columns=["items", "scores"])
    )


def _into_the_way_of_part_3(partial):
    def download(chosen, folder):
        (partial / "part-00003.parquet").mkdir()
        return registry_module.download(chosen, folder)

    return download


def test_other_users_or_another_k_are_no_continuation(spark, users, config, tmp_path):
    table = spark.read.parquet(users[0])
    content = batch._content(table, "users")
    assert batch._content(table.orderBy("member", ascending=False), "users") == content
    assert batch._content(table.limit(29), "users") != content
    changed = table.selectExpr(
        "user", "history", "member", "basket + 1 AS basket", "taste", "exclusions"
    )
    assert batch._content(changed, "users") != content
    # Spark's own hash of these columns is the same.
    types = "user string, country string, page string, seen array<string>, past array<string>"
    rows = [("u", "dk", None, ["a", "b"], ["c"]), ("u", None, "dk", ["a"], ["b", "c"])]
    one, other = (spark.createDataFrame([row], types) for row in rows)
    assert batch._content(one, "users") != batch._content(other, "users")


def test_sql_asks_the_model_and_names_are_those_of_features(spark, users, config, tmp_path):
    chosen = register_function(config, spark, tmp_path, "tiny@challenger")
    assert chosen.version == "1"
    spark.read.parquet(users[0]).createOrReplaceTempView("tiny_users")
    asked = spark.sql(
        "SELECT user, recommend(struct(*), 4) AS answer, "
        "recommend(named_struct('history', history), 2).items AS short FROM tiny_users"
    ).toPandas()
    scoring = score(config, spark, users[0], tmp_path / "scoring", "tiny/1")
    frame = pd.read_parquet(scoring.directory / "recommendations").set_index("user")
    for _, row in asked.iterrows():
        assert list(row["answer"]["items"]) == list(frame.loc[row["user"], "items"])
        np.testing.assert_allclose(
            row["answer"]["scores"], frame.loc[row["user"], "scores"], atol=1e-5
        )
        assert len(row["short"]) == 2
    told = r"expected recommend\(history, member, country, basket, clicked_at, taste, k\)"
    with pytest.raises(PythonException, match=told):
        spark.sql("SELECT recommend(history, 4) FROM tiny_users").collect()
    with pytest.raises(PythonException, match=r"did you mean 'history' by 'user_history'\?"):
        spark.sql("SELECT recommend(struct(history AS user_history), 4) FROM tiny_users").collect()


def test_a_table_without_users_is_refused(spark, users, config, tmp_path):
    spark.read.parquet(users[0]).drop("user").write.parquet(str(tmp_path / "no"))
    with pytest.raises(ArtifactError, match=r"no column 'user', only history, member"):
        score(config, spark, str(tmp_path / "no"), tmp_path / "scoring", "tiny/1")


def test_a_table_that_cannot_tell_who_asks_is_refused(spark, users, config, tmp_path):
    table = spark.read.parquet(users[0]).selectExpr("user", "history AS user_history", "basket")
    table.write.parquet(str(tmp_path / "no"))
    told = (
        r"expected 'history' or 'member', found user, user_history, basket \(did you mean 'history'"
    )
    with pytest.raises(ArtifactError, match=told):
        score(config, spark, str(tmp_path / "no"), tmp_path / "scoring", "tiny/1")
    assert not (tmp_path / "scoring").exists()


def test_columns_that_the_model_does_not_know_are_told(shop, caplog):
    batch._check(["user", "user_id", "history"], shop, "users")
    assert not caplog.text
    batch._check(["user", "user_id", "user_history"], shop, "users")
    assert (
        "does not know: 'user_history' (did you mean 'history' by 'user_history'?)" in caplog.text
    )


@pytest.fixture
def shop_version(registry, shop):
    """Version 1 of the model `shop` in the registry: users and their histories, on a tree."""
    connect(registry.uri)
    yield _registered("shop", shop)
    mlflow.MlflowClient().delete_registered_model("shop")


def _registered(name, source):
    mlflow.MlflowClient().create_registered_model(name)
    assert mlflow.MlflowClient().create_model_version(name, str(source)).version == 1
    return f"{name}/1"


def test_sql_asks_the_model_of_the_registry_that_is_connected(
    spark, config, registry, shop, shop_version, tiny, tmp_path
):
    """Another one has the same name and number."""
    query = f"SELECT recommend('user 1', array('{tiny.item(3)}'), 5).items"
    register_function(config, spark, tmp_path, shop_version)
    first = spark.sql(query).collect()
    shutil.copytree(shop, tmp_path / "other")
    for file in (tmp_path / "other").glob("artifacts/*/assets/item_id.txt*"):
        file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")
    shutil.copy(registry.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.MlflowClient().delete_registered_model("shop")
    register_function(config, spark, tmp_path, _registered("shop", tmp_path / "other"))
    other = spark.sql(query).collect()
    connect(registry.uri)
    register_function(config, spark, tmp_path, shop_version)
    assert spark.sql(query).collect() == first != other


#: Asks a SavedModel for one query after the other, in a process without this package.
ROW_BY_ROW = """
import json, sys
import tensorflow as tf
from scann.scann_ops.py import scann_ops

ask = tf.saved_model.load(sys.argv[1]).signatures["recommend"]
answers = {}
for user, history, exclusions in json.loads(sys.argv[2]):
    inputs = {"user_id": [user], "history": [history], "exclusions": [exclusions]}
    inputs = {name: tf.constant(values, tf.string) for name, values in inputs.items()}
    ids = ask(k=tf.constant(10), **inputs)["ids"].numpy()[0]
    answers[user] = [item.decode() for item in ids]
print(json.dumps(answers))
"""


def test_workers_load_a_tree_once_and_answer_as_the_saved_model_does_row_by_row(
    spark, config, shop, shop_version, tiny, tmp_path
):
    """Two tasks, many Arrow batches of three rows; then the query of an analyst."""
    names = [f"user {n}" for n in range(48)]
    histories = [[tiny.item(n + m) for m in range(n % 5)] for n in range(48)]
    excluded = [[tiny.item(n + 3 * m) for m in range(n % 7 * 4)] for n in range(48)]
    columns = {"user": names, "user_id": names, "history": histories, "exclusions": excluded}
    (tmp_path / "users").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "users" / "part.parquet")
    scoring = config.scoring.model_copy(update={"k": 10, "users_per_part": 24})
    wanted = config.model_copy(update={"scoring": scoring})
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "3")
    try:
        before = _loads(spark)
        score(wanted, spark, str(tmp_path / "users"), tmp_path / "scoring", shop_version)
        scored = _loads(spark)
        register_function(wanted, spark, tmp_path / "models", shop_version)
        table = spark.read.parquet(str(tmp_path / "users")).repartition(2)
        asked = table.selectExpr("user", "recommend(struct(*), 10).items AS items").collect()
        at_last = _loads(spark)
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")

    for earlier, later in ((before, scored), (scored, at_last)):
        loads, answered = (
            {worker: count[n] - earlier.get(worker, (0, 0))[n] for worker, count in later.items()}
            for n in (0, 1)
        )
        assert max(loads.values()) == 1
        assert sum(loads.values()) + sum(answered.values()) >= 16
        # Who has not loaded it has not been asked.
        assert all(loads[worker] or not answered[worker] for worker in loads)
    rows = json.dumps(list(zip(names, histories, excluded, strict=True)))
    folder = str(shop / "artifacts" / "scann")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ROW_BY_ROW, folder, rows],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = json.loads(done.stdout)
    assert not any(
        set(expected[user]) & set(out) for user, out in zip(names, excluded, strict=True)
    )
    frame = pd.read_parquet(tmp_path / "scoring" / "recommendations").set_index("user")
    assert frame["items"].map(list).to_dict() == expected
    assert {row["user"]: list(row["items"]) for row in asked} == expected


def _loads(spark):
    """How often each living Python worker has loaded a model, and answered with one it had."""

    def tell(_):
        found = batch._scorer.cache_info()
        yield pa.RecordBatch.from_pylist(
            [{"worker": os.getpid(), "loads": found.misses, "others": found.hits}]
        )

    counts = "worker bigint, loads bigint, others bigint"
    told = spark.range(0, 8, 1, 8).mapInArrow(tell, counts).collect()
    return {row["worker"]: (row["loads"], row["others"]) for row in told}


def test_without_champion_says_what_to_do_and_leaves_the_last_result(
    spark, users, config, tmp_path
):
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "kept").write_text("last result")
    with pytest.raises(ArtifactError, match=r"no 'tiny@champion'.*recsys promote"):
        score(config, spark, users[0], tmp_path / "scoring")
    assert [p.name for p in (tmp_path / "scoring").iterdir()] == ["kept"]
