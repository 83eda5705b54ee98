import pytest
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, SourceVersion
from serving_export.lineage import lineage
from serving_export.registry import ModelVersion, connect


@pytest.fixture
def client(registry):
    connect(registry.uri)
    return MlflowClient()


def test_a_version_leads_back_to_its_tables(registry, client, tiny, tmp_path):
    with pytest.raises(ArtifactError, match=r"of models:/tiny/1 holds no data/manifest\.json"):
        lineage(ModelVersion("tiny", "1"))

    data = tiny.write_data(tmp_path / "data")
    source = SourceVersion(uri="main.shop.clicks", num_rows=1234, version="delta 17")
    data = data.model_copy(update={"sources": {"events": source}}).save()
    client.log_artifact(registry.run_id, str(data.directory / "manifest.json"), "data")
    client.set_tag(registry.run_id, "mlflow.source.git.commit", "abc123")
    client.set_tag(registry.run_id, "recsys.started_from", "models:/tiny/7")

    found = lineage(ModelVersion("tiny", "1"))

    assert found.run_id == registry.run_id
    assert found.data.sources == data.sources
    assert found.lines()[0] == "model      models:/tiny/1"
    assert found.lines()[2] == "code       recsys unknown, git abc123"
    assert found.lines()[3] == "weights    models:/tiny/7"
    assert found.lines()[-1] == ("table      events: main.shop.clicks, 1234 rows, version delta 17")


def test_a_version_without_a_run_has_no_lineage(client, tmp_path):
    client.create_registered_model("orphan")
    client.create_model_version("orphan", tmp_path.as_uri())
    with pytest.raises(ArtifactError, match=r"orphan/1 was registered without a run"):
        lineage(ModelVersion("orphan", "1"))
