import pytest
from pydantic import ValidationError

from recsys.data_config import Data, Source

EVENTS = {"path": "clicks.csv", "columns": {"user": "u", "item": "i", "time": "t"}}
LAST_OUT = {"kind": "leave_last_out"}


@pytest.mark.parametrize("places", [{}, {"path": "a", "table": "b"}])
def test_a_source_is_in_one_place(places):
    with pytest.raises(ValidationError, match="exactly one of `path`, `table` or `query`"):
        Source.model_validate(places)
    assert Source(path="a", query="select * from csv.`{path}`").query


def test_events_have_an_order():
    columns = {"user": "u", "item": "i"}
    with pytest.raises(ValidationError, match="needs `time` or `order`"):
        Data.model_validate({"events": {"path": "a", "columns": columns}, "split": LAST_OUT})
    ordered = {"path": "a", "columns": columns | {"order": ["n"]}}
    assert Data.model_validate({"events": ordered, "split": LAST_OUT}).events.columns.time is None


def test_something_is_to_be_predicted():
    typed = EVENTS | {"columns": EVENTS["columns"] | {"event": "e"}}
    kinds = {"view": {"label": False}}
    with pytest.raises(ValidationError, match="at least one of `event_types` must be a label"):
        Data.model_validate({"events": typed, "split": LAST_OUT, "event_types": kinds})
    kinds["buy"] = {"weight": 2}
    data = Data.model_validate({"events": typed, "split": LAST_OUT, "event_types": kinds})
    assert data.event_types["buy"].label


def test_impressions_need_a_time_split_over_whole_users():
    roles = ("request", "user", "item", "time", "clicked")
    shown = {"path": "shown.csv", "columns": dict(zip(roles, "ruity", strict=True))}
    timed = {"kind": "time", "validation_days": 1, "test_days": 1}
    data = {"events": EVENTS, "impressions": shown, "split": timed}
    assert Data.model_validate(data).impressions.columns.position is None
    with pytest.raises(ValidationError, match=r"`impressions` need `split\.kind=time`"):
        Data.model_validate(data | {"split": LAST_OUT})
    with pytest.raises(ValidationError, match="`impressions` need `history_scope=user`"):
        Data.model_validate(data | {"history_scope": "session"})
