import numpy as np
import pytest

from recsys.artifacts import ArtifactError
from recsys.dataset import read_corpus
from training.outcomes import Outcomes, read_outcomes

QUERIES = [("u", "b", "a"), ("v", "f", "ab"), ("w", "zz", "c")]
FOLLOWED = [
    [("b", "buy"), ("b", "cart"), ("c", "view")],
    [],
    [("zz", "buy"), ("f", "cart")],
]


@pytest.fixture
def data(tiny_data):
    outcomes = {"validation": FOLLOWED}
    return tiny_data([("t", "b", "a")], QUERIES, [("n", "a", "a")], outcomes=outcomes)


def test_outcomes_are_read_by_query_item_and_task(data):
    found = read_outcomes(data, data.validation, read_corpus(data), ["cart", "buy"])
    assert found.tasks == ("cart", "buy")
    rows = zip(found.query.tolist(), found.item.tolist(), found.task.tolist(), strict=True)
    # Views are no task; zz is not in the corpus.
    assert list(rows) == [(0, 1, 1), (0, 1, 0), (2, -1, 1), (2, 5, 0)]


def test_data_of_another_config_are_refused(data):
    older = data.model_copy(update={"outcomes": False})
    with pytest.raises(ArtifactError, match=r"without ranking\.tasks.*run `recsys prepare` again"):
        read_outcomes(older, older.validation, read_corpus(older), ["buy"])


def test_candidates_have_the_outcomes_of_their_own_query():
    query, item, task = [0, 1, 1, 2], [7, 3, -1, 7], [0, 1, 1, 0]
    outcomes = Outcomes(("a", "b"), np.array(query), np.array(item, np.int32), np.array(task))
    found = outcomes.of(slice(1, 3), np.array([[3, 7, -1], [3, 7, -1]], np.int32))
    assert found.shape == (2, 3, 2)
    assert np.argwhere(found).tolist() == [[0, 0, 1], [1, 1, 0]]
