"""ScaNN searchers as tensors: train one for a corpus, search it, change how it reorders.

Built on ScaNN's TensorFlow ops, not on the layer of TFRS: that one knows neither reordering nor
a number of neighbours chosen at call time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scann.scann_ops.py import scann_ops

Floats = NDArray[np.float32]
Kind = Literal["brute_force", "hashed", "tree"]

_DIMENSIONS_PER_BLOCK = 2
#: Vectors that a tree is trained on, per leaf and at least: with 100,000 in all (ScaNN's default)
#: a tree of 2000 leaves over a million takes four times as long to search for the same recall.
_SAMPLE_PER_LEAF = 256
_LEAST_SAMPLE = 100_000
_ANISOTROPIC_THRESHOLD = 0.2
#: Vectors that are rounded at once, so that no second copy of the corpus is made on the way.
_ROWS = 65_536
#: `exact_reordering.fixed_point.enabled` in ScaNN's serialised config, off and on.
_FLOAT32 = b"*\x0b\x08\x00A\x00\x00\x00\x00\x00\x00\xf8\x7f"
_INT8 = _FLOAT32.replace(b"\x08\x00", b"\x08\x01")


@dataclass(frozen=True, slots=True)
class Structure:
    """What has to be trained: all else is chosen at call time.

    Attributes:
        kind: exact scores; anisotropic product quantisation (Guo et al., ICML 2020) of all
            candidates; or of those in the leaves of a k-means tree.
        num_leaves: 1 without a tree.
        avq: exponent by which leaf centres follow long vectors more closely, which is how ScaNN
            keeps a tree honest where norms differ; None leaves plain k-means centres.
    """

    kind: Kind
    num_leaves: int = 1
    avq: float | None = None

    def __str__(self) -> str:
        if self.kind != "tree":
            return self.kind
        return f"tree of {self.num_leaves} leaves" + (f", AVQ {self.avq:g}" if self.avq else "")


class State(NamedTuple):
    """A searcher as nine tensors, in the order in which the op that restores one takes them."""

    dataset: tf.Tensor
    config: tf.Tensor
    partitioner: tf.Tensor
    tokens: tf.Tensor
    codebook: tf.Tensor
    hashed: tf.Tensor
    int8: tf.Tensor
    multipliers: tf.Tensor
    norms: tf.Tensor

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(_raw(tensor).nbytes for tensor in self)

    def digest(self) -> str:
        """Name by content, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for tensor in self:
            digest.update(_raw(tensor))
        return digest.hexdigest()[:16]


def train(embeddings: Floats | tf.Tensor, structure: Structure) -> State:
    """Train a searcher by dot product that reorders in float32.

    Clustering starts from k-means++, which ScaNN seeds with a constant: equal embeddings give an
    equal state (its default, random starts, gives another one each time).

    Args:
        embeddings: `[num_candidates, dim]`; a tensor becomes part of the state as it is, so that
            all searchers of a corpus hold it once.
        structure: what to train.
    """
    corpus = tf.convert_to_tensor(embeddings)
    # Numbers of neighbours are given with each search; those in the config are never used.
    builder = scann_ops.builder(corpus, 1, "dot_product")
    if structure.kind == "brute_force":
        builder = builder.score_brute_force()
    else:
        if structure.kind == "tree":
            builder = builder.tree(
                structure.num_leaves,
                structure.num_leaves,
                training_sample_size=max(_LEAST_SAMPLE, _SAMPLE_PER_LEAF * structure.num_leaves),
                random_init=False,
                avq=structure.avq,
            )
        builder = builder.score_ah(
            _DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD
        ).reorder(1)
    searcher = builder.build().searcher_handle
    *tensors, dataset = scann_ops.scann_to_tensors(searcher)
    tf.raw_ops.DestroyResourceOp(resource=searcher)
    if dataset.shape != corpus.shape:
        raise RuntimeError(f"ScaNN gives {dataset.shape} vectors back, not {corpus.shape}")
    return State(corpus, *map(_defined, tensors))


def reordering_int8(state: State) -> State:
    """Replace the float32 vectors that candidates are scored with again by rounded ones.

    Gives what ScaNN trains with `reorder(quantize=INT8)`, up to rounding, without training anew.
    bfloat16 is not offered: ScaNN's ops do not write such vectors out, so that a saved index has
    to carry the float32 ones.

    Raises:
        RuntimeError: the searcher does not reorder in float32, or ScaNN's config has changed.
    """
    config = bytes(state.config.numpy()[0])
    if config.count(_FLOAT32) != 1:
        raise RuntimeError(f"ScaNN's config does not say how it reorders: {config!r}")
    vectors = np.asarray(state.dataset)
    largest = np.maximum(vectors.max(axis=0), -vectors.min(axis=0))
    multipliers = np.where(largest > 0, 127 / np.where(largest > 0, largest, 1), 1)
    multipliers = multipliers.astype(np.float32)
    rounded = np.empty(vectors.shape, np.int8)
    for start in range(0, len(vectors), _ROWS):
        few = slice(start, start + _ROWS)
        rounded[few] = np.rint(vectors[few] * multipliers)
    return state._replace(
        dataset=tf.zeros([]),
        config=tf.constant([config.replace(_FLOAT32, _INT8)]),
        int8=tf.constant(rounded),
        multipliers=tf.constant(multipliers),
    )


@contextmanager
def restored(state: State) -> Iterator[tf.Tensor]:
    """Yield the handle of a searcher and free it in the end: TensorFlow would keep it for ever."""
    handle = scann_ops.tensors_to_scann(*state, shared_name=f"tuned-{state.digest()}")
    try:
        yield handle
    finally:
        tf.raw_ops.DestroyResourceOp(resource=handle)


def search(
    handle: tf.Tensor,
    queries: tf.Tensor,
    count: tf.Tensor | int,
    reorder: tf.Tensor | int,
    leaves: tf.Tensor | int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Find corpus rows and scores, `[batch, <= count]`, on one thread.

    Args:
        handle: of a searcher.
        queries: `[batch, dim]`.
        count: of neighbours.
        reorder: how many candidates to score again.
        leaves: to search.
    """
    found = scann_ops.scann_search_batched(handle, queries, count, reorder, leaves, False)
    return found.indices, found.distances


def _defined(tensor: tf.Tensor) -> tf.Tensor:
    # ScaNN leaves the scalars that stand for absent parts uninitialised: zeros repeat, they do not.
    absent = tensor.shape.rank == 0 and tensor.dtype != tf.string
    return tf.zeros_like(tensor) if absent else tensor


def _raw(tensor: tf.Tensor) -> memoryview:
    if tensor.dtype == tf.string:
        return memoryview(b"".join(np.ravel(tensor.numpy()).tolist()))
    # `numpy()` would copy the corpus.
    return np.ascontiguousarray(np.asarray(tensor)).data.cast("B")
