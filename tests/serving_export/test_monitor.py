import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import ArtifactError
from recsys.drift_report import DriftReport
from recsys.monitoring_config import Monitoring
from serving_export.batch import score
from serving_export.monitor import monitor
from serving_export.registry import connect
from serving_export.unavailable import write_items

pytestmark = pytest.mark.spark


def users(tiny, count, seed, items=40, basket=0.0):
    random = np.random.default_rng(seed)
    return pa.Table.from_pylist(
        [
            {
                "user": f"user {seed * count + n}",
                "history": [tiny.item(i) for i in random.integers(0, items, 5)],
                "member": f"user {random.integers(0, 12)}",
                "country": ["dk", "de", "fr", None][random.integers(0, 4)],
                "basket": float(random.normal() + basket),
                "clicked_at": int(random.integers(0, 86_400)) * 10**6,
                "taste": random.normal(size=3).tolist(),
            }
            for n in range(count)
        ]
    )


def write(table, folder):
    folder.mkdir()
    pq.write_table(table, folder / "part-00000.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def config(registry, tiny):
    connect(registry.uri)
    settings = Monitoring(bin_rows=5, reference_users=200)
    return tiny.run_config(scoring={"k": 4}).model_copy(update={"monitoring": settings})


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """Four hundred users of the training data."""
    data = tiny.write_data(tmp_path_factory.mktemp("reference") / "data")
    write(users(tiny, 400, seed=0), data.directory / "users")
    return data.model_copy(update={"num_users": 400}).save()


@pytest.fixture(scope="module")
def today(tiny, spark, config, tmp_path_factory):
    """Three hundred users of the same kind, scored by version 1 when some items were sold out."""
    folder = tmp_path_factory.mktemp("today")
    table = write(users(tiny, 300, seed=1), folder / "users")
    sold_out = folder / "sold_out.csv"
    write_items(sold_out, "item", map(tiny.item, range(20)))
    wanted = config.scoring.model_copy(update={"unavailable": str(sold_out)})
    then = config.model_copy(update={"scoring": wanted})
    scoring = score(then, spark, table, folder / "scoring", "tiny/1")
    sold_out.unlink()
    return table, scoring


def test_users_of_the_same_kind_are_quiet(spark, config, reference, today, tmp_path, caplog):
    report = monitor(config, spark, reference, *today, tmp_path / "monitoring")
    assert report.alarms == []
    assert "drift:" not in caplog.text
    assert DriftReport.load(tmp_path / "monitoring") == report
    names = {path.name for path in (tmp_path / "monitoring").iterdir()}
    assert names == {"manifest.json", "drift.txt", "drift.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["monitoring"]
    assert (report.reference_users, report.users, report.sample_users) == (400, 300, 200)
    found = {(f.of, f.measure): f.found for f in report.findings}
    assert len(found) == len(report.findings) == 2 * 9 + 3 + 1
    same = {of for (of, measure), value in found.items() if measure == "psi" and value == 0}
    assert same == {"history.length"}
    counted = {d.name: (d.reference_values, d.today_values) for d in report.distributions}
    assert counted["history"] == (2000, 1500)
    assert counted["recommended.items"] == counted["recommended.scores"] == (800, 1200)
    assert 0.3 < min(report.coverage) <= max(report.coverage) <= 1


def test_drift_of_one_feature_names_it_and_no_other(
    spark, config, reference, today, tiny, tmp_path, caplog
):
    """The last report stays until the next is finished; limits of one's own count."""
    drifted = write(users(tiny, 300, seed=1, basket=1.0), tmp_path / "users")
    limits = {"basket": {"jensen_shannon": None}}
    settings = config.monitoring.model_copy(update={"of": limits})
    wanted = config.model_copy(update={"monitoring": settings})
    with caplog.at_level(logging.WARNING):
        report = monitor(wanted, spark, reference, drifted, today[1], tmp_path / "monitoring")
    assert [(a.of, a.measure) for a in report.alarms] == [("basket", "psi")]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(line.startswith("drift: psi of basket: found ") for line in told)
    assert any("allowed 0.2500 (above " in line for line in told)
    assert "! " in (tmp_path / "monitoring" / "drift.txt").read_text()


def test_drift_of_items_is_seen_in_histories_recommendations_and_coverage(
    spark, config, reference, tiny, tmp_path
):
    """All have clicked the same two items, and get the same recommendations."""
    table = write(users(tiny, 300, seed=1, items=2), tmp_path / "users")
    scoring = score(config, spark, table, tmp_path / "scoring", "tiny/1")
    report = monitor(config, spark, reference, table, scoring, tmp_path / "monitoring")
    alarms = {(alarm.of, alarm.measure) for alarm in report.alarms}
    assert {of for of, _ in alarms} <= {
        "history", "recommended.items", "recommended.scores", "recommended.coverage",
    }  # fmt: skip
    assert {
        ("history", "psi"),
        ("history", "jensen_shannon"),
        ("recommended.items", "psi"),
        ("recommended.coverage", "coverage_drop"),
    } <= alarms
    moved = {d.name: d.moved for d in report.distributions}["history"]
    assert {moved[0].bin, moved[1].bin} <= {tiny.item(0), tiny.item(1), "(rest)"}


def test_recommendations_that_were_written_again_are_refused(
    spark, config, reference, today, tmp_path
):
    table, scoring = today
    other = scoring.model_copy(update={"model_version": "2"})
    with pytest.raises(
        ArtifactError, match=r"has 300 rows, 0 of them by version 2.*`recsys score`"
    ):
        monitor(config, spark, reference, table, other, tmp_path / "monitoring")
    gone = reference.model_copy(update={"users": "elsewhere"})
    with pytest.raises(ArtifactError, match=r"elsewhere is gone"):
        monitor(config, spark, gone, table, scoring, tmp_path / "monitoring")
    assert not list(tmp_path.iterdir())
