import pytest
from pydantic import ValidationError

from recsys.model_config import Loss, Train, TwoTowerConfig


def test_heads_divide_the_dimension_where_there_are_heads():
    settings = {"embedding_dim": 10, "history": {"kind": "attention", "num_heads": 4}}
    with pytest.raises(ValidationError, match=r"embedding_dim=10 is not divisible by history\.num"):
        TwoTowerConfig.model_validate(settings)
    TwoTowerConfig.model_validate(settings | {"history": {"kind": "gru", "num_heads": 4}})


def test_only_adam_decays_weights():
    with pytest.raises(ValidationError, match="weight_decay needs optimizer adam, not adagrad"):
        Train(optimizer="adagrad", weight_decay=0.1)
    assert Train(weight_decay=0.1).optimizer == "adam"


def test_a_softmax_has_negatives():
    with pytest.raises(ValidationError, match="in_batch_negatives=false needs num_uniform_neg"):
        Loss(in_batch_negatives=False, num_uniform_negatives=0)
    assert Loss(in_batch_negatives=False, num_uniform_negatives=0, num_popular_negatives=1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_rate_is_below_one(dropout):
    with pytest.raises(ValidationError, match="dropout"):
        TwoTowerConfig(dropout=dropout)
