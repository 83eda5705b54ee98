import pytest
from pydantic import ValidationError

from recsys.schema import Feature, Schema

ITEM = Feature(name="item_id", side="candidate", kind="id", column="item")
HISTORY = Feature(name="history", side="query", kind="history", of="item_id")


def test_sides_are_split_and_order_is_kept():
    country = Feature(name="country", side="context", kind="category")
    schema = Schema(features=(country, ITEM, HISTORY))
    assert [f.name for f in schema.query] == ["country", "history"]
    assert [f.name for f in schema.candidate] == ["item_id"]
    assert [f.name for f in schema.vocabularies] == ["country", "item_id"]
    assert schema.item_histories == (HISTORY,)


def test_round_trip_keeps_the_fingerprint():
    schema = Schema(features=(HISTORY, ITEM))
    again = Schema.model_validate_json(schema.model_dump_json())
    assert again == schema
    assert again.fingerprint == schema.fingerprint


@pytest.mark.parametrize(
    "change", [{"length": 7}, {"side": "candidate", "kind": "category", "of": None}]
)
def test_any_change_changes_the_fingerprint(change):
    other = Feature.model_validate(HISTORY.model_dump() | change)
    schema = Schema(features=(HISTORY, ITEM))
    query = Feature(name="q", side="query", kind="number")
    changed = Schema(features=(other, ITEM, query))
    assert changed.fingerprint != schema.fingerprint


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((HISTORY,), "which is no id or category feature"),
        ((ITEM, ITEM, HISTORY), r"given twice: \['item_id'\]"),
        ((ITEM,), "at least one query or context and one candidate"),
    ],
)
def test_inconsistent_schemas_are_refused(features, message):
    with pytest.raises(ValidationError, match=message):
        Schema(features=features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "label", "side": "query", "kind": "number"}, "reserved name"),
        ({"name": "as_shown_price", "side": "query", "kind": "number"}, "begin with 'as_shown_'"),
        ({"name": "h", "side": "query", "kind": "history"}, "`of` names the feature"),
        ({"name": "h", "side": "context", "kind": "history", "of": "x"}, "belongs to side query"),
        ({"name": "a b", "side": "query", "kind": "number"}, "pattern"),
        ({"name": "v", "side": "query", "kind": "vector"}, "a vector needs `dim`"),
        ({"name": "c", "side": "query", "kind": "id", "encoder": "e"}, "belongs to kind text"),
        ({"name": "t", "side": "query", "kind": "text", "encoder": "e", "dim": 4}, "its own `dim`"),
        ({"name": "t", "side": "query", "kind": "text", "encoder": "e", "ngrams": 2}, "`ngrams`"),
        ({"name": "n", "side": "query", "kind": "number", "ngrams": 2}, "`ngrams` belongs to kind"),
    ],
)
def test_impossible_features_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Feature.model_validate(fields)


def test_raw_types():
    types = {"id": "string", "text": "string", "number": "float", "time": "int64"}
    for kind, dtype in types.items():
        feature = Feature.model_validate({"name": "x", "side": "candidate", "kind": kind})
        assert (feature.dtype, feature.is_list) == (dtype, False)
    assert (HISTORY.dtype, HISTORY.is_list) == ("string", True)


def test_shapes_of_raw_values():
    vector = Feature(name="v", side="query", kind="vector", dim=3)
    price = Feature(name="p", side="query", kind="number", dim=3)
    assert [f.shape for f in (vector, HISTORY, ITEM, price)] == [(3,), (None,), (), ()]
    assert (vector.dtype, vector.vector_dim, price.vector_dim) == ("float", 3, None)


def test_a_missing_feature_names_those_there_are():
    with pytest.raises(KeyError, match="no feature 'prise'; there are"):
        Schema(features=(HISTORY, ITEM))["prise"]


def test_differences_are_named():
    query = Feature(name="q", side="query", kind="number")
    schema, other = Schema(features=(HISTORY, ITEM, query)), Schema(features=(HISTORY, ITEM))
    assert schema.differences(schema) == []
    assert schema.differences(other) == ["'q' is missing"]
    assert other.differences(schema) == ["'q' is new"]
    longer = Schema(features=(HISTORY.model_copy(update={"length": 9}), ITEM))
    assert other.differences(longer) == ["'history'.length was 20, is 9"]
    turned = Schema(features=(ITEM, HISTORY))
    assert other.differences(turned) == ["the features stand in another order"]
