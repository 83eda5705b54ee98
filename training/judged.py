"""How well the ranking head of a joint training tells the judged events of validation apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recsys.artifacts import ArtifactError, PreparedData
from recsys.binary_metrics import auc
from recsys.judged import missing_judgements
from recsys.model_config import Joint
from recsys.models.joint import JointTwoTower
from training.progress import advance


def require_judged(data: PreparedData, joint: Joint) -> None:
    """Refuse data that a ranking head cannot learn from.

    Raises:
        ArtifactError: they were prepared without `model.joint`, or a split lacks events that are
            positive, or such that are not.
    """
    if not data.judged:
        raise ArtifactError(
            f"{data.directory} was prepared without model.joint, so it does not tell of which type "
            "events are: run `recsys prepare` again with the section, in a new run folder"
        )
    missing = missing_judgements(data.judged, joint.positive)
    if missing:
        raise ArtifactError(f"{data.directory}: {missing}: change model.joint.positive")


def judged_auc(model: JointTwoTower, batches: Iterable[Mapping[str, Any]]) -> float:
    """AUC of the head over the judged events of encoded batches whose items training knows.

    Raises:
        ArtifactError: all that is left are positive, or none.
    """
    outcomes, odds = [], []
    for batch in batches:
        counts = batch["judged"]["weight"].numpy() > 0
        odds.append(model.log_odds(batch).numpy()[counts])
        outcomes.append(batch["judged"]["outcome"].numpy()[counts] > 0)
        advance()
    found = auc(np.concatenate(outcomes), np.concatenate(odds))
    if np.isnan(found):
        raise ArtifactError(
            "of the validation window's judged events, those of items that training knows are all "
            "or none of model.joint.positive, so there is no AUC: lengthen the window in data.split"
        )
    return found
