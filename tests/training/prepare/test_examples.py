import pytest

FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3},
    {"name": "kinds", "side": "query", "kind": "history", "of": "last_kind", "length": 3},
    {"name": "last_kind", "side": "query", "kind": "category", "column": "event"},
    {"name": "user_id", "side": "query", "kind": "id", "column": "user"},
    {"name": "spent", "side": "query", "kind": "number", "column": "p"},
    {"name": "page", "side": "context", "kind": "category", "column": "c"},
    {"name": "clicked_at", "side": "context", "kind": "time", "column": "time"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
]
ROLES = {"user": "u", "item": "i", "time": "t", "event": "e"}
SECONDS = 1_704_067_200  # 2024-01-01


def features_of(row, prefix="f_"):
    return {n[len(prefix) :]: v for n, v in row.asDict().items() if n.startswith(prefix)}


def test_query_features_come_from_before_context_from_the_label(stages, click, configure):
    rows = [
        click("a", "x", 1, e="view", c="home", p="1"),
        click("a", "y", 2, e=None, c="search", p=None),
        click("a", "z", 3, e="buy", c="cart", p="7"),
        click("a", "w", 4, e="view", c=None, p="9"),
    ]
    examples = stages(rows, configure(FEATURES, ROLES)).examples.orderBy("position").collect()
    day = 86_400
    assert features_of(examples[0]) == {
        "history": [],
        "kinds": [],
        "last_kind": None,
        "user_id": "a",
        "spent": None,
        "page": "home",
        "clicked_at": SECONDS * 1_000_000,
    }
    assert features_of(examples[3]) == {
        "history": ["x", "y", "z"],
        "kinds": ["view", "", "buy"],
        "last_kind": "buy",
        "user_id": "a",
        "spent": 7.0,
        "page": None,
        "clicked_at": (SECONDS + 3 * day) * 1_000_000,
    }
    assert features_of(examples[2])["spent"] is None


def test_users_are_as_of_the_end(stages, click, configure):
    rows = [
        click("a", "x", 1, e="view", c="home", p="1"),
        click("a", "y", 26, e="buy", c="cart", p="2"),
    ]
    user = stages(rows, configure(FEATURES, ROLES)).users.first().asDict()
    assert user == {
        "user": "a",
        "history": ["x", "y"],
        "kinds": ["view", "buy"],
        "last_kind": "buy",
        "user_id": "a",
        "spent": 2.0,
        "page": "cart",
        "clicked_at": (SECONDS + 25 * 86_400) * 1_000_000,
    }


def test_users_of_sessions_have_their_last_session(stages, click, configure):
    rows = [click("a", f"i{d}", d) for d in (1, 2, 2.01)]
    users = stages(rows, configure(history_scope="session")).users.collect()
    assert [(row["user"], row["history"]) for row in users] == [("a", ["i2", "i2.01"])]


@pytest.mark.parametrize("scope", ["user", "session"])
def test_exclusions_are_all_that_was_seen_before(stages, click, configure, scope):
    rows = [click("a", item, day) for day, item in enumerate("xyxzyw", 1)]
    made = stages(rows, configure(exclude_seen=True, history_scope=scope))
    found = {row["item"]: row["exclusions"] for row in made.examples.collect()}
    # Each item is a label once: the second x and y had been seen.
    assert found == {"x": [], "y": ["x"], "z": ["x", "y"], "w": ["x", "y", "z"]}
    assert made.users.first()["exclusions"] == ["x", "y", "z", "w"]
    assert made.events.filter("seen").count() == 2


def test_peers_are_not_excluded(stages, click, configure):
    rows = [click("a", "x", 1), click("a", "y", 2), click("a", "z", 2)]
    made = stages(rows, configure(exclude_seen=True))
    assert {row["item"]: row["exclusions"] for row in made.examples.collect()} == {
        "x": [],
        "y": ["x"],
        "z": ["x"],
    }


def test_warm_means_that_the_user_has_training_events(stages, click, configure):
    rows = [click("a", "x", 1), click("a", "y", 26), click("b", "x", 26)]
    examples = stages(rows, configure()).examples.filter("window = 'test'")
    assert {row["user"]: row["warm"] for row in examples.collect()} == {"a": True, "b": False}


def pieces_of(training):
    rows = training.orderBy("user", "first").collect()
    return [
        (r["first"], r["h_history"], [(label["item"], label["known"]) for label in r["labels"]])
        for r in rows
    ]


def test_training_sequences_list_each_label_once_after_what_it_knows(stages, click, configure):
    """The features list three events, so longer histories are cut, half of the length apart."""
    rows = [click("a", f"i{day}", day) for day in range(1, 8)]
    assert pieces_of(stages(rows, configure()).training) == [
        (0, ["i1", "i2", "i3"], [("i1", 0), ("i2", 1), ("i3", 2), ("i4", 3)]),
        (1, ["i2", "i3", "i4"], [("i5", 3)]),
        (2, ["i3", "i4", "i5"], [("i6", 3)]),
        (3, ["i4", "i5", "i6"], [("i7", 3)]),
    ]


def test_training_sequences_keep_peers_and_other_windows_apart(stages, click, configure):
    rows = [
        click("a", "x", 1),
        *(click("a", item, 2) for item in "yz"),
        click("a", "w", 3),
        click("a", "later", 21),
        click("a", "last", 26),
    ]
    made = stages(rows, configure())
    assert pieces_of(made.training) == [
        (0, ["x", "y", "z"], [("x", 0), ("y", 1), ("z", 1), ("w", 3)])
    ]
    assert pieces_of(made.recent) == [(1, ["y", "z", "w"], [("later", 3)])]


def test_training_sequences_and_examples_agree(stages, click, configure):
    rows = [
        click(user, f"i{(n * k) % 5}", 1 + n / 2, e="view", c=str(n), p=str(n))
        for k, user in enumerate("abc", 1)
        for n in range(4)
    ]
    made = stages(rows, configure(FEATURES, ROLES))
    expected = {(r["user"], r["position"]): features_of(r) for r in made.examples.collect()}
    found = {}
    for row in made.training.collect():
        for label in row["labels"]:
            histories = features_of(row, prefix="h_")
            known = {name: past[: label["known"]] for name, past in histories.items()}
            found[row["user"], label["position"]] = known | features_of(label)
    assert len(found) == 12
    assert found == expected
