import pytest
from pyspark.sql import functions as F

from recsys.schema import Feature
from serving_export.probes import answer_probes, feature_probes

pytestmark = pytest.mark.spark


def test_every_query_feature_is_watched_and_ids_know_their_vocabulary(tiny, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    probes = {probe.name: probe for probe in feature_probes(data)}
    assert list(probes) == [
        "history", "history.length", "member", "country", "basket", "clicked_at.hour", "taste.norm",
    ]  # fmt: skip
    files = {name: p.vocabulary.name for name, p in probes.items() if p.vocabulary is not None}
    assert files == {"history": "item_id.txt", "member": "member.txt", "country": "country.txt"}
    assert [name for name, probe in probes.items() if probe.is_own_id] == ["member"]
    assert [name for name, probe in probes.items() if probe.is_number] == [
        "history.length", "basket", "taste.norm",
    ]  # fmt: skip
    assert [p.name for p in answer_probes()] == ["recommended.items", "recommended.scores"]


def test_values_of_a_row(tiny, tmp_path, spark):
    data = tiny.write_data(tmp_path / "data")
    title = Feature(name="said", side="query", kind="text")
    features = data.features.model_copy(update={"features": (*data.features.features, title)})
    probes = feature_probes(data.model_copy(update={"features": features}))
    types = "history array<string>, member string, country string, basket float, "
    frame = spark.createDataFrame(
        [
            (["a", "b"], "u", None, 2.0, 90 * 60 * 10**6, [3.0, 0.0, 4.0], " two  words "),
            (None, None, "dk", None, -1, None, " "),
        ],
        types + "clicked_at bigint, taste array<float>, said string",
    )
    values = [probe.values(F.col(probe.column)).alias(probe.name) for probe in probes]
    first, second = (row.asDict() for row in frame.select(*values).collect())
    assert first == {
        "history": ["a", "b"],
        "history.length": [2.0],
        "member": ["u"],
        "country": [None],
        "basket": [2.0],
        "clicked_at.hour": ["01"],
        "taste.norm": [5.0],
        "said.words": [2.0],
    }
    missing = {name: [None] for name in first}
    assert second == missing | {"history": None, "country": ["dk"]}
