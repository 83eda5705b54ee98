import pytest

from recsys.artifacts import MANIFEST, ArtifactError
from recsys.config import ConfigError
from recsys.opened import config_file, continue_run, ready_configs, start_run
from recsys.steps import STEPS


@pytest.fixture
def finished(tmp_path):
    """A run of the sample data whose steps all left a manifest."""
    folder = tmp_path / "run"
    start_run("eshop_clothing", [], folder)
    for name, _ in STEPS.values():
        (folder / name).mkdir()
        (folder / name / MANIFEST).write_text("{}")
    return folder


def left(folder):
    return [step for step, (name, _) in STEPS.items() if (folder / name / MANIFEST).exists()]


def test_a_ready_config_is_found_by_its_name_and_a_file_by_its_path(tmp_path):
    assert config_file("eshop_clothing") in ready_configs()
    mine = tmp_path / "mine.yaml"
    assert config_file(str(mine)) == mine
    with pytest.raises(
        ConfigError, match=r"no config 'eshop': give a YAML file, or one of .*eshop_"
    ):
        config_file("eshop")


def test_the_same_settings_leave_all_that_is_finished(finished):
    start_run("eshop_clothing", ["scoring.k=3"], finished)
    assert continue_run(finished, ["monitoring.psi=0.5"]).config.scoring.k == 3
    assert left(finished) == list(STEPS)


def test_settings_of_export_take_away_what_was_exported(finished):
    run = continue_run(finished, ["export.availability=true"], "export")
    assert run.config.export.availability
    assert continue_run(finished).config == run.config
    assert left(finished) == ["prepare", "fit", "rank", "evaluate"]


def test_a_gate_takes_away_the_decision(finished):
    continue_run(finished, ["registry.gate.max_slice_drop=0.5"], "promote")
    assert left(finished) == ["prepare", "fit", "rank", "evaluate", "export", "register"]


@pytest.mark.parametrize("step", ["register", "promote", "score", None])
def test_a_later_step_does_not_take_away_what_it_needs(finished, step):
    with pytest.raises(ConfigError, match=r"overfetch was 10, now 9: export reads this first"):
        continue_run(finished, ["export.overfetch=9"], step)
    assert left(finished) == list(STEPS)


def test_a_run_with_another_config_takes_nothing_away(finished):
    changed = ["export.availability=true", "registry.gate.max_slice_drop=0.5"]
    with pytest.raises(ConfigError, match=r"has finished export, register, promote, score with"):
        start_run("eshop_clothing", changed, finished)
    assert left(finished) == list(STEPS)
    assert not continue_run(finished).config.export.availability


def test_a_run_that_failed_to_export_goes_on_with_another_target(finished):
    for step in ("export", "register", "promote", "score"):
        (finished / STEPS[step][0] / MANIFEST).unlink()
    run = start_run("eshop_clothing", ["export.index.min_recall=0.5"], finished)
    assert run.config.export.index.min_recall == 0.5
    assert left(finished) == ["prepare", "fit", "rank", "evaluate"]


def test_an_optional_section_is_added_and_a_path_is_from_here(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [
        "export.exploration={kind: epsilon_greedy, slots: 2}",
        "scoring.unavailable=out.csv",
    ]
    run = continue_run(finished, settings, "export")
    assert run.config.export.exploration.slots == 2
    assert run.config.scoring.unavailable == str(tmp_path / "out.csv")


def test_settings_of_the_training_are_refused_and_nothing_is_lost(finished):
    both = ["train.epochs=3", "export.availability=true"]
    with pytest.raises(ConfigError, match=r"train\.epochs was 8, now 3"):
        continue_run(finished, both, "export")
    with pytest.raises(ConfigError, match=r"train\.epochs was 8, now 3"):
        start_run("eshop_clothing", both, finished)
    assert left(finished) == list(STEPS)
    assert not continue_run(finished).config.export.availability


def test_a_folder_without_a_run_is_not_continued(tmp_path):
    with pytest.raises(ArtifactError, match="start with `recsys run`"):
        continue_run(tmp_path, ["export.availability=true"])
