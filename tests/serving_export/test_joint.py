import numpy as np
import pytest
import tensorflow as tf

from recsys.dataset import raw_batches, read_corpus
from recsys.model_config import Joint
from recsys.models.dropout import Dropouts
from recsys.models.embed import embed, in_batches, load_towers
from recsys.models.joint import RankingHead
from recsys.models.towers import Towers
from serving_export.index import ExactIndex
from serving_export.joint import JointRetriever


@pytest.fixture
def towers(data, tiny, tmp_path):
    """Looked-up towers, with a head that was not trained."""
    model = tiny.write_model(data, tmp_path / "plain")
    plain = load_towers(model.directory / model.towers)
    dropouts = Dropouts(0.0, 1, tf.Variable(0, dtype=tf.int64))

    def tower(name):
        return lambda raw: plain.signatures[name](**raw)

    head = RankingHead(Joint(positive=("like",)), model.embedding_dim, False, dropouts, 1)
    both = tower("embed_query"), tower("embed_candidate")
    saved = Towers(data.features, lambda raw: raw, *both, head)
    saved.plain = plain
    saved.save(tmp_path / "joint")
    return load_towers(tmp_path / "joint"), head


def test_rank_asks_the_head(data, towers, tmp_path):
    towers, head = towers
    corpus = read_corpus(data)
    items = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    served = JointRetriever(towers, ExactIndex(items), corpus, data, items)
    tf.saved_model.save(served, str(tmp_path / "served"), served.signatures())
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    raw = next(iter(raw_batches(data, data.test, 3)))
    rows = np.array([[4, 0, -1], [59, 2, 2], [1, -1, 3]])
    candidates = np.append(corpus.item, [b"no such id"])[rows]
    candidates[2, 1] = b""
    answer = loaded.signatures["rank"](**raw, candidates=tf.constant(candidates, tf.string))
    queries = embed(towers, "embed_query", [raw])["embedding"]
    odds = [
        head(np.stack([query] * 3), items[own]) for query, own in zip(queries, rows, strict=True)
    ]
    expected = np.where(rows >= 0, odds, -np.inf)
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-4, atol=1e-5)
