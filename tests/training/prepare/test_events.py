import pytest

from recsys.config import ConfigError
from training.prepare.errors import PrepareError
from training.prepare.events import clean_events
from training.prepare.sources import read_tables

ORDERED = {"user": "u", "item": "i", "time": "t", "order": ["n"], "event": "e"}


@pytest.fixture
def clean(spark, show):
    def make(rows, config):
        show(rows)
        return clean_events(read_tables(spark, config), config)

    return make


def test_every_event_is_counted_once_under_its_first_reason(clean, click, configure):
    rows = [
        click("a", "x", 1, e="view", n="1"),
        click("a", "x", 1, e="view", n="1"),  # duplicate
        click("a", "x", 1, e="buy", n="1"),  # another type: none
        click("a", "x", 1, e="view", n="2"),  # another order: none
        click(None, None, 1, e="view", n="1"),  # null user comes first
        click(" ", "x", 1, e="view", n="1"),
        click("a", "", 1, e="view", n="1"),
        click("a\nb", "x", 1, e="view", n="1"),
        click("a", "x", e="view", n="1"),  # no time
        {**click("a", "x", e="view", n="1"), "t": "yesterday"},
        click("a", "x", 31, e="view", n="1"),  # after not_after
        click("a", "x", 2, e="view", n="1", c="test"),
        click("a", "x", 3, e="scroll", n="1"),
        click("a", "x", 3, n="1"),
        *(click("bot", f"x{k}", 4 + k / 100, e="view", n="1") for k in range(3)),
        click("bot", "y", 5, e="view", n="1"),
    ]
    config = configure(
        columns=ORDERED,
        event_types={"view": {}, "buy": {}},
        cleaning={
            "drop": {"internal": "c = 'test'"},
            "not_after": "2024-01-30",
            "max_events_per_day": 2,
        },
    )
    # User a has three events on day 1 and would be a bot: spread them over days.
    rows[2]["t"], rows[3]["t"] = "2024-01-02 00:00:00", "2024-01-03 00:00:00"
    report = clean(rows, config).report
    assert report == {
        "events read": 18,
        "null user": 2,
        "null item": 1,
        "line break in id": 1,
        "impossible time": 3,
        "internal": 1,
        "event type not listed": 2,
        "duplicate": 1,
        "bot-like user": 4,
        "kept": 3,
    }
    assert report["events read"] == sum(n for r, n in report.items() if r != "events read")


def test_of_duplicates_the_same_one_stays(spark, clean, click, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "c", "side": "query", "kind": "category"},
    ]
    rows = [click("a", "x", 1, c=str(k)) for k in range(20)]
    kept = set()
    for order in (rows, rows[::-1], rows[7:] + rows[:7]):
        cleaned = clean(order, configure(features))
        assert cleaned.report["duplicate"] == 19
        kept.add(cleaned.events.first()["f_c"])
    assert len(kept) == 1


def test_duplicates_stay_when_they_are_wanted(clean, click, configure):
    cleaned = clean([click("a", "x", 1)] * 3, configure(cleaning={"deduplicate": False}))
    assert cleaned.report["kept"] == 3
    assert "duplicate" not in cleaned.report


def test_canonical_columns(clean, click, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "price", "side": "candidate", "kind": "number", "column": "p"},
        {"name": "clicked_at", "side": "context", "kind": "time", "column": "time"},
        {"name": "kind", "side": "query", "kind": "category", "column": "event"},
    ]
    config = configure(features, ORDERED, item_name="c", event_types={"view": {}})
    row = clean([click("a", "x", 1, n="2", e="view", c="Shoe", p="1.5")], config).events.first()
    assert row.asDict() == {
        "user": "a",
        "item": "x",
        "event": "view",
        "at": 1_704_067_200_000_000,
        "order": [2.0],
        "session": None,
        "given": None,
        "name": "Shoe",
        "f_item_id": "x",
        "f_price": 1.5,
        "f_clicked_at": 1_704_067_200_000_000,
        "f_kind": "view",
    }


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "p",
            r"feature 'price': wrong type: .* column 'p', but 2 values are none, such as 'cheap'",
        ),
        (
            "n",
            r"columns\.order\.0: wrong type: .* column 'n', but 2 values are none, such as 'cheap'",
        ),
    ],
)
def test_wrong_type_names_column_count_and_example(clean, click, configure, column, message):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "price", "side": "candidate", "kind": "number", "column": "p"},
        {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
    ]
    rows = [
        click("a", "x", 1, **{column: "cheap"}),
        click("a", "x", 2, **{column: "dear"}),
        click("a", "x", 3, **{column: "1"}),
        click("a", "x", 4),
        click(None, "x", 4, **{column: "a dropped row may hold anything"}),
    ]
    roles = {"user": "u", "item": "i", "time": "t", "order": ["n"]}
    with pytest.raises(PrepareError, match=message):
        clean(rows, configure(features, roles))


def test_vector_of_an_event_names_item_and_user(clean, click, configure):
    features = [
        {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
        {"name": "taste", "side": "query", "kind": "vector", "column": "v", "dim": 2},
        {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
    ]
    events = {"table": "clicks", "derive": {"v": "from_json(p, 'array<float>')"}}
    rows = [click("a", "x", 1, p="[1, 2]"), click("a", "y", 2), click("b", "z", 3, p="[1]")]
    message = (
        r"feature 'taste': .* arrays of 2 .* 'v', but 1 values .* 'item z of user b: 1 numbers'"
    )
    with pytest.raises(PrepareError, match=message):
        clean(rows, configure(features, events=events))


def test_given_split_knows_four_words(clean, click, configure):
    config = configure(split={"kind": "given", "column": "w"})
    rows = [click("a", "x", 1, w="train"), click("a", "y", 2, w="dev"), click("a", "z", 3)]
    with pytest.raises(PrepareError, match=r"data\.split\.column: .*2 events .* such as 'dev'"):
        clean(rows, config)


def test_nothing_to_prepare(clean, click, configure):
    with pytest.raises(PrepareError, match=r"data\.events: clicks is empty"):
        clean([], configure())
    with pytest.raises(PrepareError, match=r"no event of clicks is left .*null user: 1"):
        clean([click(None, "x", 1)], configure())


def test_drop_expression_that_cannot_be_used(clean, configure):
    config = configure(cleaning={"drop": {"odd": "no_such_column > 1"}})
    with pytest.raises(ConfigError, match=r"data\.cleaning\.drop: .*no_such_column"):
        clean([], config)
