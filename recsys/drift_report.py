"""What monitoring found: the manifest of a comparison of today's scoring with the training data."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from recsys.artifacts import Manifest
from recsys.monitoring_config import Measure


class Moved(BaseModel, frozen=True, extra="forbid"):
    """A bin and its share on both sides."""

    bin: str
    reference: float
    today: float

    def __str__(self) -> str:
        return f"{self.bin} {self.reference:.1%} -> {self.today:.1%}"


class Distribution(BaseModel, frozen=True, extra="forbid"):
    """Two histograms that were compared: their values and bins, and the bins that moved most."""

    name: str
    reference_values: int
    today_values: int
    num_bins: int
    moved: tuple[Moved, ...]


class Finding(BaseModel, frozen=True, extra="forbid"):
    """One measure of one distribution, and what is allowed; nothing is asked where it is None."""

    of: str
    measure: Measure
    found: float
    allowed: float | None

    @property
    def exceeds(self) -> bool:
        """Whether the limit is exceeded."""
        return self.allowed is not None and self.found > self.allowed


class DriftReport(Manifest):
    """Made by `monitor`: findings, whether they alarm or not."""

    step: ClassVar[str] = "monitor"

    name: str
    model_version: str
    reference: str = Field(description="folder of the prepared data that were compared with")
    reference_users: int
    users: int
    k: int
    sample_users: int = Field(description="of either side, whose items coverage counts")
    coverage: tuple[float, float] = Field(
        description="share of the corpus that the sample of the reference, of today is recommended"
    )
    distributions: tuple[Distribution, ...]
    findings: tuple[Finding, ...]

    @property
    def alarms(self) -> list[Finding]:
        """Findings above their limits."""
        return [finding for finding in self.findings if finding.exceeds]

    def alarm_lines(self) -> list[str]:
        """A line for each limit that is exceeded: measure, found, allowed, what moved most."""
        moved = {d.name: "; ".join(map(str, d.moved[:3])) for d in self.distributions}
        return [
            f"{a.measure} of {a.of}: found {a.found:.4f}, allowed {a.allowed:.4f}"
            + (f" ({moved[a.of]})" if moved.get(a.of) else "")
            for a in self.alarms
        ]
