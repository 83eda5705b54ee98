import pytest
from pydantic import ValidationError

from recsys.config import ConfigError, load_config
from recsys.model_config import Loss, Train, TwoTowerConfig

SHOP = """
name: shop
data:
  events: {path: clicks.csv, format: csv, columns: {user: u, item: i, time: t, event: e}}
  event_types: {like: {}, dislike: {label: false}}
  split: {kind: time, validation_days: 1, test_days: 1}
features:
  - {name: history, side: query, kind: history, of: item_id}
  - {name: item_id, side: candidate, kind: id, column: item}
registry: {model: shop}
"""
JOINT = "model.joint={positive: [like], weight: 0.5}"
ITEM = "{name: item_id, side: candidate, kind: id, column: item}"
EVENT = "{name: event, side: query, kind: category}"


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


def test_neighbours_and_recency_need_events_that_tell_of_them(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text(SHOP)
    assert load_config(file, ["model.num_neighbours=3"]).model.num_neighbours == 3
    without = f"features=[{ITEM}, {EVENT}]"
    with pytest.raises(ConfigError, match=r"model\.num_neighbours counts .* history that lists"):
        load_config(file, ["model.num_neighbours=3", without])
    split = "{kind: time, validation_days: 1, test_days: 1}"
    file.write_text(SHOP.replace("time: t", "order: [t]").replace(split, "{kind: leave_last_out}"))
    with pytest.raises(ConfigError, match=r"recency_half_life_days needs data\.events\.columns"):
        load_config(file, ["model.loss.recency_half_life_days=3"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model.joint={positive: [liked]}"], r"'liked' is none of data\.event_types, which are"),
        (["model.joint={positive: [like, dislike]}"], r"names all of data\.event_types"),
        (["model.joint={positive: []}"], r"model\.joint\.positive"),
        ([JOINT, "model.joint.weight=0", "model.joint.retrieval_weight=0"], "are both 0"),
        ([JOINT, "model.joint.retrieval_weight=0"], r"set train\.monitor=auc"),
        (["train.monitor=auc"], r"add `model\.joint`"),
        ([JOINT, f"features=[{ITEM}, {EVENT}]"], r"features: 'event' is what model\.joint calls"),
    ],
)
def test_a_joint_training_needs_events_that_differ(tmp_path, settings, told):
    file = tmp_path / "shop.yaml"
    file.write_text(SHOP)
    assert load_config(file, [JOINT]).model.joint.hidden == (64,)
    with pytest.raises(ConfigError, match=told):
        load_config(file, settings)
