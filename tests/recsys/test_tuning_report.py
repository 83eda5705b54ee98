import pytest
from pydantic import ValidationError

from recsys.artifacts import ArtifactError
from recsys.tuning_report import TrialReport, TuningReport

TRIAL = {
    "number": 3,
    "state": "complete",
    "value": 0.2,
    "epochs": 4,
    "overrides": ["train.epochs=4"],
}


def test_a_study_is_read_as_it_was_written(tmp_path):
    trial = TrialReport(**TRIAL)
    report = TuningReport(
        directory=tmp_path,
        study="s",
        monitor="ndcg@20",
        best_trial=3,
        best_value=0.2,
        best_overrides=trial.overrides,
        best_model="trial-0003",
        trials=[trial],
    )
    with pytest.raises(ArtifactError, match="run `recsys tune` first"):
        TuningReport.load(tmp_path)
    assert TuningReport.load(report.save().directory) == report


def test_a_trial_is_complete_pruned_or_failed():
    with pytest.raises(ValidationError, match="'complete', 'pruned' or 'failed'"):
        TrialReport(**TRIAL | {"state": "running"})
