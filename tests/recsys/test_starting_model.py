from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from recsys.artifacts import ArtifactError, TrainedModel
from recsys.config import ConfigError, load_config
from recsys.opened import config_file
from recsys.overrides import with_values
from recsys.starting_model import check_fits, check_learned_before

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def config():
    return load_config(config_file("eshop_clothing"), ["train.warm_start=champion"])


def trained(config, **changes):
    return TrainedModel(
        towers="towers",
        features=config.schema_,
        embedding_dim=config.model.embedding_dim,
        best_epoch=1,
        monitor="ndcg@20",
        curves={},
        mlflow_run_id=None,
        versions={},
        **{"model": config.model, "learned_until": NOON} | changes,
    )


def test_other_rates_and_layers_fit(config):
    values = {"model.dropout": 0.4, "model.hidden": [7], "model.history.num_heads": 4}
    check_fits("models:/shop/3", trained(config), with_values(config, values))


@pytest.mark.parametrize(
    ("key", "now", "was"),
    [
        ("embedding_dim", 32, 128),
        ("history.kind", "mean", "gru"),
        ("num_neighbours", 5, 0),
        ("share_item_embeddings", False, True),
        ("loss.normalize", False, True),
    ],
)
def test_a_key_that_decides_what_weights_mean_is_named(config, key, now, was):
    other = with_values(config, {f"model.{key}": now})
    told = (
        rf"model\.{key}={now} does not fit models:/shop/3 .*which has {was}: set model\.{key}={was}"
    )
    with pytest.raises(ConfigError, match=told):
        check_fits("models:/shop/3", trained(config), other)


def test_heads_of_attention_are_named(config):
    attentive = with_values(config, {"model.history.kind": "attention"})
    other = with_values(attentive, {"model.history.num_heads": 4})
    with pytest.raises(ConfigError, match=r"model\.history\.num_heads=4 does not fit .* has 2"):
        check_fits("models:/shop/3", trained(attentive), other)


def test_other_features_are_named(config):
    tree = config.model_dump()
    tree["features"] = [f | {"dim": 5} if f["name"] == "page" else f for f in tree["features"]]
    other = config.model_validate(tree)
    with pytest.raises(
        ConfigError, match=r"`features` differ .*: 'page'\.dim was 8, is 5\. Put th"
    ):
        check_fits("models:/shop/3", trained(config), other)


def test_a_model_of_unknown_settings_is_refused(config):
    with pytest.raises(ConfigError, match=r"runs/old \(train\.warm_start=champion\) does not tell"):
        check_fits("runs/old", trained(config, model=None), config)


@pytest.mark.parametrize("until", [None, NOON, NOON + timedelta(days=1)])
def test_labels_of_the_validation_window_must_not_have_been_learned(config, until):
    data = SimpleNamespace(directory="data", validation=SimpleNamespace(first_at=NOON))
    with pytest.raises(
        ArtifactError, match=r"has learned labels until .* data validates from 2024"
    ):
        check_learned_before("models:/shop/3", trained(config, learned_until=until), config, data)


def test_earlier_labels_may_have_been_learned_and_other_splits_have_no_window(config):
    data = SimpleNamespace(directory="data", validation=SimpleNamespace(first_at=NOON))
    before = trained(config, learned_until=NOON - timedelta(seconds=1))
    check_learned_before("models:/shop/3", before, config, data)
    tree = config.model_dump()
    tree["data"]["split"] = {"kind": "leave_last_out"}
    check_learned_before("models:/shop/3", trained(config), config.model_validate(tree), data)
