"""What `recsys tune` varies: dotted config keys, and where their values are drawn from."""

from __future__ import annotations

from pydantic import Field, JsonValue, model_validator

from recsys.section import Section


class Distribution(Section):
    """Where one value is drawn from: an interval, whole numbers if both ends are, or a list."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = Field(False, description="draw the logarithm evenly")
    choices: tuple[JsonValue, ...] = ()

    @model_validator(mode="after")
    def _one_rule(self) -> Distribution:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("give either `low` and `high`, or `choices`")
        if self.choices and (self.log or self.low is not None or self.high is not None):
            raise ValueError("`choices` have no `low`, `high` or `log`")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"`low` {self.low} must be below `high` {self.high}")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"`log` needs `low` above 0, got {self.low}")
        return self

    @property
    def whole(self) -> bool:
        """Whether an interval holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: JsonValue) -> bool:
        """Whether the value could be drawn."""
        if self.low is None or self.high is None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high

    @property
    def extremes(self) -> tuple[JsonValue, ...]:
        """Values that the config must accept for it to accept all of them."""
        return self.choices or (self.low, self.high)


class Tune(Section):
    """A study: how many trials, over which settings."""

    trials: int = Field(20, ge=1, description="in all: a study that has fewer goes on")
    timeout_minutes: float | None = Field(
        None, gt=0, description="begin no further trial after it, counted from each start"
    )
    startup_trials: int = Field(
        5, ge=1, description="finished trials before the sampler learns and the pruner prunes"
    )
    space: dict[str, Distribution] = Field(
        {}, description="by dotted key, such as train.learning_rate"
    )
