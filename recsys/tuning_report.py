"""What tuning found: the manifest of a study."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from recsys.artifacts import Manifest


class TrialReport(BaseModel, frozen=True, extra="forbid"):
    """One trial of a study; its value is that of its best epoch on the validation split."""

    number: int
    state: Literal["complete", "pruned", "failed"]
    value: float | None
    epochs: int
    overrides: list[str] = Field(description="a.b=c; empty for the config as it is")


class TuningReport(Manifest):
    """Made by `tune`: the settings of the best trial, and all trials."""

    step: ClassVar[str] = "tune"

    study: str
    monitor: str
    best_trial: int
    best_value: float
    best_overrides: list[str] = Field(description="a.b=c, as `--set` takes them")
    best_model: str = Field(description="folder of the best trial's model, which is not refitted")
    trials: list[TrialReport] = Field(description="by falling value")
