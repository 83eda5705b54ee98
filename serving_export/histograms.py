"""Histograms of two tables over the same bins, counted in Spark.

A value of a category has a bin of its own where either table has it often enough, the others are
pooled. A number is cut at quantiles of the reference; one that is several of them at once has a bin
of its own too. What is missing, and what the vocabulary of the model lacks, has bins of its own.
Only bins come to the driver.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from serving_export.probes import Probe

MISSING, UNKNOWN, KNOWN, REST = "(missing)", "(unknown)", "(known)", "(rest)"

#: So that no distribution has more than twenty thousand bins.
_SMALLEST_SHARE = 1e-4
_ACCURACY = 10_000


class Cut(NamedTuple):
    """Where one bin of a number ends and the next begins; the value itself lies below or above."""

    value: float
    is_below: bool


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values in each bin, `[bins]`, on both sides; numbers in their order, others by label."""

    labels: Sequence[str]
    reference: Sequence[int]
    today: Sequence[int]

    def unknown(self) -> tuple[float, float]:
        """Share of the values that are not missing which the vocabulary lacks, on both sides."""
        shares = []
        for counts in (self.reference, self.today):
            found = dict(zip(self.labels, counts, strict=True))
            present = sum(counts) - found.get(MISSING, 0)
            shares.append(found.get(UNKNOWN, 0) / present if present else 0.0)
        return shares[0], shares[1]


