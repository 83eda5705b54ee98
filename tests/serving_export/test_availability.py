"""Items taken out of what servers have, seen by processes that know nothing of this package."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from recsys.artifacts import ArtifactError
from recsys.cli import app
from recsys.dataset import raw_batches
from serving_export.availability import publish_availability
from serving_export.handoff import VARIANTS, publish
from serving_export.unavailable import ASSET, read_listing
from serving_export.verify import ask

REGISTERED = {"name": "tiny", "version": "7", "run_id": "abc"}
OUT = [0, 2, 5, 31]


@pytest.fixture(scope="module")
def models(variants, data, tiny, tmp_path_factory):
    """Version 1 as it was exported, version 2 by the command: four items less."""
    directory = tmp_path_factory.mktemp("models")
    publish(variants, data, REGISTERED, directory, keep=9)
    file = directory / "out.csv"
    file.write_text("\n".join(["sku", "strange", *(tiny.item(row) for row in OUT)]), "utf-8")
    arguments = ["availability", "--to", directory, "--unavailable", file, "--column", "sku"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert done.output == (
        f"version 2 of {directory}: 4 of 60 items are not available; 1 ids are of no item of the "
        "model, such as 'strange'\n"
    )
    return directory


def folders(models, number):
    return {variant: models / variant / str(number) for variant in VARIANTS}


def test_a_fresh_process_sees_another_list_of_the_same_model(models, data, tiny):
    queries = next(iter(raw_batches(data, data.test, 40).as_numpy_iterator()))
    wanted = queries | {"exclusions": np.full((40, 1), b"", object), "k": np.int32(60)}
    before, after = (ask(folders(models, number), wanted) for number in (1, 2))
    out = {tiny.item(row).encode() for row in OUT}
    for variant in VARIANTS:
        # All that were there before, in their order, without the four.
        for old, new in zip(
            before[variant]["ids"].tolist(), after[variant]["ids"].tolist(), strict=True
        ):
            assert len(set(old)) == 60
            assert new == [item for item in old if item not in out] + [b""] * 4
        assert np.isneginf(after[variant]["scores"][:, -4:]).all()


def test_all_but_list_and_examples_is_the_same_file(models):
    for variant, folder in folders(models, 2).items():
        old = models / variant / "1"
        names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        assert names == {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
        changed = {str(n) for n in names if not (folder / n).samefile(old / n)}
        assert all(n == ASSET or n.startswith("assets.extra/examples/") for n in changed)
        assert ASSET in changed
        assert read_listing(old) == []
        response = json.loads((folder / "assets.extra/examples/rows.response.json").read_text())
        assert all(
            set(row["ids"]).isdisjoint(read_listing(folder)) for row in response["predictions"]
        )


def test_the_next_model_takes_the_list_over_and_the_next_list_replaces_it(
    models, variants, data, tiny
):
    listed = read_listing(models / "exact" / "2")
    assert publish(variants, data, REGISTERED, models, keep=9) == 3
    assert [read_listing(folder) for folder in folders(models, 3).values()] == [listed] * 2
    assert [read_listing(folder) for folder in variants.values()] == [[], []]
    done = CliRunner().invoke(app, ["availability", "--to", str(models), "--clear"])
    assert "version 4" in done.output
    assert "0 of 60 items are not available; 0 ids" in done.output
    assert read_listing(models / "scann" / "4") == []


def test_nothing_is_published_where_nothing_would_be_left(models, tiny):
    everything = [tiny.item(row) for row in range(tiny.num_items)]
    with pytest.raises(ArtifactError, match=r"all 60 items of version \d .* are listed"):
        publish_availability(models, everything, keep=9)


def test_nothing_published_nothing_to_change(tmp_path):
    with pytest.raises(ArtifactError, match="holds no version of exact and scann"):
        publish_availability(tmp_path, ["a"], keep=9)


def test_a_model_that_knows_no_list_does_not_follow_one_that_does(models, variants, data, tmp_path):
    """Or else items that are not available would be back."""
    for name, path in variants.items():
        (tmp_path / name).mkdir()
        for part in path.iterdir():
            if part.name != "assets":
                (tmp_path / name / part.name).symlink_to(part)
    publish_availability(models, ["strange"], keep=9)
    with pytest.raises(ArtifactError, match=r"--set export\.availability=true"):
        publish({n: tmp_path / n for n in VARIANTS}, data, REGISTERED, models, keep=9)


def test_either_a_file_or_none():
    for arguments in ([], ["--clear", "--unavailable", "x.csv"]):
        done = CliRunner().invoke(app, ["availability", "--to", "nowhere", *arguments])
        assert "give a file by --unavailable, or --clear" in str(done.exception)
