import pytest

from recsys.config import ConfigError
from recsys.schema import Feature
from training.prepare.errors import PrepareError
from training.prepare.sources import attach_features, read_tables

FEATURES = [
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "brand", "side": "candidate", "kind": "category"},
    {"name": "price", "side": "candidate", "kind": "number"},
    {"name": "age", "side": "query", "kind": "category", "table": "users"},
    {"name": "history", "side": "query", "kind": "history", "of": "item_id"},
]


@pytest.fixture
def tables(tmp_path, configure):
    """Write events, items and users; return a function that makes their config."""

    def make(price="2.5"):
        (tmp_path / "events.csv").write_text("u,i,t\nx,1,2024-01-01\n")
        items = f"id,brand,price,title\n1,acme,{price},One\n1,zeta,9,Other\n2,acme,,\n,none,1,\n"
        (tmp_path / "items.csv").write_text(items)
        (tmp_path / "users.csv").write_text("uid,age\nx,old\n")

        def source(name, **more):
            options = {"header": "true"}
            return {"path": str(tmp_path / name), "format": "csv", "options": options, **more}

        return configure(
            FEATURES,
            events=source("events.csv"),
            items=source("items.csv", key="id"),
            users=source("users.csv", key="uid"),
            item_name="title",
        )

    return make


def test_item_table_has_one_row_per_key(spark, tables):
    read = read_tables(spark, tables())
    rows = sorted(tuple(row) for row in read.items.collect())
    assert [row[0] for row in rows] == ["1", "2"]
    assert read.items.columns == ["item", "name", "f_brand", "f_price"]
    assert rows[1] == ("2", None, "acme", None)
    # Of the two rows of item 1, one is taken as a whole: the smaller.
    assert rows[0] == ("1", "One", "acme", 2.5)
    assert read.homes == {"item_id": "role", "brand": "items", "price": "items", "age": "users"}
    assert read.versions["items"].num_rows == 4


def test_number_of_the_wrong_type_is_refused(spark, tables):
    with pytest.raises(
        PrepareError, match=r"data\.items, feature 'price'.*'price'.* such as 'dear'"
    ):
        read_tables(spark, tables("dear"))


@pytest.fixture
def with_vectors(spark, tables):
    """Config whose item table has a vector column, made by derive from a text."""

    def make(expression, **feature):
        config = tables()
        items = config.data.items.model_copy(update={"derive": {"v": expression}})
        vector = {"name": "v", "side": "candidate", "kind": "vector", "dim": 2} | feature
        data = config.data.model_copy(update={"items": items})
        features = (*config.features, Feature.model_validate(vector))
        return config.model_copy(update={"data": data, "features": features})

    return make


def test_vectors_are_derived_from_text_and_may_be_missing(spark, with_vectors):
    expression = "if(id = 2, null, from_json('[0.5, 1]', 'array<double>'))"
    items = read_tables(spark, with_vectors(expression)).items
    assert dict(items.dtypes)["f_v"] == "array<float>"
    found = {row["item"]: row["f_v"] for row in items.collect()}
    assert found == {"1": [0.5, 1.0], "2": None}


def test_vector_of_another_length_names_column_item_and_lengths(spark, with_vectors):
    expression = "if(id = 2, array(1, 2, 3), array(1, 2))"
    message = (
        r"data\.items, feature 'taste': wrong type: expected arrays of 2 finite numbers in column "
        r"'v', but 1 values are none, such as 'item 2: 3 numbers'"
    )
    with pytest.raises(PrepareError, match=message):
        read_tables(spark, with_vectors(expression, name="taste", column="v"))


def test_vector_column_of_another_type_is_refused(spark, with_vectors):
    with pytest.raises(
        ConfigError, match=r"data\.items: expected arrays .* column 'v', found string"
    ):
        read_tables(spark, with_vectors("title"))


def test_version_follows_content_not_place(spark, tables, tmp_path):
    first = read_tables(spark, tables()).versions
    assert first["events"].version == read_tables(spark, tables()).versions["events"].version
    changed = read_tables(spark, tables("22.55")).versions
    assert changed["events"].version == first["events"].version
    assert changed["items"].version != first["items"].version
    assert first["users"].uri == str(tmp_path / "users.csv")


def test_query_reads_its_path_and_derive_builds_on_derive(spark, tmp_path, configure, show):
    (tmp_path / "a.txt").write_text("x 1\n")
    events = {
        "path": str(tmp_path / "a.txt"),
        "query": "select split(value, ' ') as parts from text.`{path}`",
        "derive": {"u": "parts[0]", "i": "concat(u, parts[1])", "t": "'2024-01-01'"},
    }
    read = read_tables(spark, configure(events=events))
    assert read.events.select("u", "i").first()[:] == ("x", "x1")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            {"table": "clicks", "derive": {"v": "no_such + 1"}},
            r"data\.events\.derive\.v: .*no_such",
        ),
        ({"table": "clicks", "derive": {"v": "1 +"}}, r"data\.events\.derive\.v: "),
        ({"table": "no_table"}, r"data\.events: cannot read no_table"),
        ({"query": "select 1 as u"}, r"data\.events\.columns\.item: expected a column 'i'"),
    ],
)
def test_what_cannot_be_read_is_named(spark, configure, show, events, message):
    show([])
    with pytest.raises(ConfigError, match=message):
        read_tables(spark, configure(events=events))


def test_events_get_what_vocabularies_count(spark, tables):
    config = tables()
    read = read_tables(spark, config)
    events = spark.createDataFrame([("x", "1"), ("y", "2")], ["user", "item"])
    rows = attach_features(events, read, config.schema_).collect()
    found = {row["user"]: (row["f_brand"], row["f_age"]) for row in rows}
    assert found == {"x": ("acme", "old"), "y": ("acme", None)}
    assert "f_price" not in rows[0].asDict()
