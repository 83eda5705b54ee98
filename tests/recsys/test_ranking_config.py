import pytest

from recsys.config import ConfigError, load_config
from recsys.ranking_config import Ranking

MINIMAL = """
name: shop
data:
  events: {path: clicks.csv, format: csv, columns: {user: u, item: i, time: t}}
  split: {kind: time, validation_days: 1, test_days: 1}
features:
  - {name: history, side: query, kind: history, of: item_id}
  - {name: item_id, side: candidate, kind: id, column: item}
registry: {model: shop}
"""


@pytest.fixture
def shop(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text(MINIMAL)
    return file


def test_without_a_section_nothing_is_ranked(shop):
    assert load_config(shop).ranking is None


def test_a_section_may_say_as_little_as_one_key(shop):
    ranking = load_config(shop, ["ranking.candidates=200"]).ranking
    assert ranking == Ranking(candidates=200)


def test_no_answer_may_be_longer_than_what_is_ranked(shop):
    with pytest.raises(ConfigError, match=r"evaluation\.k=100 exceeds ranking\.candidates=50"):
        load_config(shop, ["ranking.candidates=50"])
    with pytest.raises(ConfigError, match=r"scoring\.k=60 exceeds ranking\.candidates=50"):
        load_config(shop, ["ranking.candidates=50", "evaluation.k=[20]", "scoring.k=60"])


def test_an_unknown_key_names_the_nearest(shop):
    with pytest.raises(ConfigError, match="did you mean 'cross_rank'"):
        load_config(shop, ["ranking.cross_ranks=4"])


@pytest.fixture
def events(shop):
    """The shop with event types."""
    text = MINIMAL.replace("time: t}}", "time: t, event: e}}")
    types = "  event_types: {view: {label: false}, cart: {}, buy: {}}\n  split:"
    shop.write_text(text.replace("  split:", types))
    return shop


def test_the_score_is_the_first_task_or_what_is_said(events):
    ranking = load_config(events, ["ranking.tasks={buy: 1.0, cart: 0.5}"]).ranking
    assert ranking.task_order == (1.0, 0.0)
    order = "ranking.order={cart: 2.0}"
    ranking = load_config(events, ["ranking.tasks={buy: 1.0, cart: 0.5}", order]).ranking
    assert ranking.task_order == (0.0, 2.0)
    ranking = load_config(events, ["ranking.tasks={buy: 0.0, cart: 0.5}"]).ranking
    assert ranking.task_order == (0.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ranking.tasks={bay: 1.0}"], r"'bay' is none of data\.event_types.*'cart', 'buy'"),
        (
            ["ranking.tasks={buy: 1.0}", "ranking.order={cart: 1}"],
            r"'cart' is none of the learned tasks",
        ),
        (["ranking.tasks={buy: 0.0}"], r"tasks: at least one needs a weight above 0"),
        (["ranking.tasks={buy: 1.0}", "ranking.hidden=[]"], r"kind=mmoe needs layers in `hidden`"),
    ],
    ids=["unknown", "no task", "no weight", "no experts"],
)
def test_tasks_that_cannot_be_are_refused(events, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(events, overrides)


def test_outcomes_are_prepared_for_tasks_alone(events):
    assert load_config(events, ["ranking.tasks={buy: 1.0}"]).needs_outcomes
    assert not load_config(events, ["ranking.candidates=100"]).needs_outcomes
    assert not load_config(events).needs_outcomes


SHOWN = (
    "data.impressions={path: s.csv, columns: {request: r, user: u, item: i, time: t, clicked: y}}"
)


def test_impressions_belong_to_a_ranker_of_one_task(events):
    assert load_config(events, [SHOWN, "ranking.candidates=100"]).data.impressions.columns.request
    with pytest.raises(ConfigError, match=r"read by a second stage: add `ranking`"):
        load_config(events, [SHOWN])
    with pytest.raises(ConfigError, match=r"columns\.values: 'cost' is none .* numbers, \["):
        load_config(
            events,
            [SHOWN, "ranking.candidates=100", "data.impressions.columns.values={cost: c}"],
        )
    with pytest.raises(ConfigError, match=r"ranking\.tasks: impressions tell one label"):
        load_config(events, [SHOWN, "ranking.tasks={buy: 1.0}"])
