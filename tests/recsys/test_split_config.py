import pytest
from pydantic import TypeAdapter, ValidationError

from recsys.split_config import GivenSplit, HeldOutSplit, LeaveLastOut, Split, TimeSplit

DATE = "2024-01-02"


def test_the_kind_chooses_the_rule():
    choose = TypeAdapter(Split).validate_python
    times = {"kind": "time", "validation_days": 1, "test_from": DATE}
    assert isinstance(choose(times), TimeSplit)
    assert isinstance(choose({"kind": "leave_last_out"}), LeaveLastOut)
    assert isinstance(choose({"kind": "given", "column": "fold"}), GivenSplit)
    assert isinstance(choose({"kind": "held_out"}), HeldOutSplit)


@pytest.mark.parametrize(
    "rule", [{}, {"validation_days": 1}, {"test_days": 1}, {"test_days": 1, "test_from": DATE}]
)
def test_a_time_split_needs_one_rule_for_each_window(rule):
    with pytest.raises(ValidationError, match="give exactly one of"):
        TimeSplit.model_validate({"kind": "time", **rule})


def test_held_out_items_need_at_most_one_rule_for_validation():
    with pytest.raises(ValidationError, match="or none of the two"):
        HeldOutSplit(kind="held_out", validation_days=1, validation_from=DATE)


def test_which_rules_need_the_times_of_events():
    assert TimeSplit(kind="time", validation_days=1, test_days=1).by_time
    assert HeldOutSplit(kind="held_out", validation_days=1).by_time
    assert HeldOutSplit(kind="held_out", validation_from=DATE).by_time
    for split in (
        HeldOutSplit(kind="held_out"),
        LeaveLastOut(kind="leave_last_out"),
        GivenSplit(kind="given", column="fold"),
    ):
        assert not split.by_time
