import shutil

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError, PreparedData
from recsys.models.transfer import take_over
from recsys.overrides import with_values
from training.fit import _Inputs

NEW = "brand new"


@pytest.fixture(scope="module")
def earlier(config, prepared, tmp_path_factory):
    """A model of the planted data, and its towers."""
    inputs = _Inputs(config, prepared)
    model = inputs.build_model([prepared.train])
    for variable in model.trainable_variables:
        # As training would: also what is initialised with zeros differs from a new model.
        variable.assign_add(tf.random.stateless_normal(variable.shape, [1, 2], stddev=0.1))
    folder = tmp_path_factory.mktemp("earlier") / "towers"
    model.towers.save(folder)
    return inputs, model, folder


@pytest.fixture(scope="module")
def later(prepared, tmp_path_factory):
    """The same data, but for the vocabulary of items: in another order, one gone, one new."""
    folder = tmp_path_factory.mktemp("later") / "data"
    shutil.copytree(prepared.directory, folder)
    file = folder / prepared.vocabularies["item_id"].path
    items = file.read_text(encoding="utf-8").splitlines()
    file.write_text("".join(f"{item}\n" for item in [NEW, *reversed(items[1:])]), encoding="utf-8")
    return PreparedData.load(folder), items


def table(model, name):
    return next(v for v in model.trainable_variables if f"{name}/embeddings" in v.name)


def test_rows_follow_their_values_and_layers_their_place(config, earlier, later):
    old_inputs, old, towers = earlier
    data, items = later
    inputs = _Inputs(with_values(config, {"seed": 7}), data)
    model = inputs.build_model([data.train])
    untouched = table(model, "item_id").numpy()

    taken = take_over(model, inputs.encoder, towers)

    rows = table(model, "item_id").numpy()
    was = table(old, "item_id").numpy()
    old_row = {v: n for n, v in enumerate(old_inputs.encoder.vocabulary("item_id"))}
    for row, value in enumerate(inputs.encoder.vocabulary("item_id")):
        np.testing.assert_array_equal(
            rows[row], untouched[row] if value == NEW else was[old_row[value]]
        )
    assert taken.rows["item_id"] == (len(rows) - 1, len(rows))
    assert taken.fresh == ()
    # All that an item or a query is made of is what it was, but for the one that is gone.
    gone = old.embed_corpus().numpy(), model.embed_corpus().numpy()
    kept = [n for n, item in enumerate(inputs.corpus.item) if item.decode() != items[0]]
    np.testing.assert_allclose(gone[1][kept], gone[0][kept], atol=1e-6)
    raw = {
        "user_id": tf.constant(["u3"]),
        "clicked": tf.constant([1_600_000_000_000_000], tf.int64),
    }
    raw["history"] = tf.constant([[items[5], items[9], "", "", ""]])
    answers = [m.embed_queries(i.encoder(raw)) for m, i in ((old, old_inputs), (model, inputs))]
    for name, value in answers[0].items():
        np.testing.assert_allclose(answers[1][name], value, atol=1e-6, err_msg=name)


def test_what_has_no_counterpart_begins_anew(config, prepared, earlier):
    hidden = with_values(config, {"model.hidden": [4]})
    inputs = _Inputs(hidden, prepared)
    model = inputs.build_model([prepared.train])
    taken = take_over(model, inputs.encoder, earlier[2])
    assert taken.fresh
    assert all("layers" in name for name in taken.fresh)
    assert "item_id, " in str(taken)
    assert "; anew: query/layers/0/kernel" in str(taken)


def test_without_towers_nothing_is_taken_over(config, prepared, earlier, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be loaded as a SavedModel"):
        take_over(earlier[1], earlier[0].encoder, tmp_path)


def test_neighbours_are_those_of_the_new_data_and_their_gain_is_taken(
    config, prepared, later, tmp_path
):
    config = with_values(config, {"model.num_neighbours": 2})
    data, _ = later
    old = _Inputs(config, prepared).build_model([prepared.train])
    gain(old).assign(0.3)
    old.towers.save(tmp_path / "towers")
    inputs = _Inputs(config, data)
    model = inputs.build_model([data.train])
    near = np.ones([inputs.encoder.vocabulary_sizes()["item_id"], 2], np.int64)
    model.connect(near)
    take_over(model, inputs.encoder, tmp_path / "towers")
    assert gain(model).numpy() == pytest.approx(0.3)
    np.testing.assert_array_equal(model.candidate_tower.items._neighbours, near)


def gain(model):
    return next(v for v in model.trainable_variables if "neighbour_gain" in v.name)
