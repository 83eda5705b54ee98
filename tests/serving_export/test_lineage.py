import pytest
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, SourceVersion
from serving_export.lineage import lineage, remember
from serving_export.registry import ModelVersion, connect


@pytest.fixture
def client(registry):
    connect(registry.uri)
    return MlflowClient()


def test_a_version_leads_back_to_its_tables(registry, client, world, tiny, tmp_path):
    digest = world.exported.digest
    with pytest.raises(ArtifactError, match=rf"of models:/tiny/1 holds no lineage/{digest}\.json"):
        lineage(ModelVersion("tiny", "1"))

    source = SourceVersion(uri="main.shop.clicks", num_rows=1234, version="delta 17")
    later = SourceVersion(uri="main.shop.items", num_rows=77)
    data, other = (
        tiny.write_data(tmp_path / name).model_copy(update={"sources": sources}).save()
        for name, sources in (("data", {"events": source}), ("later", {"items": later}))
    )
    client.set_tag(registry.run_id, "mlflow.source.git.commit", "abc123")
    client.set_tag(registry.run_id, "recsys.started_from", "models:/tiny/7")
    folder = tmp_path / "export"
    folder.mkdir()
    (other.directory / "manifest.json").rename(folder / "corpus.json")
    moved = {"corpus": str(other.directory / "corpus"), "directory": folder}
    exported = world.exported.model_copy(update=moved)
    remember(registry.run_id, exported, data, world.config.export)
    # A later fit in the same run is of another export.
    client.set_tag(registry.run_id, "mlflow.source.git.commit", "def456")
    another = exported.model_copy(update={"digest": "another"})
    remember(registry.run_id, another, data, world.config.export)

    found = lineage(ModelVersion("tiny", "1"))

    assert found.run_id == registry.run_id
    assert found.provenance.data.sources == data.sources
    assert found.provenance.settings == world.config.export
    lines = found.lines()
    assert lines[0] == "model      models:/tiny/1"
    assert lines[2] == "code       recsys unknown, git abc123"
    assert lines[3] == "weights    models:/tiny/7"
    assert lines[-3:] == [
        "table      events: main.shop.clicks, 1234 rows, version delta 17",
        f"items      {other.corpus.num_items} of {other.directory}",
        "items from items: main.shop.items, 77 rows",
    ]


def test_a_version_without_a_run_has_no_lineage(client, tmp_path):
    client.create_registered_model("orphan")
    client.create_model_version("orphan", tmp_path.as_uri())
    with pytest.raises(ArtifactError, match=r"orphan/1 was registered without a run"):
        lineage(ModelVersion("orphan", "1"))
