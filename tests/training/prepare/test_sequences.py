import pytest


def rows_of(frame, *names):
    return sorted(tuple(row[name] for name in names) for row in frame.collect())


def test_sessions_end_after_the_gap(stages, click, configure):
    minute = 1 / 24 / 60
    days = [1, 1 + 30 * minute, 1 + 61 * minute, 1 + 62 * minute, 25]
    rows = [click("a", f"i{k}", day) for k, day in enumerate(days)]
    config = configure(history_scope="session", session_gap_minutes=30)
    found = stages(rows, config).examples
    histories = {row["item"]: row["f_history"] for row in found.collect()}
    assert histories == {"i0": [], "i1": ["i0"], "i2": [], "i3": ["i2"], "i4": []}


def test_a_given_session_wins(stages, click, configure):
    columns = {"user": "u", "item": "i", "time": "t", "session": "s"}
    rows = [
        click("a", "i0", 1, s="p"),
        click("a", "i1", 2, s="q"),
        click("a", "i2", 3, s="p"),
        click("a", "i3", 4),
    ]
    found = stages(rows, configure(columns=columns, history_scope="session")).examples
    histories = {row["item"]: row["f_history"] for row in found.collect()}
    assert histories == {"i0": [], "i1": [], "i2": ["i0"], "i3": []}


def test_peers_are_not_earlier_and_are_ordered_by_item(stages, click, configure):
    rows = [click("a", "z", 1), click("a", "c", 2), click("a", "b", 2), click("a", "y", 3)]
    events = stages(rows, configure()).events
    found = rows_of(events, "position", "item", "before", "earlier")
    assert found == [(0, "z", 0, 0), (1, "b", 1, 1), (2, "c", 1, 1), (3, "y", 3, 3)]


def test_order_columns_decide_equal_times(stages, click, configure):
    columns = {"user": "u", "item": "i", "time": "t", "order": ["n"]}
    rows = [click("a", "b", 1, n="10"), click("a", "c", 1, n="9"), click("a", "d", 1, n=None)]
    events = stages(rows, configure(columns=columns)).events
    assert rows_of(events, "position", "item", "before") == [(0, "d", 0), (1, "c", 1), (2, "b", 2)]


def test_order_alone_orders(stages, click, configure):
    columns = {"user": "u", "item": "i", "order": ["n"]}
    config = configure(columns=columns, split={"kind": "leave_last_out"})
    rows = [click("a", f"i{k}", n=str(k)) for k in (2, 0, 1)]
    events = stages(rows, config).events
    assert rows_of(events, "position", "item", "at") == [(0, "i0", 0), (1, "i1", 0), (2, "i2", 0)]


def test_event_types_decide_labels_and_weights(stages, click, configure):
    columns = {"user": "u", "item": "i", "time": "t", "event": "e"}
    kinds = {"view": {"label": False}, "cart": {"weight": 2}, "buy": {"weight": 3.5}}
    rows = [click("a", kind, day, e=kind) for day, kind in enumerate(kinds, 1)]
    examples = stages(rows, configure(columns=columns, event_types=kinds)).examples
    assert rows_of(examples, "item", "weight") == [("buy", 3.5), ("cart", 2.0)]


@pytest.mark.parametrize(("least", "labels"), [(0, "abc"), (1, "bc"), (2, "c")])
def test_labels_need_earlier_events(stages, click, configure, least, labels):
    rows = [click("u", item, day) for day, item in enumerate("abc", 1)]
    examples = stages(rows, configure(min_history=least)).examples
    assert "".join(item for (item,) in rows_of(examples, "item")) == labels
