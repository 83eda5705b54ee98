from recsys.run_folder import RunFolder
from recsys.stale import MONITORING, TUNING, invalidate


def test_preparing_again_takes_away_what_was_tuned_on_it(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    folder.step(TUNING).mkdir()
    invalidate(folder, "fit")
    assert folder.step(TUNING).is_dir()
    invalidate(folder, "prepare")
    assert not folder.step(TUNING).exists()


def test_scoring_again_takes_away_what_was_found_of_the_last_scoring(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    folder.step(MONITORING).mkdir()
    scoring = folder.step("scoring")
    scoring.mkdir()
    (scoring / "manifest.json").write_text("{}")
    (scoring / "recommendations").mkdir()
    invalidate(folder, "score")
    assert not folder.step(MONITORING).exists()
    # Answers of users who have not changed may be kept.
    assert [path.name for path in scoring.iterdir()] == ["recommendations"]
    invalidate(folder, "promote")
    assert not scoring.exists()


def test_fitting_again_keeps_what_the_fit_began_with(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    model = folder.step("model")
    for name in ("start", "towers", "checkpoints"):
        (model / name).mkdir(parents=True)
    invalidate(folder, "fit")
    assert len(list(model.iterdir())) == 3, "an interrupted fit goes on from what it has left"
    (model / "manifest.json").write_text("{}")
    invalidate(folder, "fit")
    assert [path.name for path in model.iterdir()] == ["start"]
    # Other data may be of a time that the model has learned.
    invalidate(folder, "prepare")
    assert not model.exists()
