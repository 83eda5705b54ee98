"""The config of the end of the list: how what was ranked becomes what is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recsys.section import Section

#: What an answer has beside ids and scores where it explores.
PROPENSITIES = "propensities"


class Diversity(Section):
    """Maximal marginal relevance: an item gives way to one less like those above it."""

    relevance: float = Field(
        0.7, ge=0, le=1, description="lambda of MMR; the rest of 1 weighs likeness to items above"
    )
    pool: int = Field(100, ge=2, description="best candidates that are ordered so")


class _Slots(Section):
    """The last places of each list, filled by chance."""

    slots: int = Field(1, ge=1, description="places at the end of a list")
    pool: int = Field(100, ge=2, description="best candidates that may come into them")
    seed: int | None = Field(
        None, ge=0, description="of the draws, which each load begins anew; for tests alone"
    )

    @model_validator(mode="after")
    def _room(self) -> _Slots:
        if self.pool <= self.slots:
            raise ValueError(f"pool={self.pool} leaves slots={self.slots} nothing to choose from")
        return self


class EpsilonGreedy(_Slots):
    """Mostly the next best, sometimes any candidate."""

    kind: Literal["epsilon_greedy"]
    epsilon: float = Field(0.1, gt=0, le=1, description="chance that all candidates share alike")


class Thompson(_Slots):
    """The best by scores that are drawn around those of the model."""

    kind: Literal["thompson"]
    scale: float = Field(1.0, gt=0, description="of the Gumbel noise of a score, in its units")


Exploration = Annotated[EpsilonGreedy | Thompson, Field(discriminator="kind")]
