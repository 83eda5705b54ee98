import pytest
from pydantic import ValidationError

from recsys.search_space import Distribution, Tune


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either `low` and `high`, or `choices`"),
        ({"low": 1}, "either `low` and `high`, or `choices`"),
        ({"low": 1, "high": 2, "choices": [1]}, "either `low` and `high`, or `choices`"),
        ({"choices": [1, 2], "log": True}, "`choices` have no `low`, `high` or `log`"),
        ({"low": 2, "high": 2}, "`low` 2 must be below `high` 2"),
        ({"low": 0, "high": 1, "log": True}, "`log` needs `low` above 0, got 0"),
        ({"low": 0, "hihg": 1}, "hihg"),
    ],
)
def test_what_is_no_distribution(values, message):
    with pytest.raises(ValidationError, match=message):
        Distribution.model_validate(values)


def test_an_interval_is_of_whole_numbers_if_both_ends_are():
    assert Distribution(low=1, high=8).whole
    assert not Distribution(low=1.0, high=8).whole
    assert Distribution(low=1, high=8).holds(8)
    assert not Distribution(low=1, high=8).holds(2.5)
    assert not Distribution(low=0, high=8).holds(True)
    assert Distribution(low=0.0, high=1).holds(0.5)
    assert not Distribution(low=0.0, high=1).holds(1.5)
    assert Distribution(choices=([], [64])).holds([64])
    assert not Distribution(choices=("adam",)).holds("adagrad")


def test_the_ends_or_the_choices_are_tried_on_the_config():
    assert Distribution(low=1, high=8).extremes == (1, 8)
    assert Distribution(choices=([], [64])).extremes == ([], [64])


def test_round_trip_through_json_keeps_kinds_of_numbers():
    tune = Tune(space={"a": Distribution(low=1.0, high=2), "b": Distribution(choices=([1], None))})
    again = Tune.model_validate_json(tune.model_dump_json())
    assert again == tune
    assert not again.space["a"].whole
