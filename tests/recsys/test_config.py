import subprocess
import sys
from pathlib import Path

import pytest

import training
from recsys.config import ConfigError, RunConfig, load_config

CONFIGS = sorted(Path(training.__file__).parent.glob("configs/*.yaml"))
BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").glob("*.yaml"))
MINIMAL = """
name: shop
data:
  events:
    path: clicks.csv
    format: csv
    columns: {user: u, item: i, time: t}
  split: {kind: time, validation_days: 1, test_days: 1}
features:
  - {name: history, side: query, kind: history, of: item_id}
  - {name: item_id, side: candidate, kind: id, column: item}
registry: {model: shop}
"""


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL)
    return file


def test_every_shipped_config_is_valid():
    assert len(CONFIGS) >= 2
    assert len(BENCHMARKS) >= 3
    for file in [*CONFIGS, *BENCHMARKS]:
        assert load_config(file).name


def test_round_trip_through_json(minimal):
    config = load_config(minimal)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_overrides_win_and_lists_can_be_given(minimal):
    config = load_config(minimal, ["train.epochs=3", "evaluation.k=[5,20]"])
    assert config.train.epochs == 3
    assert config.evaluation.k == (5, 20)


def test_paths_are_relative_to_the_file_and_in_overrides_to_the_working_directory(
    minimal, tmp_path, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parent)
    assert load_config(minimal).data.events.path == str(tmp_path / "clicks.csv")
    changed = load_config(minimal, ["data.events.path=other.csv"])
    assert changed.data.events.path == str(Path(__file__).parent / "other.csv")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"train\.epoch: unknown key; did you mean 'epochs'\?"),
        ("data.split.test_day=2", r"data\.split\.time\.test_day: unknown key; .*'test_days'"),
        ("data.events.columns.usr=x", r"data\.events\.columns\.usr: unknown .* 'user'"),
        ("train.epochs=many", r"train\.epochs: Input should be a valid integer.*got 'many'"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1; got 0"),
        ("model.kind=tree", r"model\.kind: Input should be 'two_tower'"),
        ("data.split.kind=random", r"data\.split: .*'time', 'leave_last_out', 'given'"),
        ("data.split.test_from=2024-01-01", r"exactly one of `test_from` and `test_days`"),
        ("registry.gate.metric=auc", r"registry\.gate\.metric: .*match pattern"),
        ("registry.gate.metric=ndcg@7", r"needs 7 in evaluation\.k"),
        ("data.events.table=clicks", r"exactly one of `path`, `table` or `query`"),
        ("seed=-1", r"seed: .*greater than or equal to 0"),
        ("evaluation.k=[0,20]", r"evaluation\.k\.0: .*greater than or equal to 1"),
        ("features.0.length=9", r"a list is set as a whole, such as evaluation\.k=\[10,20\]"),
        ("data.event_types.buy.weight=2", r"`event_types` needs `events\.columns\.event`"),
    ],
)
def test_errors_name_key_expectation_and_nearest_name(minimal, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [override])


HELD_OUT = """  split: {kind: held_out}
  held_out:
    path: test.csv
    format: csv
    columns: {user: u, item: i}
"""


@pytest.fixture
def held_out(minimal):
    split = "  split: {kind: time, validation_days: 1, test_days: 1}\n"
    minimal.write_text(MINIMAL.replace(split, HELD_OUT))
    return minimal


