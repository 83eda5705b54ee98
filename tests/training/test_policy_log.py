import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from recsys.artifacts import ArtifactError
from recsys.cli import app
from training.policy_log import read_choices

LOG = {
    "context": ["a", "a", "b", "c d"],
    "item": ["x", "y", "x", "z"],
    "propensity": [0.5, 0.25, 1.0, 0.125],
    "reward": [1.0, 0.0, 2.0, 1.0],
}
TARGET = {
    "context": ["a", "a", "b", "c d", "never logged"],
    "item": ["x", "w", "x", "y", "x"],
    "probability": [0.75, 0.25, 1.0, 1.0, 1.0],
}


def write(folder, log=None, target=None):
    """Parquet of both tables, some columns replaced or (None) left out."""
    paths = []
    for name, columns, changed in (("log", LOG, log), ("target", TARGET, target)):
        kept = {n: v for n, v in (columns | (changed or {})).items() if v is not None}
        paths.append(folder / f"{name}.parquet")
        pq.write_table(pa.table(kept), paths[-1])
    return paths


def test_each_choice_finds_its_probability(tmp_path):
    found = read_choices(*write(tmp_path))
    assert found.target.tolist() == [0.75, 0, 1, 0]
    assert found.context.tolist() == [0, 0, 1, 2]
    assert found.propensity.tolist() == LOG["propensity"]
    assert found.reward.tolist() == LOG["reward"]
    assert found.predicted is None
    assert found.expected is None


def test_predicted_rewards_are_expected_by_context(tmp_path):
    log, target = {"predicted": [1.0, 2, 3, 4]}, {"predicted": [4.0, 8, 5, 6, 7]}
    found = read_choices(*write(tmp_path, log, target))
    assert found.predicted.tolist() == [1, 2, 3, 4]
    assert found.expected.tolist() == [5, 5, 5, 6]


def test_numbers_as_ids_from_csv_and_the_result_of_a_scoring(tmp_path):
    (tmp_path / "log.csv").write_text("context,item,propensity,reward\n7,1,.5,1\n8,2,.5,0\n")
    scoring = {"user": ["7", "8", "9"], "items": [["1", "2"], ["1"], []]}
    pq.write_table(pa.table(scoring), tmp_path / "part-0.parquet")
    found = read_choices(tmp_path / "log.csv", tmp_path / "part-0.parquet")
    assert found.target.tolist() == [1, 0]


def test_a_separator_within_an_id_joins_nothing(tmp_path):
    log = {"context": ["a b"], "item": ["c"], "propensity": [0.5], "reward": [1]}
    target = {"context": ["a b", "a"], "item": ["x", "b c"], "probability": [1.0, 1.0]}
    assert read_choices(*write(tmp_path, log, target)).target.tolist() == [0]


@pytest.mark.parametrize(
    ("log", "target", "message"),
    [
        ({"propensity": [0.5, 0.0, 1, 1]}, {}, r"log.*, row 2: propensity=0, expected above 0, up"),
        (
            {"propensity": [0.5, 1.5, 1, 1]},
            {},
            r"row 2: propensity=1\.5, expected above 0, up to 1",
        ),
        ({"propensity": None}, {}, r"log.* no column 'propensity': expected context, item, prop"),
        ({"reward": [1.0, 1, np.nan, 1]}, {}, r"row 3: reward=nan, expected a number"),
        ({"reward": [1.0, None, 1, 1]}, {}, r"log.*, row 2: 'reward' is missing"),
        ({"reward": ["much"] * 4}, {}, r"log.*: 'reward' holds no numbers"),
        ({"item": [None, "y", "x", "z"]}, {}, r"log.*, row 1: 'item' is missing"),
        ({}, {"item": None}, r"target.* no column 'item': expected context, item, found"),
        ({}, {"probability": [0.5, 0.25, 1, 1, 1]}, r"of context 'a' sum to 0\.75, expected 1"),
        ({}, {"probability": [2.0, -1, 1, 1, 1]}, r"row 1: probability=2, expected 0 to 1"),
        ({}, {"context": ["a", "a", "b", "e", "f"]}, r"nothing of 1 of 3 contexts .*'c d'"),
        ({"predicted": [1.0] * 4}, {}, r"target.* has no column 'predicted', which the other"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, log, target, message):
    with pytest.raises(ArtifactError, match=message):
        read_choices(*write(tmp_path, log, target))


def test_files_that_are_not_there_or_no_tables(tmp_path):
    log, target = write(tmp_path)
    with pytest.raises(ArtifactError, match=r"gone.csv does not exist: expected a CSV file"):
        read_choices(tmp_path / "gone.csv", target)
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(ArtifactError, match=r"broken.parquet cannot be read as CSV"):
        read_choices(log, tmp_path / "broken.parquet")
    pq.write_table(pq.read_table(log).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ArtifactError, match=r"empty.parquet holds no choice"):
        read_choices(tmp_path / "empty.parquet", target)


def test_the_command_shows_the_estimators(tmp_path):
    log, target = write(tmp_path)
    told = CliRunner().invoke(app, ["off-policy", "--log", str(log), "--target", str(target)])
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["estimator", "logged", "ips", "snips"]
    assert lines[2].split()[1] == f"{(1.5 + 2) / 4:.4f}"
    assert lines[-1].startswith("4 choices tell as much as 2 alike; mean weight 0.625 (")


def test_ids_of_a_csv_file_are_text(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("context,item,propensity,reward\n01,0012,0.5,1\n01,1e5,0.5,0\n")
    _, target = write(
        tmp_path,
        target={"context": ["01", "01"], "item": ["0012", "1e5"], "probability": [0.9, 0.1]},
    )
    assert read_choices(log, target).target.tolist() == [0.9, 0.1]
