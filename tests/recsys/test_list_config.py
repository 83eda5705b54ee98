import pytest
from pydantic import ValidationError

from recsys.config import Export
from recsys.list_config import Diversity


def test_a_list_ends_as_scores_say_unless_asked():
    assert Export().diversity is None
    assert Export.model_validate({"diversity": {}}).diversity == Diversity(relevance=0.7, pool=100)


@pytest.mark.parametrize("wrong", [{"relevance": 1.1}, {"relevance": -0.1}, {"pool": 1}, {"x": 1}])
def test_impossible_diversity_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Diversity.model_validate(wrong)
