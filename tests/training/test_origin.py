import subprocess
from importlib.metadata import version
from types import SimpleNamespace

import pytest

import recsys
from training import origin as module
from training.origin import origin, revision


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: shop\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_and_whether_files_differ(checkout):
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
    assert revision(checkout) == (commit, False)
    (checkout / "mine.yaml").write_text("name: other\n")
    assert revision(checkout) == (commit, True)


def test_no_checkout_no_git_no_commit(checkout, tmp_path_factory, monkeypatch):
    assert revision(tmp_path_factory.mktemp("plain")) is None
    # As site-packages within a checkout that ignores them.
    (checkout / "ignored").mkdir()
    assert revision(checkout / "ignored") is None
    monkeypatch.setenv("PATH", "")
    assert revision(checkout) is None


def test_tags_tell_code_packages_and_schema(checkout, monkeypatch, tmp_path_factory):
    installed = tmp_path_factory.mktemp("installed")
    monkeypatch.setattr(module.recsys, "__file__", str(installed / "__init__.py"))
    tags = origin(SimpleNamespace(fingerprint="f00"), checkout)
    assert tags["recsys.started_from"] == "from scratch"
    start = SimpleNamespace(source="models:/shop/3")
    begun = origin(SimpleNamespace(fingerprint="f00"), checkout, start)
    assert begun == tags | {"recsys.started_from": "models:/shop/3"}
    assert tags["recsys.version"] == recsys.__version__
    assert tags["recsys.schema_fingerprint"] == "f00"
    assert tags["recsys.versions.tensorflow"] == version("tensorflow")
    assert tags["recsys.git_changed"] == "false"
    assert tags["mlflow.source.git.commit"] == revision(checkout)[0]
