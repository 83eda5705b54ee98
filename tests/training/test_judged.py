from types import SimpleNamespace

import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.model_config import Joint
from training.judged import judged_auc, require_judged

JOINT = Joint(positive=("like",))


def test_data_that_cannot_be_learned_from_are_refused(prepared):
    with pytest.raises(ArtifactError, match=r"prepared without model\.joint.*recsys prepare"):
        require_judged(prepared, JOINT)
    counts = {"train": {"like": 2, "dislike": 1}, "recent": {"dislike": 4}}
    told = prepared.model_copy(update={"judged": counts})
    with pytest.raises(ArtifactError, match=r"recent has no judged event.*model\.joint\.positive"):
        require_judged(told, JOINT)
    counts["recent"]["like"] = 1
    require_judged(told, JOINT)


def test_auc_is_that_of_events_whose_items_training_knows():
    def batch(odds, outcome, weight):
        judged = {"odds": odds, "outcome": outcome, "weight": weight}
        return {"judged": {name: tf.constant(v, tf.float32) for name, v in judged.items()}}

    model = SimpleNamespace(log_odds=lambda batch: batch["judged"]["odds"])
    batches = [batch([1, 2, 9], [0, 1, 0], [1, 1, 0]), batch([1.5, 0], [1, 0], [2, 1])]
    assert judged_auc(model, batches) == 1
    assert judged_auc(model, [*batches, batch([3], [0], [1])]) == pytest.approx(2 / 3)
    with pytest.raises(ArtifactError, match=r"all or none of model\.joint\.positive.*data\.split"):
        judged_auc(model, [batch([1, 2, 9], [0, 0, 1], [1, 1, 0])])
