"""Which events train, which validate, and what tests: the rule of `data.split`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from recsys.section import Section


class TimeSplit(Section):
    """Train before `validation_from`, validate before `test_from`, test after (or by days)."""

    kind: Literal["time"]
    by_time: ClassVar[bool] = True
    validation_from: datetime | None = None
    test_from: datetime | None = None
    validation_days: float | None = Field(None, gt=0)
    test_days: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_rule(self) -> TimeSplit:
        if (self.test_from is None) == (self.test_days is None):
            raise ValueError("give exactly one of `test_from` and `test_days`")
        if (self.validation_from is None) == (self.validation_days is None):
            raise ValueError("give exactly one of `validation_from` and `validation_days`")
        return self


class LeaveLastOut(Section):
    """Each user's last event tests, the one before validates, the rest trains."""

    kind: Literal["leave_last_out"]
    by_time: ClassVar[bool] = False


class GivenSplit(Section):
    """A column says train, validation, test, or context (in histories only, never a label)."""

    kind: Literal["given"]
    column: str
    by_time: ClassVar[bool] = False


class HeldOutSplit(Section):
    """The items of `data.held_out` test; each user's last event validates, or all since a time."""

    kind: Literal["held_out"]
    validation_from: datetime | None = None
    validation_days: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_rule(self) -> HeldOutSplit:
        if self.validation_from is not None and self.validation_days is not None:
            raise ValueError("give `validation_from`, `validation_days`, or none of the two")
        return self

    @property
    def by_time(self) -> bool:
        """Whether times of events decide which validate."""
        return self.validation_from is not None or self.validation_days is not None


Split = Annotated[TimeSplit | LeaveLastOut | GivenSplit | HeldOutSplit, Field(discriminator="kind")]
