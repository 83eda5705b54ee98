"""A run of any size that nothing has trained: for speed, which does not depend on what is learned.

Items are clustered vectors, queries the means of their histories. The index is tuned and the
export verified as any other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from recsys.artifacts import (
    Corpus,
    Examples,
    ExportedModel,
    PreparedData,
    Sequences,
    TrainedModel,
    TrainedRanker,
    VocabularyFile,
)
from recsys.calibration import Calibration
from recsys.config import RunConfig
from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder, raw_signature
from recsys.item_statistics import STATISTICS
from recsys.models.ranker_features import KnownItems
from recsys.models.ranking import Ranker
from serving_export.savedmodel import export

DIM = 64
HISTORY = 10
CLUSTERS = 500


def run_config(name: str, k: int, cores: int = 1) -> RunConfig:
    """Items by id, users by their history; nothing else."""
    item = {"side": "candidate", "kind": "id", "column": "item"}
    history = {"side": "query", "kind": "history", "of": "item_id", "length": HISTORY}
    columns = {"user": "user", "item": "item", "time": "time"}
    return RunConfig.model_validate(
        {
            "name": name,
            "data": {
                "events": {"path": "none.csv", "columns": columns},
                "split": {"kind": "leave_last_out"},
                "min_history": 1,
            },
            "features": [{"name": "history"} | history, {"name": "item_id"} | item],
            "evaluation": {"k": [k]},
            "export": {"index": {"k": k, "max_seconds": 60}, "parity_queries": 32},
            "registry": {"model": name, "gate": {"metric": f"ndcg@{k}"}},
            "scoring": {"k": k},
            "cluster": {"master": f"local[{cores}]"},
        }
    )


class Towers(tf.Module):
    """An item is a vector of its cluster, a query the mean of its history."""

    def __init__(self, vocabulary: Path, num_items: int) -> None:
        super().__init__()
        random = np.random.default_rng(1)
        centres = random.standard_normal((CLUSTERS, DIM), np.float32)
        items = centres[random.integers(0, CLUSTERS, num_items)]
        items += np.float32(0.6) * random.standard_normal(items.shape, np.float32)
        items *= np.exp(np.float32(0.3) * random.standard_normal((num_items, 1), np.float32)) / 8
        self.vectors = tf.Variable(np.concatenate([items, np.zeros([1, DIM], np.float32)]))
        lines = tf.lookup.TextFileInitializer(
            str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER,
        )  # fmt: skip
        self.rows = tf.lookup.StaticHashTable(lines, default_value=num_items)

    def embed_query(self, history: tf.Tensor) -> dict[str, tf.Tensor]:
        """Mean of the items."""
        vectors = tf.gather(self.vectors, self.rows.lookup(history))
        return {"embedding": tf.reduce_mean(vectors, axis=1)}

    def embed_candidate(self, item_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """Vector of the item."""
        return {"embedding": tf.gather(self.vectors, self.rows.lookup(item_id))}


def histories(num_queries: int, num_items: int, seed: int) -> list[list[str]]:
    """Random histories, as item ids."""
    rows = np.random.default_rng(seed).integers(0, num_items, (num_queries, HISTORY))
    return [[f"i{row}" for row in each] for each in rows.tolist()]


def prepared(config: RunConfig, folder: Path, num_items: int) -> PreparedData:
    """A corpus, its vocabulary and test queries, written by hand."""
    for name in ("corpus", "test"):
        (folder / name).mkdir(parents=True)
    items = [f"i{row}" for row in range(num_items)]
    (folder / "items.txt").write_text("\n".join(items) + "\n")
    with tf.io.TFRecordWriter(str(folder / "corpus" / "part-0")) as writer:
        for item in items:
            writer.write(_example(item=[item], name=[item], item_id=[item], count=[1], labels=[1]))
    with tf.io.TFRecordWriter(str(folder / "test" / "part-0")) as writer:
        for history in histories(1000, num_items, 3):
            writer.write(_example(user=["u"], label=["i0"], history=history))
    nothing = Examples(path="none", num_examples=0, num_files=0)
    sequences = Sequences(path="none", num_sequences=0, num_examples=0, num_files=0)
    return PreparedData(
        directory=folder,
        features=config.schema_,
        fingerprint=config.schema_.fingerprint,
        train=sequences,
        recent=sequences,
        validation=nothing,
        test=Examples(path="test", num_examples=1000, num_files=1),
        corpus=Corpus(path="corpus", num_items=num_items, num_warm=num_items),
        users="users",
        num_users=0,
        vocabularies={"item_id": VocabularyFile(path="items.txt", size=num_items, oov=1)},
        statistics={},
        cleaning={},
        sources={},
        exclude_seen=False,
    ).save()


def _example(**columns: list[str] | list[int]) -> bytes:
    features = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        if isinstance(values[0], int)
        else tf.train.Feature(bytes_list=tf.train.BytesList(value=[v.encode() for v in values]))
        for name, values in columns.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def trained(config: RunConfig, folder: Path, num_items: int) -> tuple[PreparedData, TrainedModel]:
    """Data and towers, as if a run had come so far."""
    data = prepared(config, folder / "data", num_items)
    towers = Towers(data.directory / "items.txt", num_items)
    signatures = {
        name: tf.function(embed).get_concrete_function(**raw_signature(features))
        for name, embed, features in (
            ("embed_query", towers.embed_query, data.features.query),
            ("embed_candidate", towers.embed_candidate, data.features.candidate),
        )
    }
    tf.saved_model.save(towers, str(folder / "model" / "towers"), signatures=signatures)
    return data, TrainedModel(
        directory=folder / "model", towers="towers", features=data.features, embedding_dim=DIM,
        best_epoch=1, monitor="", curves={}, mlflow_run_id=None, versions={},
    )  # fmt: skip


def exported(config: RunConfig, folder: Path, num_items: int) -> ExportedModel:
    """Export into `folder/export`; of two stages where the config has `ranking`."""
    data, model = trained(config, folder, num_items)
    ranker = None if config.ranking is None else _ranker(config, data, folder / "ranking")
    return export(config, data, model, folder / "export", ranker)


def _ranker(config: RunConfig, data: PreparedData, folder: Path) -> TrainedRanker:
    """The ranker that a training begins with: it keeps the order of retrieval at full cost."""
    assert config.ranking is not None
    random = np.random.default_rng(2)
    corpus, size = read_corpus(data), data.corpus.num_items
    statistics = random.standard_normal((size, len(STATISTICS)), np.float32)
    vectors = random.standard_normal((size, DIM), np.float32)
    items = KnownItems(corpus, vectors, statistics)
    ranker = Ranker(config.ranking, data.features, FeatureEncoder(data), items, seed=1)
    request = {
        "history": tf.constant([["i0"] * HISTORY]),
        "candidates": tf.zeros([1, 2], tf.int32),
        "retrieval_scores": tf.zeros([1, 2]),
    }
    ranker(ranker.features(request))
    ranker.save_ranker(folder / "ranker", statistics, Calibration(1.0, 0.0))
    return TrainedRanker(
        directory=folder, ranker="ranker", lists={}, with_label={}, features=data.features,
        candidates=config.ranking.candidates, best_epoch=1, curves={}, held_out={}, versions={},
    ).save()  # fmt: skip
