import json

import pyarrow as pa
import pytest

from recsys.artifacts import ArtifactError
from recsys.schema import Feature, Schema
from serving_export.query_columns import QueryColumns, read_contract

ITEM = Feature(name="item_id", side="candidate", kind="id", column="item")
PAGE = Feature(name="page", side="context", kind="category")
MEMBER = Feature(name="member", side="query", kind="id", column="user")
HISTORY = Feature(name="history", side="query", kind="history", of="item_id", length=5)
PAGES = Feature(name="pages", side="query", kind="history", of="page", length=5)


def asked_by(*features, **further):
    dumped = Schema(features=features).model_dump(mode="json")["features"]
    return QueryColumns.of({"features": dumped} | further)


@pytest.fixture
def shop():
    filters = {"price": {"input": "filter_price"}}
    return asked_by(PAGE, ITEM, MEMBER, HISTORY, PAGES, filters=filters)


def test_columns_stand_in_the_order_of_the_schema_and_some_tell_who_asks(shop, tmp_path):
    assert shop.features == ("page", "member", "history", "pages")
    assert shop.histories == ("history", "pages")
    assert shop.identifying == ("member", "history")
    assert shop.further == ("exclusions", "filter_price")
    assert asked_by(PAGE, PAGES, ITEM).identifying == ("page", "pages")
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra" / "contract.json").write_text(json.dumps({"version": 1}))
    assert read_contract(tmp_path) == {"version": 1}


def test_a_table_that_cannot_tell_who_asks_is_refused(shop):
    shop.check(["history"], "users")
    shop.check(["user", "member", "other"], "users")
    told = (
        r"users has none of the columns .*: expected 'member' or 'history', found user, user_history, "
        r"page \(did you mean 'history' by 'user_history'\?\)\. Name columns as .*: page, member, his"
    )
    with pytest.raises(ArtifactError, match=told):
        shop.check(["user", "user_history", "page"], "users")


def test_unknown_columns_are_named_with_what_may_be_meant(shop):
    assert shop.unknown(["user", "page", "exclusions", "filter_price", "history"]) == ""
    told = "'Histories', 'zip' (did you mean 'history' by 'Histories'?)"
    assert shop.unknown(["user", "Histories", "zip", "member"]) == told
    assert shop.unknown(["user_history", "history", "pages"]) == "'user_history'"


def test_arguments_are_all_features_in_order_or_a_struct_of_some():
    asked = asked_by(MEMBER, HISTORY, ITEM)
    assert asked.call("recommend") == "recommend(member, history, k)"
    members, histories = pa.array(["a", "b"]), pa.array([["x"], []])
    ten = pa.array([10, 10], pa.int32())
    columns, k = asked.from_arguments([members, histories, ten])
    assert columns == {"member": members, "history": histories}
    assert k == 10
    structs = pa.StructArray.from_arrays([histories, members], ["history", "city"])
    columns, k = asked.from_arguments([structs, ten])
    assert columns == {"history": histories, "city": members}
    assert k == 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], r"got \(\)"),
        ([pa.array(["a"]), pa.array([3])], r"got \(string, int64\)"),
        ([pa.array(["a"]), pa.array([["x"]]), pa.array([1]), pa.array([3])], r"int64, int64\)"),
        ([pa.array(["a"]), pa.array([["x"]])], r"got \(string, list"),
        ([pa.array(["a"]), pa.array([["x"]]), pa.array(["3"])], r"string\) and k \[\]"),
        ([pa.array(["a", "b"]), pa.array([["x"], []]), pa.array([3, 4])], r"and k \[3, 4\]"),
        ([pa.array(["a"]), pa.array([["x"]]), pa.array([None], pa.int32())], r"and k \[None\]"),
    ],
)
def test_other_arguments_are_told_what_is_expected(arguments, told):
    expected = r"expected recommend\(member, history, k\), .* or recommend\(struct\(\*\), k\).*"
    with pytest.raises(ArtifactError, match=expected + told):
        asked_by(MEMBER, HISTORY, ITEM).from_arguments(arguments)


def test_a_struct_that_cannot_tell_who_asks_is_refused(shop):
    structs = pa.StructArray.from_arrays([pa.array([["x"]])], ["clicked"])
    with pytest.raises(ArtifactError, match=r"the struct that recommend was given has none"):
        shop.from_arguments([structs, pa.array([3])])