def test_the_path_of_held_out_items_is_relative_to_the_file_too(held_out, tmp_path):
    assert load_config(held_out).data.held_out.path == str(tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split.kind=leave_last_out", r"`held_out`, .* goes with `split\.kind=held_out`"),
        ("data.held_out=null", r"`held_out`, .* goes with `split\.kind=held_out`"),
        ("data.history_scope=session", r"`held_out` needs `history_scope=user`"),
        ("data.split.test_days=1", r"held_out\.test_days: unknown key; .*'validation_days'"),
        ("data.held_out.columns.when=t", r"data\.held_out\.columns\.when: unknown .*user"),
    ],
)
def test_held_out_items_need_their_split(held_out, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(held_out, [override])


@pytest.mark.parametrize(
    "override", ["data.held_out.columns.time=t", "data.split.validation_days=1"]
)
def test_times_of_held_out_items_need_those_of_events(held_out, override):
    held_out.write_text(held_out.read_text().replace("time: t", "order: [n]"))
    assert load_config(held_out).data.split.kind == "held_out"
    with pytest.raises(ConfigError, match=r"needs `events\.columns\.time`"):
        load_config(held_out, [override])


def test_the_label_cannot_be_read_as_context(minimal):
    telling = "  - {name: told, side: context, kind: id, column: item}\nregistry:"
    minimal.write_text(MINIMAL.replace("registry:", telling))
    with pytest.raises(ConfigError, match="feature 'told' tells the label"):
        load_config(minimal)


def test_item_ids_take_the_dimension_of_the_model(minimal):
    minimal.write_text(MINIMAL.replace("column: item}", "column: item, dim: 8}"))
    with pytest.raises(ConfigError, match=r"feature 'item_id' takes model\.embedding_dim"):
        load_config(minimal)


def test_uris_are_left_to_spark(minimal):
    for uri in ("s3://bucket/clicks", "dbfs:/mnt/clicks.csv", "file:/tmp/clicks.csv"):
        assert load_config(minimal, [f"data.events.path='{uri}'"]).data.events.path == uri


def test_encoders_are_relative_to_the_file_too(minimal, tmp_path):
    title = "  - {name: title, side: candidate, kind: text, encoder: %s}\nregistry:"
    for given, expected in (("enc", str(tmp_path / "enc")), ("'gs://b/enc'", "gs://b/enc")):
        minimal.write_text(MINIMAL.replace("registry:", title % given))
        assert load_config(minimal).schema_["title"].encoder == expected


def test_a_run_to_begin_with_is_relative_and_the_champion_is_no_path(minimal, tmp_path):
    for given, expected in (("old", str(tmp_path / "old")), ("champion", "champion")):
        minimal.write_text(f"{MINIMAL}train: {{warm_start: {given}}}\n")
        assert load_config(minimal).train.warm_start == expected
    assert load_config(minimal, ["train.warm_start=null"]).train.warm_start is None


def test_missing_key_is_named(minimal):
    minimal.write_text(MINIMAL.replace("registry: {model: shop}", ""))
    with pytest.raises(ConfigError, match=r"registry: missing; it is required"):
        load_config(minimal)


def test_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed")
    with pytest.raises(ConfigError, match="is not readable"):
        load_config(broken)


def test_config_is_light():
    """The config must answer before any heavy library would have loaded."""
    code = "import sys, recsys.config, recsys.schema, recsys.artifacts; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"tensorflow", "pyspark", "mlflow", "pandas", "tf_keras"}


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        (
            "[hystory]",
            r"export\.filters: 'hystory' is no candidate feature .*\['item_id', 'price'\]",
        ),
        ("[title]", r"'title' is no candidate feature of kind id, category or number"),
        ("[price,price]", r"names one twice"),
        ("[item_id]", r"requests give 'filter_item_id', which a feature is called too"),
    ],
)
def test_filters_are_candidate_features_that_can_be_compared(minimal, filters, told):
    more = (
        "  - {name: price, side: candidate, kind: number}\n"
        "  - {name: title, side: candidate, kind: text}\n"
        "  - {name: filter_item_id, side: context, kind: category, column: page}\n"
    )
    minimal.write_text(minimal.read_text().replace("registry:", more + "registry:"))
    assert load_config(minimal, ["export.filters=[price]"]).export.filters == ("price",)
    with pytest.raises(ConfigError, match=told):
        load_config(minimal, [f"export.filters={filters}"])
