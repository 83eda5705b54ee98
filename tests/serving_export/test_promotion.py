"""The gate's decision in the registry; on SQLite, and on a tracking server that the test starts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import mlflow
import pytest
import tensorflow as tf
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, Check, IndexReport, Promotion, RegisteredModel
from serving_export import promotion
from serving_export.promotion import Rival, _shortened, decision, promote, rollback
from serving_export.registry import ModelVersion, champion, connect, register, resolve

BETTER = {"popularity": 0.5, "markov": 0.1}
INDEX = IndexReport(
    kind="tree", parameters={}, recall=0.96, k=10, bytes=2_000_000, milliseconds_per_query=0.25
)

# Waits until its rival is as far, then promotes.
PROMOTE = """
import json, sys, time
from pathlib import Path
from recsys.artifacts import EvaluationReport, IndexReport, RegisteredModel
from recsys.config import RunConfig
from serving_export.promotion import Rival, promote
from serving_export.registry import connect

folder, uri, number, rival = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
connect(uri)
config = RunConfig.model_validate_json((folder / "config.json").read_text())
report = EvaluationReport.load(folder / "strong")
weak = EvaluationReport.load(folder / "weak")
index = IndexReport.model_validate_json((folder / "index.json").read_text())
registered = RegisteredModel.load(folder / f"registration {number}")
(folder / f"ready {number}").touch()
while len(list(folder.glob("ready *"))) < 2:
    time.sleep(0.001)
