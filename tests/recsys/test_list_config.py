import pytest
from pydantic import ValidationError

from recsys.config import ConfigError, Export, load_config
from recsys.list_config import Diversity, EpsilonGreedy, Thompson


def test_a_list_ends_as_scores_say_unless_asked():
    assert Export().diversity is None
    assert Export.model_validate({"diversity": {}}).diversity == Diversity(relevance=0.7, pool=100)


@pytest.mark.parametrize("wrong", [{"relevance": 1.1}, {"relevance": -0.1}, {"pool": 1}, {"x": 1}])
def test_impossible_diversity_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Diversity.model_validate(wrong)


def test_exploration_is_of_one_kind_with_the_keys_of_that_kind():
    def read(**settings):
        return Export.model_validate({"exploration": settings}).exploration

    assert read(kind="epsilon_greedy") == EpsilonGreedy(kind="epsilon_greedy", epsilon=0.1, slots=1)
    assert read(kind="thompson", scale=2) == Thompson(kind="thompson", scale=2.0, pool=100)
    for wrong in ({"slots": 0}, {"pool": 1}, {"epsilon": 0}, {"scale": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            read(kind="epsilon_greedy", **wrong)
    with pytest.raises(ValidationError, match="pool=3 leaves slots=3 nothing to choose from"):
        read(kind="thompson", slots=3, pool=3)


def test_pools_fit_each_other_and_what_is_ranked(clicks_config):
    with pytest.raises(ConfigError, match=r"exploration\.pool=9 is below diversity\.pool=10"):
        explore = "export.exploration={kind: thompson, pool: 9}"
        load_config(clicks_config, ["export.diversity.pool=10", explore])
    with pytest.raises(
        ConfigError, match=r"export\.diversity\.pool=60 exceeds ranking\.candidates"
    ):
        load_config(clicks_config, ["export.diversity.pool=60", "ranking.candidates=50"])
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        wrong = ["export.exploration.kind=epsilon_greedy", "export.exploration.epsylon=0.1"]
        load_config(clicks_config, wrong)
