"""A tiny world: prepared data written by hand, towers that are looked up rather than trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import Corpus, Examples, PreparedData, Statistics, TrainedModel, VocabularyFile
from recsys.config import RunConfig
from recsys.features import raw_signature
from recsys.schema import Feature
from serving_export.savedmodel import export

DIM = 8
NUM_ITEMS = 60
NUM_KNOWN = 50
FEATURES = (
    Feature(name="history", side="query", kind="history", of="item_id", length=5),
    Feature(name="member", side="query", kind="id", column="user"),
    Feature(name="country", side="context", kind="category"),
    Feature(name="basket", side="query", kind="number"),
    Feature(name="clicked_at", side="query", kind="time", column="time"),
    Feature(name="item_id", side="candidate", kind="id", column="item"),
    Feature(name="price", side="candidate", kind="number"),
)


def run_config(features=FEATURES, **export_settings) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {
                "events": {
                    "path": "clicks.csv",
                    "columns": {"user": "user", "item": "item", "time": "time"},
                },
                "split": {"kind": "leave_last_out"},
            },
            "features": [f.model_dump() for f in features],
            "export": {"index": {"k": 10, "min_recall": 0.9}, "parity_queries": 16}
            | export_settings,
            "registry": {"model": "tiny", "gate": {"metric": "ndcg@10"}},
            "evaluation": {"k": [10]},
        }
    )


def item(row: int) -> str:
    return f"Ærtikel {row:05d}"


def write_records(file: Path, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for row in rows:
            writer.write(_example(row).SerializeToString())


def _example(row) -> tf.train.Example:
    features = {}
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], float):
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        elif values and isinstance(values[0], int):
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        else:
            encoded = [v.encode() for v in values]
            features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))
    return tf.train.Example(features=tf.train.Features(feature=features))


class Towers(tf.Module):
    """Item vector, and the sum of those of history and user: lookups, so answers are predictable."""

    def __init__(self, data: PreparedData, vectors) -> None:
        super().__init__()
        self.vectors = tf.Variable(vectors)
        self.tables = {
            name: tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(data.directory / file.path), tf.string, 0, tf.int64, 1, delimiter="\n"
                )
                if False
                else tf.lookup.TextFileInitializer(
                    str(data.directory / file.path),
                    tf.string,
                    tf.lookup.TextFileIndex.WHOLE_LINE,
                    tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                ),
                default_value=NUM_ITEMS,
            )
            for name, file in data.vocabularies.items()
        }
