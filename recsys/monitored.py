"""Watch the scoring of a run: find what its model learned from, compare, tell MLflow."""

from __future__ import annotations

import logging
from pathlib import Path

from recsys.artifacts import MANIFEST, ArtifactError, PreparedData, Scoring
from recsys.drift_report import DriftReport
from recsys.pipeline import Run
from recsys.registered import connect_registry
from recsys.run_folder import RunFolder
from recsys.stale import MONITORING
from recsys.steps import STEPS

logger = logging.getLogger(__name__)


def monitored(run: Run, reference: Path | None) -> DriftReport | None:
    """Compare the scoring of a run with the data of the version that scored; log to its MLflow run.

    Args:
        run: scored.
        reference: folder of the run whose data to compare with; when not given, of the run that
            made the version.

    Returns:
        The report, None where there is no champion and so nothing was scored.

    Raises:
        ArtifactError: nothing was scored although there is a champion, or the data of its run are
            not where they were.
    """
    from serving_export.monitor import PICTURE, TABLE, monitor
    from serving_export.registry import find_champion

    connect_registry(run.config, run.folder.path)
    name = run.config.registry.model
    if not Scoring.exists(run.directory("score")) and find_champion(name) is None:
        logger.warning("nothing is monitored: no version of the model has passed the gate yet")
        return None
    scoring, data = run.load("score", Scoring), run.load("prepare", PreparedData)
    theirs = _training_data(scoring, reference)
    logger.info("comparing with %s", theirs.directory)
    users = str((data.directory / data.users).resolve())
    with run.tracked():
        directory = run.folder.step(MONITORING)
        report = monitor(run.config, run.spark, theirs, users, scoring, directory)
        run.tracker.log_metrics(_metrics(report))
        for file in (MANIFEST, TABLE, PICTURE):
            run.tracker.log_artifact(directory / file, MONITORING)
    return report


def _training_data(scoring: Scoring, reference: Path | None) -> PreparedData:
    from serving_export.lineage import lineage
    from serving_export.registry import ModelVersion

    step = STEPS["prepare"][0]
    if reference is not None:
        return PreparedData.load(RunFolder(reference).step(step))
    found = lineage(ModelVersion(scoring.name, scoring.model_version))
    folder = RunFolder(Path(found.provenance.tags.get("recsys.run_dir", ""))).step(step)
    if not PreparedData.exists(folder):
        raise ArtifactError(
            f"{found.model.uri} was trained on the data in {folder}, which are gone: keep the run "
            "folder of a champion, or name a copy of it by --reference"
        )
    data, learned = PreparedData.load(folder), found.provenance.data
    if data.created_at != learned.created_at:
        raise ArtifactError(
            f"{found.model.uri} was trained on data of {learned.created_at:%Y-%m-%d %H:%M}, but "
            f"{folder} was prepared again at {data.created_at:%Y-%m-%d %H:%M}: give each run a "
            "folder of its own, or name a copy of the old one by --reference"
        )
    return data


def _metrics(report: DriftReport) -> dict[str, float]:
    """By measure and distribution, to be charted over the runs of many nights."""
    found = {f"drift/{f.measure}/{f.of}": f.found for f in report.findings}
    return found | {"drift/alarms": len(report.alarms), "drift/coverage": report.coverage[1]}
