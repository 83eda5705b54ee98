import numpy as np

from recsys.dataset import read_corpus
from serving_export.filter_probe import probe


def test_some_ask_nothing_some_one_and_some_all(tiny, tmp_path):
    data = tiny.write_data(tmp_path)
    corpus = read_corpus(data)
    asked, passing = probe(corpus, [data.features[n] for n in ("item_id", "price")], 16)
    assert asked["filter_item_id"].shape == (16, 3)
    assert asked["filter_price"].shape == (16, 2)
    by_item = (asked["filter_item_id"] != b"").any(axis=1)
    by_price = np.isfinite(asked["filter_price"]).any(axis=1)
    kinds = set(zip(by_item.tolist(), by_price.tolist(), strict=True))
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    assert passing[~by_item & ~by_price].all()
    assert set(passing[by_item & ~by_price].sum(axis=1)) == {1, 2}
    assert (passing[by_price].sum(axis=1) < len(corpus)).all()
    prices = corpus.features["price"]
    for (least, most), found in zip(
        asked["filter_price"][by_price & ~by_item], passing[by_price & ~by_item], strict=True
    ):
        np.testing.assert_array_equal(found, (prices >= least) & (prices <= most))


def test_no_filters_ask_nothing(tiny, tmp_path):
    asked, passing = probe(read_corpus(tiny.write_data(tmp_path)), [], 3)
    assert asked == {}
    assert passing.shape == (3, tiny.num_items)
    assert passing.all()
