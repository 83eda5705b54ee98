from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import ArtifactError, Scoring
from serving_export.batch import score
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
    other = client.create_model_version("tiny", _popular_first(first.source, tmp_path))
    try:
        for version in ("1", str(other.version)):
            score(config, spark, users[0], tmp_path / "scoring", f"tiny/{version}")
            frame = pd.read_parquet(tmp_path / "scoring" / "recommendations").set_index("user")
            assert set(frame["model_version"]) == {version}
            answers[version] = frame["items"].map(tuple).to_dict()
    finally:
        client.delete_model_version("tiny", other.version)
    assert answers["1"] != answers[str(other.version)]


def _popular_first(source, tmp_path):
    """A copy of a model whose answers come in reverse."""
    copy = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path / "copy")))
    code = next(copy.rglob("pyfunc.py"))
    text = code.read_text()
    assert "return pd.concat(parts" in text
    code.write_text(text.replace("return pd.concat(parts", "return _reversed(parts"))
    with code.open("a") as stream:
        stream.write("\n\ndef _reversed(parts, **_):\n    whole = pd.concat(parts)\n")
        stream.write("    whole['ids'] = [ids[::-1] for ids in whole['ids']]\n    return whole\n")
    return str(copy)


def test_without_champion_says_what_to_do_and_leaves_the_last_result(
    spark, users, config, tmp_path
):
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "kept").write_text("last result")
    with pytest.raises(ArtifactError, match=r"no 'tiny@champion'.*recsys promote"):
        score(config, spark, users[0], tmp_path / "scoring")
    assert [p.name for p in (tmp_path / "scoring").iterdir()] == ["kept"]