champion = Rival(rival, weak) if rival else None
promote(config, registered, report, index, champion, folder / f"promotion {number}")
"""


@pytest.fixture
def client(registry):
    connect(registry.uri)
    return MlflowClient()


@pytest.fixture
def named(world, registry, client, tmp_path):
    """A registered model of its own for a test: (config, register)."""

    def config_for(name, **gate):
        config = world.config.model_copy()
        gate = {"metric": "ndcg@10"} | gate
        changed = config.registry.model_validate({"model": name, "gate": gate})
        return config.model_copy(update={"registry": changed})

    def versions(config, count):
        """Versions that differ in their digest only; they share the files of the first."""
        made = []
        for n in range(1, count + 1):
            if n == 1:
                client.create_registered_model(config.registry.model)
            source = client.get_model_version("tiny", registry.registered.model_version).source
            created = client.create_model_version(config.registry.model, source, registry.run_id)
            made.append(
                RegisteredModel(
                    directory=tmp_path / f"registration {n}",
                    name=config.registry.model,
                    model_version=str(created.version),
                    uri="",
                    run_id=registry.run_id,
                )
            )
        return made

    return config_for, versions


def test_first_champion_needs_the_baselines_only(named, registry, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("first")
    (version,) = versions(config, 1)
    report = tiny.write_report(tmp_path / "report", [1, 2], BETTER)
    assert champion(config, tmp_path) is None

    promotion = promote(config, version, report, INDEX, None, tmp_path / "promotion")

    assert promotion.promoted
    assert promotion.previous_version is None
    assert len(promotion.reasons) == 3
    assert promotion.reasons[0].startswith("ndcg@10 +50.0% over popularity (interval +46.0%")
    assert promotion.reasons[2] == "there was no champion to compare with"
    assert Promotion.load(tmp_path / "promotion") == promotion
    number, folder = champion(config, tmp_path)
    assert number == "1"
    model = tf.saved_model.load(str(folder))
    ids, _ = tiny.ask(model, [[tiny.item(1)]], k=3)
    assert len(ids[0]) == 3
    assert not (folder.parent / f".{folder.name}.new").exists()


def test_loser_is_refused_with_reasons_and_the_champion_stays(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("loser")
    (version,) = versions(config, 1)
    report = tiny.write_report(tmp_path / "report", [1], {"popularity": 0.5, "markov": -0.1})

    promotion = promote(config, version, report, INDEX, None, tmp_path)

    assert not promotion.promoted
    assert "fails" in promotion.reasons[1]
    assert "passes" in promotion.reasons[0]
    tags = client.get_model_version("loser", "1").tags
    assert tags["gate_promoted"] == "false"
    assert tags["gate_reason_01"] == promotion.reasons[1]
    with pytest.raises(ArtifactError):
        resolve("loser@champion")


def test_challenger_must_beat_the_champion(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("duel", min_lift_over_champion=0.1)
    first, second, third = versions(config, 3)
    weak = tiny.write_report(tmp_path / "weak", [2, 0, 2, 0] * 5, BETTER)
    strong = tiny.write_report(tmp_path / "strong", [1, 2, 1, 2] * 5, BETTER)
    assert promote(config, first, weak, INDEX, None, tmp_path / "1").promoted

    better = promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")
    assert better.promoted
    assert better.previous_version == "1"
    assert "over champion version 1 (interval" in better.reasons[-1]

    equal = promote(config, third, strong, INDEX, Rival("2", strong), tmp_path / "3")
    assert not equal.promoted
    assert equal.previous_version == "2"
    assert equal.reasons[-1].startswith("ndcg@10 +0.0% over champion version 2")
    assert client.get_model_version_by_alias("duel", "champion").version == 2


def test_champion_that_was_not_evaluated_stays(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("unseen")
    first, second = versions(config, 2)
    report = tiny.write_report(tmp_path / "report", [1], BETTER)
    promote(config, first, report, INDEX, None, tmp_path / "1")

    promotion = promote(
        config, second, report, INDEX, Rival("1", "It reads 'age'."), tmp_path / "2"
    )

    assert not promotion.promoted
    assert promotion.reasons[-1] == (
        "champion version 1 was not evaluated on this window, so it stays; to start anew without "
        "it, delete its alias 'champion'. It reads 'age'."
    )


def test_repeated_promotion_tells_the_same_story(named, tiny, tmp_path):
    config_for, versions = named
    config = config_for("again", min_lift_over_champion=0.1)
    first, second = versions(config, 2)
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    strong = tiny.write_report(tmp_path / "strong", [1, 1], BETTER)
    promote(config, first, weak, INDEX, None, tmp_path / "1")
    done = promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")

    # After a kill the champion that the caller finds is the version itself: there is no rival.
    again = promote(config, second, strong, INDEX, None, tmp_path / "2")

    assert again.model_dump(exclude={"created_at"}) == done.model_dump(exclude={"created_at"})


def test_champion_made_by_hand_is_told_apart(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("manual")
    (version,) = versions(config, 1)
    client.set_registered_model_alias("manual", "champion", "1")
    report = tiny.write_report(tmp_path / "report", [1], {"popularity": -0.5})
    promotion = promote(config, version, report, INDEX, None, tmp_path)
    assert promotion.promoted
    assert promotion.reasons == ["it was made champion by hand"]


def test_numbers_are_kept_on_the_version_whichever_way_it_goes(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("measured", min_index_recall=0.95, max_index_milliseconds=0.2)
    (version,) = versions(config, 1)
    report = tiny.write_report(tmp_path / "report", [1], {"popularity": 0.5})

    promotion = promote(config, version, report, INDEX, None, tmp_path)

    assert not promotion.promoted
    assert promotion.reasons[1:3] == [
        "recall@10 of the index 0.9600 (passes, at least 0.9500 is allowed)",
        "search for a query 0.250 ms (fails, at most 0.200 ms is allowed)",
    ]
    tags = client.get_model_version("measured", "1").tags
    kept = [Check.model_validate_json(tags[f"gate_check_{n:02}"]) for n in range(3)]
    assert kept == promotion.checks
    assert kept[0].model_dump() == {
        "what": "ndcg@10 over popularity", "value": 0.5, "low": 0.46, "high": 0.54,
        "limit": 0.0, "holds": True,
    }  # fmt: skip
    assert decision(ModelVersion("measured", "1")) == ["refused", *promotion.reasons]


def test_a_check_of_a_long_name_stays_readable_in_a_tag():
    long = Check(what="ndcg@20 of " + "x" * 300, value=-1 / 3, low=-1 / 7, limit=1 / 9, holds=False)
    told = _shortened(long.model_copy(update={"high": 1 / 11})).model_dump_json()
    assert len(told) <= 256
    assert Check.model_validate_json(told).value == long.value


def test_a_second_decision_leaves_nothing_of_the_first(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("rejudged")
    (version,) = versions(config, 1)
    many = tiny.write_report(tmp_path / "many", [1], {"popularity": -0.5, "markov": 0.1})
    few = tiny.write_report(tmp_path / "few", [1], {"popularity": 0.5})
    promote(config, version, many, INDEX, None, tmp_path)
    promotion = promote(config, version, few, INDEX, None, tmp_path)
    assert promotion.promoted
    assert decision(ModelVersion("rejudged", "1")) == ["promoted", *promotion.reasons]


def test_a_slice_that_falls_refuses_a_better_mean(named, tiny, tmp_path):
    config_for, versions = named
    config = config_for("slices", min_slice_queries=10)
    first, second = versions(config, 2)

    def report(folder, ranks, cold, tiny_slice):
        written = tiny.write_report(tmp_path / folder, ranks, BETTER)
        buckets = {
            "cold": {"queries": 20.0, "ndcg@10": cold},
            "warm": {"queries": 9.0, "ndcg@10": tiny_slice},
        }
        return written.model_copy(update={"slices": {"user": buckets}})

    weak = report("weak", [2, 0, 2, 0] * 5, 0.4, 0.4)
    strong = report("strong", [1, 2, 1, 2] * 5, 0.3, 0.1)
    promote(config, first, weak, INDEX, None, tmp_path / "1")
    refused = promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")
    assert not refused.promoted
    assert refused.reasons[-1] == (
        "ndcg@10 of user=cold against champion version 1 -25.0% (fails, at least -10.0% is allowed)"
    )
    assert sum("user=" in reason for reason in refused.reasons) == 1
    lenient = config_for("slices", min_slice_queries=10, max_slice_drop=None)
    assert promote(lenient, second, strong, INDEX, Rival("1", weak), tmp_path / "2").promoted


def test_rollback_goes_back_step_by_step(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("back")
    first, second = versions(config, 2)
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    strong = tiny.write_report(tmp_path / "strong", [1, 1], BETTER)
    promote(config, first, weak, INDEX, None, tmp_path / "1")
    promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")

    assert rollback("back") == (ModelVersion("back", "2"), ModelVersion("back", "1"))
    assert resolve("back").version == "1"
    assert client.get_model_version("back", "2").tags["rolled_back_to"] == "1"
    with pytest.raises(ArtifactError, match=r"which version was champion before .*back/1.*--to"):
        rollback("back")
    with pytest.raises(ArtifactError, match=r"no 'back/9'"):
        rollback("back", "9")
    assert rollback("back", "2")[1].version == "2"
    # A new term: what was won once can be won again.
    rollback("back", "1")
    assert promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2").promoted


def test_a_champion_that_came_meanwhile_is_told(named, tiny, tmp_path):
    config_for, versions = named
    config = config_for("meanwhile")
    first, second = versions(config, 2)
    report = tiny.write_report(tmp_path / "report", [1, 1], BETTER)
    promote(config, first, report, INDEX, None, tmp_path / "1")
    late = promote(config, second, report, INDEX, None, tmp_path / "2")
    assert not late.promoted
    assert late.reasons[-1] == (
        "the champion is version 1 now, it was none when this version was evaluated beside it: "
        "run `recsys promote` again"
    )


@pytest.fixture
def killed_before_its_alias(monkeypatch):
    """A promotion that has claimed its term and is killed before it moves the alias."""

    def killed(*_):
        raise KeyboardInterrupt

    def promote_and_die(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr("serving_export.succession.Succession.move", killed)
            with pytest.raises(KeyboardInterrupt):
                promote(*arguments)

    return promote_and_die


def test_a_job_killed_between_its_claim_and_the_alias_can_go_on(
    named, client, tiny, tmp_path, killed_before_its_alias
):
    config_for, versions = named
    config = config_for("interrupted")
    first, second = versions(config, 2)
    report = tiny.write_report(tmp_path / "report", [1, 1], BETTER)
    killed_before_its_alias(config, first, report, INDEX, None, tmp_path / "1")
    other = promote(config, second, report, INDEX, None, tmp_path / "2")
    assert not other.promoted
    assert other.reasons[-1].startswith("version 1 was chosen as champion while this one was")
    assert promote(config, first, report, INDEX, None, tmp_path / "1").promoted

    # Killed after the alias and before the new term, the next one ends what was begun.
    client.set_registered_model_tag("interrupted", "recsys_champion_term", "0")
    weaker = tiny.write_report(tmp_path / "weaker", [3, 3], BETTER)
    assert promote(config, second, report, INDEX, Rival("1", weaker), tmp_path / "2").promoted


def test_a_deleted_version_that_was_chosen_keeps_nobody_away(
    named, client, tiny, tmp_path, killed_before_its_alias
):
    config_for, versions = named
    config = config_for("withdrawn")
    first, second = versions(config, 2)
    report = tiny.write_report(tmp_path / "report", [1, 1], BETTER)
    killed_before_its_alias(config, first, report, INDEX, None, tmp_path / "1")
    client.delete_model_version("withdrawn", "1")
    assert promote(config, second, report, INDEX, None, tmp_path / "2").promoted


def test_a_rollback_is_not_lost_to_a_promotion_that_is_running(named, tiny, tmp_path, monkeypatch):
    config_for, versions = named
    config = config_for("overtaken")
    first, second, third = versions(config, 3)
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    strong = tiny.write_report(tmp_path / "strong", [2, 2], BETTER)
    strongest = tiny.write_report(tmp_path / "strongest", [1, 1], BETTER)
    promote(config, first, weak, INDEX, None, tmp_path / "1")
    promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")
    judge = promotion._judge

    def judged_late(*arguments):
        verdict = judge(*arguments)
        rollback("overtaken")
        return verdict

    monkeypatch.setattr(promotion, "_judge", judged_late)
    late = promote(config, third, strongest, INDEX, Rival("2", strong), tmp_path / "3")
    assert not late.promoted
    assert late.reasons[-1].startswith("version 1 was chosen as champion while this one was judged")
    assert resolve("overtaken").version == "1"


def test_a_rollback_comes_between_a_claim_and_its_alias(named, tiny, tmp_path, monkeypatch):
    config_for, versions = named
    config = config_for("between")
    first, second, third = versions(config, 3)
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    strong = tiny.write_report(tmp_path / "strong", [2, 2], BETTER)
    strongest = tiny.write_report(tmp_path / "strongest", [1, 1], BETTER)
    promote(config, first, weak, INDEX, None, tmp_path / "1")
    promote(config, second, strong, INDEX, Rival("1", weak), tmp_path / "2")
    keep = promotion._remember

    def remembered_late(*arguments):
        monkeypatch.undo()
        keep(*arguments)
        rollback("between")

    monkeypatch.setattr(promotion, "_remember", remembered_late)
    late = promote(config, third, strongest, INDEX, Rival("2", strong), tmp_path / "3")
    assert not late.promoted
    told = "the champion was moved while this version was judged: run `recsys promote` again"
    assert late.reasons[-1] == told
    assert decision(ModelVersion("between", "3")) == ["refused", *late.reasons]
    assert resolve("between").version == "1"
    # What was refused for that alone may try again.
    assert promote(config, third, strongest, INDEX, Rival("1", weak), tmp_path / "3").promoted


def test_the_champion_exported_anew_is_judged_by_its_index(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("rebuilt", min_index_recall=0.95)
    made = first, second, third, other = versions(config, 4)
    for version, digest in zip(made, ("a-1", "a-2", "a-3", "b-1"), strict=True):
        client.set_model_version_tag("rebuilt", version.model_version, "digest", digest)
    report = tiny.write_report(tmp_path / "report", [1, 1], BETTER)
    assert promote(config, first, report, INDEX, None, tmp_path / "1").promoted

    bad = INDEX.model_copy(update={"recall": 0.9})
    assert not promote(config, second, report, bad, Rival("1", report), tmp_path / "2").promoted
    done = promote(config, third, report, INDEX, Rival("1", report), tmp_path / "3")
    assert done.promoted
    assert done.reasons == [
        "recall@10 of the index 0.9600 (passes, at least 0.9500 is allowed)",
        "it is the model of champion version 1, exported anew: the index alone counts",
    ]
    # Another model of the same quality is no gain.
    assert not promote(config, other, report, INDEX, Rival("3", report), tmp_path / "4").promoted


@pytest.fixture(scope="module")
def server(world, tracking_server, tiny, tmp_path_factory):
    """The world's export, registered on a real server over HTTP."""
    root = tmp_path_factory.mktemp("server")
    connect(tracking_server)
    run_id = MlflowClient().create_run(mlflow.create_experiment("tiny")).info.run_id
    report = tiny.write_report(root / "evaluation", [1, 2], BETTER)
    registered = register(world.config, world.exported, report, run_id, root / "registration")
    return SimpleNamespace(uri=tracking_server, run_id=run_id, registered=registered)


