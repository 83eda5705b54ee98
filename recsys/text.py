"""Text to numbers: hashed words and n-grams, or the vectors of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.schema import Feature

#: Scripts that put no space between words: each of their characters counts as a word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_SPACES = r"\p{Z}+"
_SIGNATURES = ("serving_default", "default")
#: Texts encoded at once: bounds the memory of a large encoder on a large corpus.
_CHUNK = 256


def num_grams(feature: Feature) -> int:
    """Places of a hashed text: its `length` words, and all n-grams of so many words."""
    return sum(max(feature.length - n, 0) for n in range(feature.ngrams))


def hash_words(texts: tf.Tensor, feature: Feature) -> tf.Tensor:
    """Hash words and word n-grams without case, string `[batch]` to int64 `[batch, num_grams]`.

    The first `length` words count; buckets are numbered from 1, 0 is padding. An n-gram is its
    words with a space between them, hashed like a word (the features of fastText, Joulin et al.,
    EACL 2017, section 2.2, over words).
    """
    spaced = tf.strings.regex_replace(tf.strings.lower(texts, "utf-8"), _UNSPACED, r" \0 ")
    words = tf.strings.split(tf.strings.regex_replace(spaced, _SPACES, " "))[:, : feature.length]
    grams = tf.strings.ngrams(words, tuple(range(1, feature.ngrams + 1)))
    hashed = tf.strings.to_hash_bucket_fast(grams, feature.buckets) + 1
    return hashed.to_tensor(0, shape=[None, num_grams(feature)])


class PretrainedText(tf.Module):
    """A frozen encoder: a SavedModel in TF Hub's format, from texts to vectors.

    The SavedModel is callable on strings `[batch]`, or has a signature `serving_default` or
    `default` with one input of strings `[batch]`. It answers one output, or several of which one
    is called `default`: floats `[batch, dim]`. It is part of every SavedModel that holds this
    module, with its variables, tables and assets.

    Attributes:
        dim: size of a vector.
    """

    def __init__(self, feature: Feature) -> None:
        """Load the SavedModel and try it.

        Raises:
            ArtifactError: it cannot be loaded, or does not answer as it should; the message
                names feature and path.
        """
        super().__init__()
        self._where = f"feature {feature.name!r}: encoder {feature.encoder}"
        # Queries are encoded in the input pipeline, whose place is the CPU; items are not.
        with tf.device("CPU" if feature.side != "candidate" else None):
            self._model = self._load(str(feature.encoder))
        self._signature = self._find_signature()
        self.dim = int(self._try().shape[1])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, texts: tf.Tensor) -> tf.Tensor:
        """Encode texts `[batch]` as float32 `[batch, dim]`, some at a time; "" gives zeros."""
        num_chunks = (tf.shape(texts)[0] + _CHUNK - 1) // _CHUNK
        parts = tf.TensorArray(
            tf.float32, num_chunks, element_shape=[None, self.dim], infer_shape=False
        )
        for chunk in tf.range(num_chunks):
            some = texts[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            parts = parts.write(chunk, tf.cast(self._encode(some), tf.float32))
        vectors = tf.ensure_shape(parts.concat(), [None, self.dim])
        return tf.where((texts == "")[:, tf.newaxis], tf.zeros_like(vectors), vectors)

    def _load(self, path: str) -> Any:
        try:
            return tf.saved_model.load(path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise ArtifactError(
                f"{self._where} cannot be loaded as a SavedModel: {error}"
            ) from error

    def _find_signature(self) -> str | None:
        """Name of the signature to ask, None where the SavedModel itself can be called."""
        if callable(self._model):
            return None
        names = sorted(getattr(self._model, "signatures", {}))
        found = next((name for name in _SIGNATURES if name in names), None)
        if found is None:
            raise ArtifactError(
                f"{self._where} cannot be called and has none of the signatures "
                f"{', '.join(_SIGNATURES)}; it has {names}"
            )
        inputs = self._model.signatures[found].structured_input_signature[1]
        if [spec.dtype for spec in inputs.values()] != [tf.string]:
            given = {
                name: f"{spec.dtype.name} {spec.shape}" for name, spec in sorted(inputs.items())
            }
            raise ArtifactError(
                f"{self._where}: signature {found!r} must have one input of strings [batch], "
                f"it has {given}"
            )
        return found

    def _encode(self, texts: tf.Tensor) -> tf.Tensor:
        if self._signature is None:
            return self._only(self._model(texts))
        function = self._model.signatures[self._signature]
        (name,) = function.structured_input_signature[1]
        return self._only(function(**{name: texts}))

    def _only(self, answer: Any) -> Any:
        if not isinstance(answer, Mapping):
            return answer
        if len(answer) > 1 and "default" not in answer:
            raise ArtifactError(
                f"{self._where} has several outputs, expected one of them to be called "
                f"'default'; there are {sorted(answer)}"
            )
        return answer["default"] if len(answer) > 1 else next(iter(answer.values()))

    def _try(self) -> tf.Tensor:
        """Encode two texts, `[2, dim]`."""
        try:
            answer = self._encode(tf.constant(["", "a text"]))
        except (TypeError, ValueError, tf.errors.OpError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"{self._where} does not take strings of shape [batch]: {reason}"
            ) from error
        dtype, shape = getattr(answer, "dtype", None), list(getattr(answer, "shape", []))
        if dtype is None or not dtype.is_floating or len(shape) != 2 or shape[0] != 2:
            found = f"{dtype.name} {shape}" if dtype else type(answer).__name__
            raise ArtifactError(
                f"{self._where} must answer 2 texts with floats [2, dim], it gives {found}"
            )
        return answer
