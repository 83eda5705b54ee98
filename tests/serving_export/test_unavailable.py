import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from serving_export.unavailable import (
    ASSET,
    Unavailable,
    listing,
    read_items,
    read_listing,
    with_listing,
    write_items,
    write_listing,
)

ITEMS = np.array([b"a", "b und ü".encode(), b"c"], object)


@pytest.fixture
def model(tmp_path):
    """A saved lookup, and a file of the model that is not to be touched."""
    (tmp_path / ASSET).parent.mkdir()
    (tmp_path / ASSET).write_text(listing([]), "utf-8")
    module = Unavailable(tmp_path / ASSET, ITEMS)
    call = tf.function(lambda rows: {"found": module.among(rows), "share": module.share()})
    module.call = call
    specs = tf.TensorSpec([None], tf.int32, "rows")
    tf.saved_model.save(module, str(tmp_path / "model"), call.get_concrete_function(specs))
    return tmp_path / "model"


def listed(model):
    loaded = tf.saved_model.load(str(model))
    answer = loaded.signatures["serving_default"](rows=tf.range(3))
    return answer["found"].numpy().tolist(), float(answer["share"])


def test_a_saved_model_knows_the_list_that_lies_beside_it(model):
    assert read_listing(model) == []
    assert listed(model) == ([False] * 3, 0)
    graph = (model / "saved_model.pb").read_bytes()
    write_listing(model, ["b und ü", "no such", "b und ü"])
    assert read_listing(model) == ["b und ü", "no such"]
    assert listed(model) == ([False, True, False], pytest.approx(2 / 3))
    assert (model / "saved_model.pb").read_bytes() == graph


def test_another_list_for_a_while_leaves_the_model(model):
    with with_listing({"one": model}, ["a"]) as changed:
        assert listed(changed["one"])[0] == [True, False, False]
    assert not changed["one"].exists()
    assert read_listing(model) == []


def test_a_model_without_a_list_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"exported without `export\.availability`"):
        write_listing(tmp_path, ["a"])
    with pytest.raises(ArtifactError, match=f"^{tmp_path} "), with_listing({"one": tmp_path}, []):
        pass
    assert list(tmp_path.iterdir()) == []


def test_ids_that_are_written_are_read(tmp_path):
    items = ['a "1"', "b, c", "d"]
    write_items(tmp_path / "out.csv", "item", items)
    assert read_items(tmp_path / "out.csv", "item") == items


def test_ids_are_read_in_their_order(tmp_path):
    (tmp_path / "out.csv").write_text('\ufeffreason,sku\nsold,b\n"x, y","a ""1"""\n', "utf-8")
    assert read_items(tmp_path / "out.csv", "sku") == ["b", 'a "1"']


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"a column 'item', found an empty file"),
        (b"sku,reason\na,b\n", r"a column 'item', found \['sku', 'reason'\]"),
        (b"item\n", r"lists no item.*recsys availability --clear"),
        (b"reason,item\nsold,a\nsold\n", r"out\.csv, line 3: expected the id of an item, found N"),
        (b'item\n""\n', r"line 2: expected the id of an item, found ''"),
        (b'item\n"a\nb"\n', r"expected the id of an item, found 'a\\nb'"),
        (b"item\n\xff\n", r"out\.csv is no readable CSV file in UTF-8"),
    ],
)
def test_a_bad_file_is_told(tmp_path, content, told):
    (tmp_path / "out.csv").write_bytes(content)
    with pytest.raises(ArtifactError, match=told):
        read_items(tmp_path / "out.csv", "item")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.csv is no readable CSV file"):
        read_items(tmp_path / "none.csv", "item")
