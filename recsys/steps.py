"""The steps of a run in their order, and what each leaves in its folder."""

from __future__ import annotations

from recsys.artifacts import (
    EvaluationReport,
    ExportedModel,
    Manifest,
    PreparedData,
    Promotion,
    RegisteredModel,
    Scoring,
    TrainedModel,
    TrainedRanker,
)
from recsys.config import RunConfig

STEPS: dict[str, tuple[str, type[Manifest]]] = {
    "prepare": ("data", PreparedData),
    "fit": ("model", TrainedModel),
    "rank": ("ranking", TrainedRanker),
    "evaluate": ("evaluation", EvaluationReport),
    "export": ("export", ExportedModel),
    "register": ("registration", RegisteredModel),
    "promote": ("promotion", Promotion),
    "score": ("scoring", Scoring),
}


def steps_of(config: RunConfig) -> list[str]:
    """The steps of a run: `rank` is one where the config has a `ranking` section."""
    return [step for step in STEPS if step != "rank" or config.ranking is not None]
