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