@pytest.fixture
def store(request, registry):
    """Where two jobs meet; afterwards this process is connected to SQLite again."""
    yield request.getfixturevalue("server") if request.param == "server" else registry
    connect(registry.uri)


@pytest.mark.parametrize(
    ("store", "present"), [("sqlite", ""), ("server", "1")], indirect=["store"]
)
def test_of_two_jobs_at_once_one_wins_and_the_other_is_told(world, store, tiny, tmp_path, present):
    connect(store.uri)
    client = MlflowClient()
    name = f"race {bool(present)}"
    settings = {"model": name, "gate": {"metric": "ndcg@10"}}
    config = world.config.model_copy(
        update={"registry": world.config.registry.model_validate(settings)}
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "index.json").write_text(INDEX.model_dump_json())
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    tiny.write_report(tmp_path / "strong", [1, 1], BETTER)
    client.create_registered_model(name)
    tiny_model = client.get_model_version("tiny", store.registered.model_version)
    made = []
    for n in (1, 2, 3):
        mlflow.register_model(tiny_model.source, name)
        made.append(
            RegisteredModel(
                directory=tmp_path / f"registration {n}", name=name, model_version=str(n),
                uri="", run_id=store.run_id,
            ).save()
        )  # fmt: skip
    if present:
        assert promote(config, made[0], weak, INDEX, None, tmp_path / "promotion 1").promoted
    command = [sys.executable, "-c", PROMOTE, str(tmp_path), store.uri]
    jobs = [subprocess.Popen([*command, number, present]) for number in "23"]
    assert [job.wait(300) for job in jobs] == [0, 0]

    ends = {number: Promotion.load(tmp_path / f"promotion {number}") for number in "23"}
    winners = [number for number, end in ends.items() if end.promoted]
    assert len(winners) == 1
    (winner,) = winners
    loser = ends["3" if winner == "2" else "2"]
    assert resolve(name).version == winner
    assert ends[winner].previous_version == (present or None)
    assert loser.reasons[-1].startswith(
        (f"version {winner} was chosen as", f"the champion is version {winner} now")
    )
    tags = client.get_model_version(name, loser.model_version).tags
    assert tags["gate_promoted"] == "false"
    assert json.loads(tags["gate_check_00"])["value"] == 0.5


def test_a_champion_is_downloaded_over_http(world, server, registry, tiny, tmp_path):
    try:
        connect(server.uri)
        MlflowClient().set_registered_model_alias("tiny", "champion", "1")
        found = champion(world.config, tmp_path)
        ids, _ = tiny.ask(tf.saved_model.load(str(found.path)), [[tiny.item(1)]], k=3)
        assert ids == tiny.ask(world.models["exact"], [[tiny.item(1)]], k=3)[0]
    finally:
        connect(registry.uri)
