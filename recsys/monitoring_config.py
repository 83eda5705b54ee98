"""The config of monitoring: how far today's scoring may be from the data of its model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recsys.schema import Feature, Schema
from recsys.section import Section

#: What two distributions are compared by, and coverage.
Measure = Literal["psi", "jensen_shannon", "unknown_rise", "coverage_drop"]

ITEMS, SCORES, COVERAGE = "recommended.items", "recommended.scores", "recommended.coverage"


class Monitoring(Section):
    """Limits of drift; null is measured and never alarms."""

    psi: float | None = Field(0.25, gt=0, description="population stability index")
    jensen_shannon: float | None = Field(0.2, gt=0, description="distance, at most 1")
    unknown_rise: float | None = Field(
        0.1, ge=0, description="of the share of values that the vocabulary lacks, absolute"
    )
    coverage_drop: float | None = Field(
        0.2, ge=0, description="of the number of items that are recommended, relative"
    )
    of: dict[str, dict[Measure, float | None]] = Field(
        {}, description="other limits of one distribution: a query feature, recommended.scores, .."
    )
    bin_rows: int = Field(
        50, ge=1, description="values that a bin should have; rarer ones are pooled"
    )
    number_bins: int = Field(10, ge=2, description="quantiles of a number, at most")
    reference_users: int = Field(
        20_000, ge=1, description="users of training that are scored to compare with, at most"
    )

    def allowed(self, name: str, measure: Measure) -> float | None:
        """Limit of one measure of one distribution."""
        limit: float | None = self.of.get(name, {}).get(measure, getattr(self, measure))
        return limit

    def check_names(self, schema: Schema) -> None:
        """Refuse limits of distributions that there are not.

        Raises:
            ValueError: naming the key and what there is.
        """
        names = [name for feature in schema.query for name in distributions_of(feature)]
        names += [ITEMS, SCORES, COVERAGE]
        unknown = sorted(set(self.of) - set(names))
        if unknown:
            raise ValueError(
                f"monitoring.of.{unknown[0]}: there is no such distribution; "
                f"there are {', '.join(names)}"
            )


def distributions_of(feature: Feature) -> tuple[str, ...]:
    """Names of the distributions that a query feature is watched by."""
    if feature.kind == "history":
        return feature.name, f"{feature.name}.length"
    # The day of the week would be that of the scoring.
    told = {"time": ".hour", "vector": ".norm", "text": ".words"}
    return (f"{feature.name}{told.get(feature.kind, '')}",)
