"""From raw features to a dense vector: vocabularies, encoding, embeddings.

Encoding (strings to integers, numbers to z-scores) has no weights, so it runs in the input
pipeline while training and inside the graph while serving: the same object does both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import tensorflow as tf

from recsys.artifacts import PreparedData
from recsys.schema import Feature, Schema
from recsys.text import PretrainedText, hash_words

#: Ids hold no line break, so this is none.
_NO_VALUE = "\n"
_SECONDS_PER_DAY = 86_400
_DAYS_PER_WEEK = 7


class FeatureEncoder(tf.Module):
    """Turn raw features into integers and floats.

    | kind | raw | encoded |
    |---|---|---|
    | id, category | string `[batch]` | int64 `[batch]`: 0 missing, then OOV buckets, vocabulary |
    | history | string `[batch, length]` | int64 `[batch, length]`, in the vocabulary of `of` |
    | text | string `[batch]` | int64 `[batch, num_grams]`: 0 padding, then hashed n-grams |
    | text, `encoder` | string `[batch]` | float `[batch, dim of the encoder]`: frozen vectors |
    | vector | float `[batch, dim]` | the same; 0 for what is not finite |
    | number | float `[batch]` | float `[batch, 2]`: z-score, and 1 when missing or infinite |
    | time | int64 `[batch]` | float `[batch, 4]`: sine and cosine of hour of day and day of week |
    """

    def __init__(self, data: PreparedData) -> None:
        super().__init__()
        self._schema = data.features
        self._statistics = dict(data.statistics)
        self._lookups = {
            name: tf.keras.layers.StringLookup(
                # No file without lines can be read; a value that no id has stands in for it.
                vocabulary=str(data.directory / file.path) if file.size else [_NO_VALUE],
                num_oov_indices=file.oov,
                mask_token="",
            )
            for name, file in data.vocabularies.items()
        }
        self._pretrained = {f.name: PretrainedText(f) for f in self._schema.features if f.encoder}

    def vocabulary_sizes(self) -> dict[str, int]:
        """Rows that an embedding table needs, by feature that owns a vocabulary."""
        return {name: lookup.vocabulary_size() for name, lookup in self._lookups.items()}

    def vocabulary(self, name: str) -> list[str]:
        """Value of every row of a feature's table; "" and "[UNK]" for missing and unknown ones."""
        values: list[str] = self._lookups[name].get_vocabulary()
        return values

    def reserved_rows(self, name: str) -> int:
        """Number of rows of a feature's table that stand for no value: missing and unknown ones."""
        return 1 + int(self._lookups[name].num_oov_indices)

    def __call__(self, raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Encode the features that are present in `raw`; other keys pass through."""
        known = {feature.name: feature for feature in self._schema.features}
        return {
            name: self._encode(known[name], value) if name in known else value
            for name, value in raw.items()
        }

    # AutoGraph knows no `match`, and would warn at each training; the error that it logs with the
    # warning crashed Python 3.11 where the record was freed.
    @tf.autograph.experimental.do_not_convert
    def _encode(self, feature: Feature, value: tf.Tensor) -> tf.Tensor:
        match feature.kind:
            case "id" | "category" | "history":
                return self._lookups[feature.of or feature.name](value)
            case "text" if feature.encoder is None:
                return hash_words(value, feature)
            case "text":
                return self._pretrained[feature.name](value)
            case "vector":
                return tf.where(tf.math.is_finite(value), value, tf.zeros_like(value))
            case "number":
                return self._standardise(feature.name, value)
            case "time":
                return _cyclic(value)

    def _standardise(self, name: str, value: tf.Tensor) -> tf.Tensor:
        missing = tf.logical_not(tf.math.is_finite(value))
        statistics = self._statistics[name]
        score = (value - statistics.mean) / statistics.std
        return tf.stack(
            [tf.where(missing, tf.zeros_like(score), score), tf.cast(missing, score.dtype)], axis=-1
        )


class FeatureEmbedding(tf.keras.layers.Layer):
    """Embedding tables, one per vocabulary; histories share the table of what they list."""

    def __init__(self, schema: Schema, sizes: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self._tables = {
            feature.name: _table(feature.name, sizes[feature.name], feature.dim or dim)
            for feature in schema.vocabularies
        } | {
            feature.name: _table(feature.name, feature.buckets + 1, feature.dim or dim)
            for feature in schema.features
            if feature.is_hashed
        }

    def tables(self, features: Sequence[Feature]) -> list[tf.Variable]:
        """Tables that these features have a row of."""
        names = [feature.name for feature in features if feature.name in self._tables]
        return [variable for name in names for variable in self._tables[name].trainable_variables]

    def rows(self, feature: Feature) -> int:
        """Rows of a feature's own table."""
        rows: int = self._tables[feature.name].input_dim
        return rows

    def sequence(self, feature: Feature, encoded: tf.Tensor) -> tf.Tensor:
        """Embed a history: `[batch, length]` to `[batch, length, dim]`."""
        return self._tables[feature.of or ""](encoded)

    def call(self, features: Sequence[Feature], encoded: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Concatenate the vectors of features without histories, `[batch, sum of dims]`."""
        return tf.concat([self._vector(f, encoded[f.name]) for f in features], axis=-1)

    def _vector(self, feature: Feature, encoded: tf.Tensor) -> tf.Tensor:
        if feature.has_vocabulary:
            return self._tables[feature.name](encoded)
        if feature.is_hashed:
            return masked_mean(self._tables[feature.name](encoded), encoded > 0)
        return encoded


def masked_mean(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Mean of `[batch, length, dim]` over the positions where `[batch, length]` is true."""
    weights = tf.cast(mask, values.dtype)[..., tf.newaxis]
    return tf.math.divide_no_nan(
        tf.reduce_sum(values * weights, axis=1), tf.reduce_sum(weights, axis=1)
    )


def raw_signature(features: Sequence[Feature]) -> dict[str, tf.TensorSpec]:
    """Specs of raw inputs by name: string, float32 or int64 `[None]` and the shape of a value."""
    dtypes = {"string": tf.string, "float": tf.float32, "int64": tf.int64}
    return {f.name: tf.TensorSpec([None, *f.shape], dtypes[f.dtype], f.name) for f in features}


def _table(name: str, rows: int, dim: int) -> tf.keras.layers.Embedding:
    # Rows of about unit length keep cosine gradients at the scale of the learning rate.
    initializer = tf.keras.initializers.RandomNormal(stddev=1 / math.sqrt(dim))
    return tf.keras.layers.Embedding(rows, dim, embeddings_initializer=initializer, name=name)


def _cyclic(microseconds: tf.Tensor) -> tf.Tensor:
    days = tf.cast(microseconds, tf.float64) / (1e6 * _SECONDS_PER_DAY)
    # 1970-01-01 was a Thursday; the phase is learned, so no offset is needed.
    angles = tf.stack([days, days / _DAYS_PER_WEEK], axis=-1) * (2 * math.pi)
    waves = tf.cast(tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1), tf.float32)
    return tf.where(microseconds[:, tf.newaxis] < 0, tf.zeros_like(waves), waves)
