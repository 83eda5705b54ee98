import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError, IndexReport
from recsys.config import Export
from recsys.dataset import raw_batches, read_corpus
from serving_export import verify as module
from serving_export.verify import Expectation, verify

REPORT = IndexReport(
    kind="brute_force", parameters={}, recall=1, k=10, bytes=1, milliseconds_per_query=1
)


@pytest.fixture(scope="module")
def expectation(world, tiny, tmp_path_factory):
    """The data of the world, written again: its own folder is gone."""
    data = tiny.write_data(tmp_path_factory.mktemp("data"))
    corpus = read_corpus(data)
    queries = next(iter(raw_batches(data, data.test, 40).as_numpy_iterator()))
    model = world.models["exact"]

    def embed(signature, features):
        inputs = {name: tf.constant(values) for name, values in features.items()}
        return model.signatures[signature](**inputs)["embedding"].numpy()

    return Expectation(
        data=data,
        corpus=corpus,
        queries=queries,
        embeddings=embed("embed_candidate", corpus.features),
        embedded={"embedding": embed("embed_query", queries)},
    )


def test_scores_know_cold_queries_and_seen_items(expectation):
    cold = [n for n, cold in enumerate(expectation._cold()) if cold]
    assert cold
    assert all(n >= 6 for n in cold)  # the first six have a user of the vocabulary
    scores = expectation.scores()
    assert (np.diff(scores[cold], axis=1) <= 0).all()  # the corpus is ordered by popularity
    assert np.isfinite(scores).all()
    seen_data = expectation.data.model_copy(update={"exclude_seen": True})
    seen = dataclasses.replace(expectation, data=seen_data).scores()
    for query, history in enumerate(expectation.queries["history"]):
        assert np.isneginf(seen[query]).sum() == len(set(history) - {b""})


def test_other_answers_than_the_exact_ones_are_refused(expectation, variants, monkeypatch):
    answers = []
    ask = module.ask

    def ask_once(*request):
        answers[:] = answers or [ask(*request)]
        return answers[0]

    monkeypatch.setattr(module, "ask", ask_once)
    embedded = {"embedding": -expectation.embedded["embedding"]}
    turned = dataclasses.replace(expectation, embedded=embedded)
    with pytest.raises(ArtifactError, match=r"exact SavedModel.* gives 0\.\d+ of the expected"):
        verify(turned, variants, REPORT, Export())
    monkeypatch.setattr("serving_export.verify._equal", lambda *_, **__: np.ones(1))
    with pytest.raises(ArtifactError, match=r"scann SavedModel.* has recall@10 0\.\d+ on 40"):
        verify(turned, variants, REPORT, Export())


def test_model_that_does_not_load_shows_its_traceback(expectation, variants, tmp_path):
    broken = variants | {"exact": tmp_path}
    with pytest.raises(ArtifactError) as error:
        verify(expectation, broken, REPORT, Export())
    assert "does not answer in a fresh process (exit code 1)" in str(error.value)
    assert "Traceback (most recent call last)" in str(error.value)
    assert "SavedModel file does not exist" in str(error.value)


def test_where_fewer_than_k_may_be_returned_each_of_them_must_be(expectation):
    corpus, scores = expectation.corpus, np.full((2, len(expectation.corpus)), -np.inf)
    scores[:, [4, 7]] = [[1.0, 2.0]]
    first, second = (bytes(corpus.item[row]) for row in (7, 4))
    answer = {"ids": np.array([[first, second, b""], [first, b"", b""]])}
    assert module._recall(corpus, scores, answer) == 5 / 6
