import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import ConfigError
from training.prepare.columns import Columns, check_columns, home_of, verify

HEADER = "session ID;page 2 (model);day;prix €"


@pytest.fixture
def csv_file(tmp_path):
    file = tmp_path / "clicks.csv.gz"
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write(f"{HEADER}\n1;A;2024-01-01;2\n")
    return file


def columns(**changes):
    return {"user": "session ID", "item": "page 2 (model)", "time": "day"} | changes


def source(file, **more):
    return {"path": str(file), "format": "csv", "options": {"sep": ";", "header": "true"}} | more


def test_columns_that_exist_pass(csv_file, configure):
    features = [
        {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "price", "side": "candidate", "kind": "number", "column": "prix €"},
        {"name": "weekday", "side": "context", "kind": "category"},
    ]
    events = source(csv_file, derive={"weekday": "dayofweek(day)"})
    check_columns(configure(features, columns(), events=events))


def test_missing_role_names_key_file_and_nearest(csv_file, configure):
    config = configure(columns=columns(item="page 2 model"), events=source(csv_file))
    with pytest.raises(ConfigError) as raised:
        check_columns(config)
    message = str(raised.value)
    assert "data.events.columns.item: expected a column 'page 2 model'" in message
    assert str(csv_file) in message
    assert "did you mean 'page 2 (model)'" in message


def test_missing_column_of_the_held_out_items_is_told_too(csv_file, tmp_path, configure):
    held_out = tmp_path / "test.csv"
    held_out.write_text("who,what\n1,A\n")
    table = {"path": str(held_out), "format": "csv", "options": {"header": "true"}}
    config = configure(
        columns=columns(),
        events=source(csv_file),
        split={"kind": "held_out"},
        held_out=table | {"columns": {"user": "who", "item": "wat"}},
    )
    with pytest.raises(
        ConfigError, match=r"data\.held_out\.columns\.item: .*'wat' in .*test\.csv.*'what'"
    ):
        check_columns(config)


def test_missing_feature_column_names_the_feature_key(csv_file, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "dai", "side": "query", "kind": "category"},
    ]
    with pytest.raises(ConfigError, match=r"features\.1\.column.*'dai'.*did you mean 'day'"):
        check_columns(configure(features, columns(), events=source(csv_file)))


def test_unread_header_is_told(csv_file, configure):
    events = source(csv_file, options={"sep": ";"})
    with pytest.raises(ConfigError, match=r"set options\.header to 'true'"):
        check_columns(configure(columns=columns(), events=events))


def test_missing_path_names_the_nearest_file(csv_file, configure):
    events = source(csv_file.with_name("click.csv.gz"))
    with pytest.raises(ConfigError, match=r"data\.events\.path: .*did you mean .*clicks\.csv\.gz"):
        check_columns(configure(columns=columns(), events=events))


def test_parquet_schema_and_partition_folders(tmp_path, configure):
    folder = tmp_path / "clicks" / "day=2024-01-01"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"u": ["a"], "i": ["b"]}), folder / "part.parquet")
    events = {"path": str(tmp_path / "clicks"), "format": "parquet"}
    check_columns(configure(columns={"user": "u", "item": "i", "time": "day"}, events=events))
    with pytest.raises(ConfigError, match="expected a column 'j'"):
        check_columns(configure(columns={"user": "u", "item": "j", "time": "day"}, events=events))


def test_rare_keys_of_a_long_json_file_are_left_to_spark(tmp_path, configure):
    file = tmp_path / "clicks.json"
    file.write_text("".join(json.dumps({"u": 1, "i": 2, "t": 3}) + "\n" for _ in range(1500)))
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "rare", "side": "query", "kind": "category"},
    ]
    events = {"path": str(file), "format": "json"}
    check_columns(configure(features, events=events))
    with pytest.raises(ConfigError, match="expected a column 'user'"):
        check_columns(configure(columns={"user": "user", "item": "i", "time": "t"}, events=events))


def test_table_that_a_side_cannot_be_read_from(csv_file, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "day", "side": "query", "kind": "category", "table": "items"},
    ]
    with pytest.raises(ConfigError, match=r"features\.1\.table: .*valid tables are events, users"):
        check_columns(configure(features, columns(), events=source(csv_file)))


def test_feature_of_a_table_that_is_not_set(csv_file, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "age", "side": "query", "kind": "category", "table": "users"},
    ]
    with pytest.raises(ConfigError, match=r"data\.users is not set"):
        check_columns(configure(features, columns(), events=source(csv_file)))


@pytest.mark.parametrize("inside", [None, "variables"])
def test_an_encoder_that_is_no_savedmodel_is_told(csv_file, tmp_path, configure, inside):
    folder = tmp_path / "encoder"
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "day", "side": "candidate", "kind": "text", "encoder": str(folder)},
    ]
    config = configure(features, columns(), events=source(csv_file))
    if inside:
        (folder / inside).mkdir(parents=True)
    found = "a folder without it" if inside else "no such folder"
    with pytest.raises(
        ConfigError, match=rf"features\.1\.encoder: .*'day'.*saved_model\.pb.*{folder}.*{found}"
    ):
        check_columns(config)
    folder.mkdir(exist_ok=True)
    (folder / "saved_model.pb").touch()
    check_columns(config)


def test_a_role_is_no_vector(csv_file, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "v", "side": "query", "kind": "vector", "column": "user", "dim": 2},
    ]
    with pytest.raises(ConfigError, match=r"features\.1\.column: .*arrays.*the role 'user'"):
        check_columns(configure(features, columns(), events=source(csv_file)))


def test_home_prefers_the_item_table_for_candidates(configure):
    items = {"table": "items", "key": "id"}
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "brand", "side": "candidate", "kind": "category"},
        {"name": "colour", "side": "candidate", "kind": "category"},
    ]
    config = configure(features, items=items)
    known = {
        "events": Columns(("u", "i", "t", "brand", "colour"), "clicks"),
        "items": Columns(("id", "Brand"), "items"),
    }
    verify(config, known)
    homes = {f.name: home_of(f, config.data, known) for f in config.features if f.of is None}
    assert homes == {"item_id": "role", "brand": "items", "colour": "events"}


def test_bot_limit_needs_time(configure):
    config = configure(
        columns={"user": "u", "item": "i", "order": ["n"]},
        split={"kind": "leave_last_out"},
        cleaning={"max_events_per_day": 3},
    )
    with pytest.raises(ConfigError, match=r"max_events_per_day needs data\.events\.columns\.time"):
        verify(config, {})


def test_check_does_not_import_spark():
    code = "import sys, training.prepare.columns; sys.exit('pyspark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
