import numpy as np
import pytest
import tensorflow as tf

from recsys.features import FeatureEmbedding
from recsys.model_config import TwoTowerConfig
from recsys.models.dropout import Dropouts
from recsys.models.towers import CandidateTower, ItemEmbedding, QueryTower
from recsys.schema import Schema

DIM = 8
ITEM = {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"}
HISTORY = {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3}
KIND = {"name": "kind", "side": "candidate", "kind": "category"}
COUNTRY = {"name": "country", "side": "query", "kind": "category"}
ITEMS = tf.constant([[3, 4, 0], [0, 0, 0], [2, 1, 4]], tf.int64)
KINDS = tf.constant([0, 1, 2, 1, 2], tf.int64)  # of the five rows of the item's vocabulary


def towers(features, repeats=False, **settings):
    tf.keras.utils.set_random_seed(1)
    schema = Schema.model_validate({"features": features})
    config = TwoTowerConfig.model_validate(
        {"embedding_dim": DIM, "dropout": 0.0, "history": {"kind": "mean"}} | settings
    )
    dropouts = Dropouts(0.0, 1, tf.Variable(0, dtype=tf.int64))
    sizes = {"item_id": 5, "kind": 3, "country": 4}
    embedding = FeatureEmbedding(schema, sizes, DIM)
    known = {"kind": KINDS} if "kind" in [f.name for f in schema.features] else {}
    dropped = (dropouts(config.id_dropout), dropouts(config.id_dropout))
    items = ItemEmbedding(schema, embedding, config, known, dropped)
    query = QueryTower(schema, embedding, items, config, dropouts, repeats)
    return query, CandidateTower(items, config, dropouts()), items


def test_a_single_event_lies_at_its_item():
    query, candidate, _ = towers([HISTORY, ITEM])
    found = query({"history": tf.constant([[3, 0, 0]], tf.int64)})["embedding"]
    item = candidate({"item_id": tf.constant([3], tf.int64)})
    np.testing.assert_allclose(found, item, rtol=1e-5)
    np.testing.assert_allclose(tf.norm(item, axis=1), [1.0], rtol=1e-5)


def test_an_empty_history_gives_zeros_and_a_country_something():
    query, _, _ = towers([HISTORY, ITEM])
    assert not query({"history": ITEMS})["embedding"].numpy()[1].any()
    query, _, _ = towers([HISTORY, ITEM, COUNTRY])
    encoded = {"history": ITEMS, "country": tf.constant([1, 2, 3], tf.int64)}
    assert query(encoded)["embedding"].numpy()[1].any()


def test_without_histories_the_other_features_ask():
    query, _, _ = towers([ITEM, COUNTRY])
    found = query({"country": tf.constant([1, 2], tf.int64)})
    assert set(found) == {"embedding"}
    assert found["embedding"].shape == (2, DIM)


def test_histories_list_items_with_their_features():
    _, candidate, items = towers([HISTORY, ITEM, KIND], loss={"normalize": False})
    listed = items.history(tf.constant([[3, 2]], tf.int64))
    features = {"item_id": tf.constant([3, 2], tf.int64), "kind": tf.constant([1, 2], tf.int64)}
    np.testing.assert_allclose(listed[0], candidate(features), rtol=1e-5)


def test_dropped_ids_become_the_unknown_one():
    _, _, items = towers([HISTORY, ITEM], id_dropout=0.99)
    ids = tf.constant([0, 3, 4], tf.int64)
    served = items({"item_id": ids}).numpy()
    trained = items({"item_id": ids}, training=True).numpy()
    np.testing.assert_allclose(trained[0], served[0])
    np.testing.assert_allclose(trained[1], trained[2])
    assert not np.allclose(trained[1], served[1])


@pytest.mark.parametrize("repeats", [False, True])
def test_repeats_are_told_where_the_tower_has_them(repeats):
    query, _, _ = towers([HISTORY, ITEM], repeats)
    found = query({"history": ITEMS})
    assert ("repeat" in found) == repeats
    if repeats:
        assert found["repeat"].shape == (3, 3)


def test_neighbours_join_an_item_in_both_towers():
    _, candidate, items = towers(
        [HISTORY, ITEM], loss={"normalize": False}, num_neighbours=2, id_dropout=0.99
    )
    ids = {"item_id": tf.constant([0, 1, 2, 3, 4, 3], tf.int64)}
    own = candidate(ids).numpy()
    near = np.zeros([5, 2], np.int64)
    near[3] = [2, 4]
    near[4] = [2, 0]
    items.connect(near)
    (gain,) = (v for v in items.trainable_variables if "gain" in v.name)
    gain.assign(0.5)
    found = candidate(ids).numpy()
    expected = own.copy()
    expected[3] += 0.5 * (own[2] + own[4]) / 2
    expected[4] += 0.5 * own[2]
    expected[5] = expected[3]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    listed = items.history(tf.constant([[3, 3, 0], [4, 1, 0]], tf.int64)).numpy()
    np.testing.assert_allclose(listed[0], expected[[3, 3, 0]], rtol=1e-5)
    np.testing.assert_allclose(listed[1], expected[[4, 1, 0]], rtol=1e-5)
    # Nothing is told of a dropped id: a new item has no neighbours.
    np.testing.assert_allclose(candidate(ids, training=True)[3], own[1], rtol=1e-5)


def test_without_neighbours_there_is_nothing_to_connect():
    _, _, items = towers([HISTORY, ITEM])
    with pytest.raises(ValueError, match=r"model\.num_neighbours is 0"):
        items.connect(np.zeros([5, 2], np.int64))
