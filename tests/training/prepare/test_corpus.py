FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "colour", "side": "candidate", "kind": "category", "column": "c"},
    {"name": "price", "side": "candidate", "kind": "number", "column": "p"},
]


def test_values_are_of_the_first_event_training_before_others(stages, click, configure):
    rows = [
        click("a", "x", 2, c="red", p="2"),
        click("a", "x", 1, c=None, p="1"),  # the first with a value counts
        click("a", "x", 26, c="blue", p="3"),
        click("b", "warm", 1, c=None, p="1"),
        click("b", "warm", 26, c="green", p="9"),  # from after the split: not used
        click("b", "cold", 27, c="b", p="5"),
        click("b", "cold", 26, c="tie", p="4"),
        click("c", "cold", 26, c="also", p="4"),
    ]
    corpus = stages(rows, configure(FEATURES, item_name="c")).corpus
    found = {
        row["item"]: (row["f_colour"], row["f_price"], row["name"]) for row in corpus.collect()
    }
    assert found == {
        "x": ("red", 1.0, "red"),
        "warm": (None, 1.0, "warm"),
        "cold": ("also", 4.0, "also"),
    }


def test_counts_are_of_training_alone(stages, click, configure):
    rows = [click("a", "x", 1), click("a", "x", 2), click("a", "x", 21), click("a", "y", 26)]
    corpus = stages(rows, configure(min_history=1)).corpus.collect()
    names = ("count", "labels", "validation_labels", "test_labels")
    found = {row["item"]: tuple(row[name] for name in names) for row in corpus}
    assert found == {"x": (2, 1, 1, 0), "y": (0, 0, 0, 1)}


def test_item_table_adds_items_and_values(spark, stages, click, configure):
    table = spark.createDataFrame(
        [("x", "acme", "Ex"), ("never", "zeta", None)], "id string, colour string, title string"
    )
    table.createOrReplaceTempView("items")
    features = [{**f, "column": None} if f["name"] == "colour" else f for f in FEATURES[:3]]
    config = configure(features, items={"table": "items", "key": "id"}, item_name="title")
    corpus = stages([click("a", "x", 1), click("a", "y", 2)], config).corpus.collect()
    found = {row["item"]: (row["name"], row["count"], *row[-2:]) for row in corpus}
    assert found == {
        "x": ("Ex", 1, "x", "acme"),
        "y": ("y", 1, "y", None),
        "never": ("never", 0, "never", "zeta"),
    }
