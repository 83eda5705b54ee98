import numpy as np
import pytest
from pyspark.sql import functions as F

from recsys.drift import psi
from serving_export.histograms import Histogram, histograms
from serving_export.probes import Probe, _one, _one_text

pytestmark = pytest.mark.spark

TYPES = "country string, price double, items array<string>, user string"


@pytest.fixture(scope="module")
def counted(spark, tmp_path_factory):
    """Three hundred users before, two hundred today: other countries, prices doubled."""
    known = tmp_path_factory.mktemp("vocabulary") / "country.txt"
    known.write_text("dk\nde\nse\n")
    users = known.with_name("user.txt")
    users.write_text("".join(f"u{n}\n" for n in range(200)))
    before = [
        (["dk", "dk", "de"][n % 3], float(n % 100), [f"i{n % 4}", f"i{n % 150}"], f"u{n}")
        for n in range(300)
    ]
    today = [
        (["dk", "", "fr", "se", None][n % 5], 2.0 * (n % 100), [f"i{n % 4}"], f"u{n + 100}")
        for n in range(200)
    ]
    today[0] = ("dk", float("nan"), None, None)
    probes = [
        Probe("country", "country", _one_text, vocabulary=known),
        Probe("price", "price", _one, is_number=True),
        Probe("items", "items", lambda items: items),
        Probe("user", "user", _one_text, vocabulary=users, is_own_id=True),
        Probe("new", "items", lambda items: items),
    ]
    frames = [spark.createDataFrame(rows, TYPES) for rows in (before, today)]
    found = histograms(probes, *frames, rows=200, bin_rows=20, number_bins=10)
    constant = Probe("length", "items", lambda items: _one(F.size(items)), is_number=True)
    found |= histograms([constant], *frames, rows=200, bin_rows=20, number_bins=10)
    few = histograms(probes[1:2], *frames, rows=30, bin_rows=20, number_bins=10)
    without = histograms(
        probes[:3], frames[0], frames[1].drop("country", "price", "items"), 200, 20, 10
    )
    return found, few, without


def as_pairs(histogram: Histogram):
    return dict(
        zip(histogram.labels, zip(histogram.reference, histogram.today, strict=True), strict=True)
    )


def test_categories_missing_and_unknown_ones_apart_rare_ones_pooled(counted):
    """The reference has none of `se`, which is known; `fr` is in no vocabulary."""
    assert as_pairs(counted[0]["country"]) == {
        "dk": (200, 40),
        "de": (100, 0),
        "(missing)": (0, 80),
        "(unknown)": (0, 40),
        "se": (0, 40),
    }
    assert counted[0]["country"].unknown() == (0.0, 40 / 120)


def test_items_count_as_often_as_they_are_listed(counted):
    """Of 600 values an own bin needs a tenth, as 20 of 200 rows; a missing list has no items."""
    pairs = as_pairs(counted[0]["items"])
    assert set(pairs) == {"i0", "i1", "i2", "i3", "(rest)"}
    assert pairs["i0"] == (75 + 2, 49)
    assert pairs["i1"] == (75 + 2, 50)
    assert pairs["(rest)"] == (300 - 8, 0)


def test_numbers_are_cut_at_quantiles_of_the_reference(counted):
    prices = counted[0]["price"]
    assert prices.labels[0] == "up to 9"
    assert prices.labels[1] == "above 9 up to 19"
    assert prices.labels[-2:] == ["above 89", "(missing)"]
    np.testing.assert_array_equal(prices.reference, [30] * 10 + [0])
    # Twice the price: the first five bins hold a tenth of today's each, the last one half.
    np.testing.assert_array_equal(prices.today, [9, *[10] * 8, 110, 1])
    assert as_pairs(counted[1]["price"]) == {"any": (300, 199), "(missing)": (0, 1)}


def test_a_number_that_all_have_is_told_from_those_below_and_above(counted):
    assert as_pairs(counted[0]["length"]) == {
        "below 2": (0, 199),
        "2": (300, 0),
        "(missing)": (0, 1),
    }


def test_an_id_of_its_own_is_known_or_not(counted):
    users = counted[0]["user"]
    assert as_pairs(users) == {
        "(known)": (200, 99), "(unknown)": (100, 100), "(missing)": (0, 1),
    }  # fmt: skip
    assert users.unknown() == (100 / 300, 100 / 199)


def test_a_column_that_is_gone_is_missing(counted):
    for name in ("country", "price", "items"):
        found = counted[2][name]
        assert as_pairs(found)["(missing)"] == (0, 200)
        assert psi(found.reference, found.today) > 5
