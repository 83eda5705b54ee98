import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from recsys.artifacts import ArtifactError
from serving_export import arrow_scorer
from serving_export.arrow_scorer import ArrowScorer, _input, cut


@pytest.fixture(scope="module")
def scorer(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("version")
    shutil.copytree(world.exported.directory, folder / "artifacts")
    return ArrowScorer(folder)


def test_columns_of_any_arrow_type_answer_as_the_saved_model(scorer, world, tiny):
    histories = [[tiny.item(1), tiny.item(2)], [], None, [None, tiny.item(3)]]
    tastes = [[0.5, 1.0, -1.0], None, [0.0, 2.0, 0.0], None]
    columns = {
        "history": pa.array(histories, pa.large_list(pa.large_string())),
        "member": pa.array(["user 1", None, "user 3", "nobody"]).dictionary_encode(),
        "basket": pa.array([1, None, 3, 4], pa.int16()),
        "taste": pa.array(tastes, pa.list_(pa.float64())),
        "exclusions": pa.array([[tiny.item(4)], None, [], ["no such id"]], pa.list_(pa.string())),
    }
    answer = scorer.answer(columns, 4, 5)

    ids, scores = tiny.ask(
        world.models["scann"],
        [[item or "" for item in history or []] for history in histories],
        k=5,
        exclusions=[[tiny.item(4)], [], [], ["no such id"]],
        member=["user 1", "", "user 3", "nobody"],
        basket=[1, np.nan, 3, 4],
        taste=[taste or [0.0] * 3 for taste in tastes],
    )
    assert answer.field("items").to_pylist() == ids
    np.testing.assert_allclose(np.stack(answer.field("scores").to_pylist()), scores, atol=1e-5)
    assert len({tuple(row) for row in ids}) == 4


def test_a_vector_that_is_missing_is_empty_in_a_filter_and_zeros_elsewhere():
    column = pa.array([[1.0, None], None, [None, 2.0]], pa.list_(pa.float64()))
    spec = {"dtype": "float32", "shape": [None, 2]}
    for empty in (np.nan, 0.0):
        found = _input("filter_price", column, spec, 0, empty)
        expected = [[1, np.nan], [empty, empty], [np.nan, 2]]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_slices_and_no_rows(scorer, tiny):
    histories = pa.array([["x"]] * 9 + [[tiny.item(n)] for n in range(3)])
    few = scorer.answer({"history": histories.slice(9, 3)}, 3, 4)
    whole = scorer.answer({"history": histories}, 12, 4)
    assert few.field("items").to_pylist() == whole.slice(9, 3).field("items").to_pylist()
    np.testing.assert_allclose(
        np.stack(few.field("scores").to_pylist()),
        np.stack(whole.slice(9, 3).field("scores").to_pylist()),
        atol=1e-5,
    )
    assert scorer.answer({"history": histories.slice(12)}, 0, 4).to_pylist() == []


def test_lists_are_shorter_where_few_candidates_are_left(scorer, tiny):
    all_but_two = [tiny.item(row) for row in range(2, tiny.num_items)]
    columns = {"exclusions": pa.array([all_but_two, []], pa.list_(pa.string()))}
    answer = scorer.answer(columns, 2, 10)
    assert [len(items) for items in answer.field("items").to_pylist()] == [2, 10]
    assert [len(scores) for scores in answer.field("scores").to_pylist()] == [2, 10]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"taste": pa.array([[1.0, 2.0]])}, r"'taste' of type list<.*\['rows', 3\].*\[2\] numbers"),
        ({"basket": pa.array(["many"])}, r"'basket' of type string does not fit.*float32"),
        ({"history": pa.array(["one item"])}, r"'history' of type string does not fit"),
    ],
)
def test_a_column_that_does_not_fit_is_named(scorer, column, told):
    with pytest.raises(ArtifactError, match=told):
        scorer.answer(column, 1, 3)


def test_the_logged_file_answers_the_same(scorer, registry, tiny):
    """What MLflow serves and what Spark writes are two ways to one signature."""
    from serving_export.registry import connect, recommend

    connect(registry.uri)
    histories = [[tiny.item(n), tiny.item(n + 1)] for n in range(6)]
    answers = recommend("tiny/1", pd.DataFrame({"history": histories}), 4)
    assert scorer.answer({"history": pa.array(histories)}, 6, 4).field("items").to_pylist() == list(
        answers["ids"]
    )


@pytest.fixture(scope="module")
def with_events(shop_of_events):
    return ArrowScorer(shop_of_events)


@pytest.mark.parametrize("events", [None, pa.nulls(2), pa.array([[], None], pa.list_(pa.string()))])
def test_an_answer_does_not_depend_on_who_else_is_asked_for(with_events, tiny, events):
    """Two histories of the same events, one of which nobody has; then somebody has it."""
    histories = [[tiny.item(3), tiny.item(7), tiny.item(5)], [tiny.item(9)]]
    columns = {"history": pa.array(histories), "user_id": pa.array(["user 1", "user 2"])}
    given = columns if events is None else columns | {"event_history": events}
    alone = with_events.answer(given, 2, 6).field("items").to_pylist()
    beside = {
        "history": pa.array([*histories, [tiny.item(1)]]),
        "user_id": pa.array(["user 1", "user 2", "user 3"]),
        "event_history": pa.array([None, [], ["dk"]], pa.list_(pa.string())),
    }
    assert with_events.answer(beside, 3, 6).field("items").to_pylist()[:2] == alone
    assert alone[0] != alone[1]


def test_rows_are_parted_by_width(monkeypatch):
    monkeypatch.setattr(arrow_scorer, "BATCH", 3)
    monkeypatch.setattr(arrow_scorer, "CELLS", 10)
    parts = cut(np.array([0, 50, 4, 0, 5, 1, 0, 6]))
    assert [part.tolist() for part in parts] == [[0, 3, 6], [5, 2], [4], [7], [1]]
    assert [part.tolist() for part in cut(np.array([], np.int64))] == [[]]


def test_one_long_list_is_not_paid_for_by_all(with_events, tiny, monkeypatch):
    """The rows beside it are asked for apart from it, and nobody's answer changes."""
    long = [tiny.item(n) for n in range(300)]
    exclusions = [long if n == 4 else [tiny.item(n)] for n in range(12)]
    columns = {
        "history": pa.array([[tiny.item(n), tiny.item(n + 1)] for n in range(12)]),
        "exclusions": pa.array(exclusions),
    }
    asked, part = [], ArrowScorer._part

    def counted(self, few, rows, k):
        asked.append((rows, max(map(len, few["exclusions"].to_pylist()))))
        return part(self, few, rows, k)

    monkeypatch.setattr(ArrowScorer, "_part", counted)
    whole = with_events.answer(columns, 12, 5)
    monkeypatch.setattr(arrow_scorer, "CELLS", 100)
    apart = with_events.answer(columns, 12, 5)
    assert asked == [(12, 300), (11, 1), (1, 300)]
    assert apart.field("items").to_pylist() == whole.field("items").to_pylist()
    assert not set(apart.field("items")[4].as_py()) & set(long)