def histograms(
    probes: Sequence[Probe],
    reference: DataFrame,
    today: DataFrame,
    rows: int,
    bin_rows: int,
    number_bins: int,
) -> dict[str, Histogram]:
    """Count both tables over the same bins.

    Args:
        probes: what to count.
        reference: decides the quantiles.
        today: is compared with it; columns that it lacks are missing values.
        rows: of the smaller table.
        bin_rows: values that it should have in a bin: rarer ones are pooled, and there are no more
            quantiles than leave as many rows in each.
        number_bins: quantiles at most.
    """
    cuts = _cuts(probes, reference, min(number_bins, max(rows // bin_rows, 1)))
    sides = (_counted(reference, probes, cuts, 1), _counted(today, probes, cuts, 0))
    both = sides[0].unionByName(sides[1]).groupBy("probe", "value")
    counts = both.agg(F.sum("reference").alias("reference"), F.sum("today").alias("today"))
    counts = _with_known(counts, probes).persist()
    try:
        totals = counts.groupBy("probe").agg(F.sum("reference"), F.sum("today")).collect()
        needed = {name: _needed(before, now, bin_rows) for name, before, now in totals}
        binned = counts.withColumn("bin", _bin(probes, needed)).groupBy("probe", "bin")
        found = binned.agg(F.sum("reference"), F.sum("today")).collect()
    finally:
        counts.unpersist()
    return {
        probe.name: _histogram([row[1:] for row in found if row[0] == probe.name], cuts, probe)
        for probe in probes
    }


def _values(frame: DataFrame, probe: Probe) -> Column:
    """The array of a row, empty where there is none."""
    column = F.col(f"`{probe.column}`") if probe.column in frame.columns else None
    kind = "double" if probe.is_number else "string"
    if column is None:
        return F.array(F.lit(None).cast(kind))
    return F.coalesce(probe.values(column), F.array().cast(f"array<{kind}>"))


def _cuts(probes: Sequence[Probe], reference: DataFrame, number_bins: int) -> dict[str, list[Cut]]:
    """Inner quantiles of the numbers, rising."""
    numbers = [probe for probe in probes if probe.is_number]
    if not numbers or number_bins < 2:
        return {probe.name: [] for probe in numbers}
    pairs = [_pairs(probe, _values(reference, probe)) for probe in numbers]
    shares = [place / number_bins for place in range(1, number_bins)]
    found = (
        reference.select(F.inline(F.concat(*pairs)))
        .filter(F.col("value").isNotNull() & ~F.isnan("value"))
        .groupBy("probe")
        .agg(F.percentile_approx("value", shares, _ACCURACY).alias("cuts"))
    )
    cuts = {row["probe"]: _around(row["cuts"]) for row in found.collect()}
    return {probe.name: cuts.get(probe.name, []) for probe in numbers}


def _around(quantiles: Sequence[float]) -> list[Cut]:
    """Cut above each quantile, and below those that come twice: so many are equal."""
    twice = {low for low, high in pairwise(quantiles) if low == high}
    return sorted({Cut(q, True) for q in quantiles} | {Cut(q, False) for q in twice})


def _pairs(probe: Probe, values: Column) -> Column:
    name = F.lit(probe.name).alias("probe")
    return F.transform(values, lambda value: F.struct(name, value.alias("value")))


def _counted(
    frame: DataFrame, probes: Sequence[Probe], cuts: Mapping[str, list[Cut]], is_reference: int
) -> DataFrame:
    """Return `probe`, `value`, `reference` and `today`; a number's value is its bin, counted."""
    pairs = [
        _pairs(
            probe,
            F.transform(_values(frame, probe), _place(cuts[probe.name]))
            if probe.is_number
            else F.transform(_values(frame, probe), lambda value: F.when(value != "", value)),
        )
        for probe in probes
    ]
    counts = frame.select(F.inline(F.concat(*pairs))).groupBy("probe", "value").count()
    return counts.select(
        "probe",
        "value",
        (F.col("count") * is_reference).alias("reference"),
        (F.col("count") * (1 - is_reference)).alias("today"),
    )


def _place(cuts: Sequence[Cut]) -> Callable[[Column], Column]:
    """How many cuts are below a number, as text; null where it is missing."""

    def place(value: Column) -> Column:
        below = [
            (value > cut.value if cut.is_below else value >= cut.value).cast("int") for cut in cuts
        ]
        count = functools.reduce(operator.add, below, F.lit(0))
        return F.when(value.isNotNull() & ~F.isnan(value), count.cast("string"))

    return place


def _with_known(counts: DataFrame, probes: Sequence[Probe]) -> DataFrame:
    """Add `known`: whether the vocabulary of the probe has the value, null if it has none."""
    spark = counts.sparkSession
    known = spark.createDataFrame([], "probe string, value string, known boolean")
    for probe in probes:
        if probe.vocabulary is not None:
            lines = spark.read.option("lineSep", "\n").text(str(probe.vocabulary))
            named = lines.select(F.lit(probe.name).alias("probe"), "value", F.lit(True))
            known = known.union(named)
    with_vocabulary = [probe.name for probe in probes if probe.vocabulary is not None]
    has_one = F.col("probe").isin(with_vocabulary)
    joined = counts.join(known, ["probe", "value"], "left")
    return joined.withColumn("known", F.when(has_one, F.coalesce("known", F.lit(False))))


def _needed(before: int, now: int, bin_rows: int) -> tuple[float, float]:
    """How often a value is needed on either side so that the smaller one has `bin_rows` of it."""
    share = max(bin_rows / max(min(before, now), 1), _SMALLEST_SHARE)
    return share * before, share * now


def _bin(probes: Sequence[Probe], needed: Mapping[str, tuple[float, float]]) -> Column:
    """The bin of a value: its own where either side has it often enough."""
    own_ids = [probe.name for probe in probes if probe.is_own_id]
    numbers = [probe.name for probe in probes if probe.is_number]
    enough = F.lit(False)
    for name, (before, now) in needed.items():
        # At least one, or each value would have a bin of its own where a side has none at all.
        often = (F.col("reference") >= max(before, 1.0)) | (F.col("today") >= max(now, 1.0))
        enough = enough | ((F.col("probe") == name) & often)
    return (
        F.when(F.col("value").isNull(), MISSING)
        .when(F.col("probe").isin(numbers), F.col("value"))
        .when(F.col("known").isNotNull() & ~F.col("known"), UNKNOWN)
        .when(F.col("probe").isin(own_ids), KNOWN)
        .when(enough, F.col("value"))
        .otherwise(REST)
    )


def _histogram(
    rows: Sequence[Sequence[object]], cuts: Mapping[str, list[Cut]], probe: Probe
) -> Histogram:
    counts = {str(label): (int(str(a)), int(str(b))) for label, a, b in rows}
    order = sorted(counts, key=lambda label: (not label.isdigit(), label.zfill(6), label))
    labels = order
    if probe.is_number:
        labels = [_range(label, cuts[probe.name]) for label in order]
    return Histogram(labels, [counts[o][0] for o in order], [counts[o][1] for o in order])


def _range(label: str, cuts: Sequence[Cut]) -> str:
    """What a bin of a number holds."""
    if label == MISSING:
        return label
    place, words = int(label), []
    if place > 0:
        low = cuts[place - 1]
        words.append(f"{'above' if low.is_below else 'from'} {low.value:.6g}")
    if place < len(cuts):
        high = cuts[place]
        words.append(f"{'up to' if high.is_below else 'below'} {high.value:.6g}")
    if 0 < place < len(cuts) and cuts[place - 1].value == cuts[place].value:
        return f"{cuts[place].value:.6g}"
    return " ".join(words) or "any"
