"""Compare a scoring with the data that its model was trained on, and say what has drifted.

The reference of features is the table of users of the training data: their features as they were at
its end, made as those of today are. The reference of recommendations, scores and coverage is what
the same version recommends to (a sample of) these users, so that the model is the same on both
sides and only the users differ.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys.artifacts import ArtifactError, PreparedData, Scoring
from recsys.atomic import replaced
from recsys.config import RunConfig
from recsys.drift import jensen_shannon, psi, psi_terms
from recsys.drift_report import Distribution, DriftReport, Finding, Moved
from recsys.monitoring_config import COVERAGE, Measure, Monitoring
from recsys.summary import drift_table
from serving_export.batch import UNAVAILABLE, score
from serving_export.drift_plot import draw
from serving_export.histograms import Histogram, histograms
from serving_export.probes import answer_probes, feature_probes

logger = logging.getLogger(__name__)

TABLE, PICTURE = "drift.txt", "drift.png"
_MOVED = 5


def monitor(
    config: RunConfig,
    spark: SparkSession,
    reference: PreparedData,
    users: str,
    scoring: Scoring,
    directory: Path,
) -> DriftReport:
    """Measure the drift of a scoring, log each limit that is exceeded, write table and picture.

    Args:
        config: `monitoring`, and what `score` needs.
        spark: session.
        reference: what the version that scored was trained on.
        users: folder of Parquet files: the users that were scored, with their features.
        scoring: what was recommended to them.
        directory: of the report, replaced as a whole; `manifest.json` is written last.

    Returns:
        The report; its `alarms` say what exceeds its limit.

    Raises:
        ArtifactError: the recommendations are not those of `scoring` any more, or the users of the
            reference are gone.
    """
    settings = config.monitoring
    rows = min(reference.num_users, scoring.num_users)
    if rows < 2 * settings.bin_rows:
        logger.warning(
            "%d users are too few to judge numbers and scores by: monitoring.bin_rows=%d",
            rows, settings.bin_rows,
        )  # fmt: skip
    before = _users(spark, reference)
    answers = _answers(spark, scoring)
    with replaced(directory) as folder:
        sample = min(rows, settings.reference_users)
        asked = _ask(config, spark, _sample(before, sample), scoring, folder / "reference")
        sizes = {"bin_rows": settings.bin_rows, "number_bins": settings.number_bins}
        probes = feature_probes(reference)
        today = spark.read.parquet(users)
        found = histograms(probes, before, today, rows, **sizes)
        found |= histograms(answer_probes(), asked, answers, sample, **sizes)
        items = max(reference.corpus.num_items, 1)
        coverage = _distinct(asked) / items, _distinct(_sample(answers, sample)) / items
        with_vocabulary = {probe.name for probe in probes if probe.vocabulary is not None}
        shutil.rmtree(folder / "reference")
        report = DriftReport(
            directory=folder,
            name=scoring.name,
            model_version=scoring.model_version,
            reference=str(reference.directory),
            reference_users=reference.num_users,
            users=scoring.num_users,
            k=scoring.k,
            sample_users=sample,
            coverage=coverage,
            distributions=tuple(_distribution(name, h) for name, h in found.items()),
            findings=(
                *_findings(found, with_vocabulary, settings),
                _coverage_finding(*coverage, settings),
            ),
        )
        (folder / TABLE).write_text(drift_table(report) + "\n", encoding="utf-8")
        draw(report, folder / PICTURE)
        report.save()
    for line in report.alarm_lines():
        logger.warning("drift: %s", line)
    return report.model_copy(update={"directory": directory})


def _users(spark: SparkSession, reference: PreparedData) -> DataFrame:
    folder = reference.directory / reference.users
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is gone, the users of training that today's compare with")
    return spark.read.parquet(str(folder.resolve()))


def _answers(spark: SparkSession, scoring: Scoring) -> DataFrame:
    """Read the recommendations of a scoring, from its folder or its table."""
    folder = scoring.directory / scoring.destination
    answers = (
        spark.read.parquet(str(folder.resolve()))
        if folder.is_dir()
        else spark.table(scoring.destination)
    )
    own = F.count_if(F.col("model_version") == scoring.model_version)
    total, by_this_version = answers.agg(F.count("*"), own).collect()[0]
    if not total == by_this_version == scoring.num_users:
        raise ArtifactError(
            f"{scoring.destination} has {total} rows, {by_this_version} of them by version "
            f"{scoring.model_version}, but {scoring.directory} says {scoring.num_users}: it was "
            "written again since; run `recsys score` again"
        )
    return answers


def _sample(users: DataFrame, size: int) -> DataFrame:
    """The same users of the same table each time, whatever its order."""
    name = F.col("user").cast("string")
    return users.orderBy(F.xxhash64(name), name).limit(size)


def _ask(
    config: RunConfig, spark: SparkSession, users: DataFrame, scoring: Scoring, folder: Path
) -> DataFrame:
    """What the version that scored recommends to other users of what was available then.

    Who is as today is not asked anew.
    """
    logger.info("asking the model what it recommends to users of its training")
    users.write.parquet(str((folder / "users").resolve()))
    listed = scoring.directory / UNAVAILABLE
    same = {"unavailable": str(listed) if listed.is_file() else None}
    wanted = config.scoring.model_copy(update={"k": scoring.k, "table": None} | same)
    asked = score(
        config.model_copy(update={"scoring": wanted}),
        spark,
        str((folder / "users").resolve()),
        folder / "scoring",
        f"{scoring.name}/{scoring.model_version}",
        scoring,
    )
    return spark.read.parquet(str((asked.directory / asked.destination).resolve()))


def _distinct(answers: DataFrame) -> int:
    items = answers.select(F.explode("items").alias("item"))
    return int(items.agg(F.count_distinct("item")).collect()[0][0])


def _distribution(name: str, counted: Histogram) -> Distribution:
    terms = psi_terms(counted.reference, counted.today)
    totals = max(sum(counted.reference), 1), max(sum(counted.today), 1)
    most = [int(place) for place in np.argsort(-terms, kind="stable")[:_MOVED] if terms[place] > 0]
    return Distribution(
        name=name,
        reference_values=sum(counted.reference),
        today_values=sum(counted.today),
        num_bins=len(counted.labels),
        moved=tuple(
            Moved(
                bin=counted.labels[place],
                reference=counted.reference[place] / totals[0],
                today=counted.today[place] / totals[1],
            )
            for place in most
        ),
    )


def _findings(
    found: Mapping[str, Histogram], with_vocabulary: set[str], settings: Monitoring
) -> Iterator[Finding]:
    for name, counted in found.items():
        values: dict[Measure, float] = {
            "psi": psi(counted.reference, counted.today),
            "jensen_shannon": jensen_shannon(counted.reference, counted.today),
        }
        if name in with_vocabulary:
            before, now = counted.unknown()
            values["unknown_rise"] = now - before
        for measure, value in values.items():
            allowed = settings.allowed(name, measure)
            yield Finding(of=name, measure=measure, found=value, allowed=allowed)


def _coverage_finding(before: float, now: float, settings: Monitoring) -> Finding:
    drop = 1 - now / before if before else 0.0
    allowed = settings.allowed(COVERAGE, "coverage_drop")
    return Finding(of=COVERAGE, measure="coverage_drop", found=drop, allowed=allowed)
