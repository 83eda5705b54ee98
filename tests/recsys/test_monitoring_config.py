import pytest
from pydantic import ValidationError

from recsys.config import RunConfig
from recsys.monitoring_config import Monitoring, distributions_of
from recsys.schema import Feature


def test_a_distribution_may_have_limits_of_its_own():
    settings = Monitoring(psi=0.3, of={"country": {"psi": None}, "history": {"psi": 0.5}})
    again = Monitoring.model_validate_json(settings.model_dump_json())
    for one in (settings, again):
        assert one.allowed("page", "psi") == 0.3
        assert one.allowed("country", "psi") is None
        assert one.allowed("history", "psi") == 0.5
        assert one.allowed("history", "jensen_shannon") == 0.2


def test_a_limit_of_something_that_is_not_measured_is_refused(config):
    def with_limits(of):
        return RunConfig.model_validate(config.model_dump() | {"monitoring": {"of": of}})

    kept = with_limits({"history.length": {"psi": 1.0}, "recommended.scores": {"psi": None}})
    assert kept.monitoring.allowed("history.length", "psi") == 1.0
    told = (
        r"monitoring\.of\.hystory: .*there are history, history.length, user_id, clicked.hour, rec"
    )
    with pytest.raises(ValidationError, match=told):
        with_limits({"hystory": {"psi": 1.0}})
    with pytest.raises(ValidationError, match=r"monitoring\.of\.history\.ks"):
        with_limits({"history": {"ks": 1.0}})


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("number", ("x",)),
        ("category", ("x",)),
        ("time", ("x.hour",)),
        ("text", ("x.words",)),
        ("vector", ("x.norm",)),
    ],
)
def test_each_kind_of_feature_has_its_distributions(kind, names):
    dim = 3 if kind == "vector" else None
    assert distributions_of(Feature(name="x", side="query", kind=kind, dim=dim)) == names
