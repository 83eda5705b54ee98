import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.schema import Feature
from recsys.text import PretrainedText, hash_words, num_grams

WORDS = ["red", "blue", "dress", "größe"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
ANSWER = """
import sys, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
print(loaded(tf.constant(["red dress", "", "größe"])).numpy().tolist())
assert not {name for name in sys.modules if name.split(".")[0] == "recsys"}
"""


def text(**changes):
    fields = {"name": "title", "side": "candidate", "kind": "text"} | changes
    return Feature.model_validate(fields)


def bucket(gram, buckets):
    return int(tf.strings.to_hash_bucket_fast(gram, buckets)) + 1


def hashed(value, **changes):
    feature = text(**changes)
    codes = hash_words(tf.constant([value]), feature).numpy()[0]
    assert len(codes) == num_grams(feature)
    return [code for code in codes if code]


@pytest.mark.parametrize(
    ("value", "ngrams", "grams"),
    [
        ("Red  DRESS", 1, ["red", "dress"]),
        ("red dress long", 2, ["red", "dress", "long", "red dress", "dress long"]),
        ("a b c", 3, ["a", "b", "c", "a b", "b c", "a b c"]),
        ("a b c d e f", 2, ["a", "b", "c", "d", "a b", "b c", "c d"]),
        ("one", 3, ["one"]),
        ("ÄRMEL\u00a0Größe", 2, ["ärmel", "größe", "ärmel größe"]),
        ("红色 dress", 2, ["红", "色", "dress", "红 色", "色 dress"]),
        ("платье Красное", 1, ["платье", "красное"]),
        ("", 3, []),
        (" \t\u3000", 2, []),
    ],
)
def test_grams_are_those_counted_by_hand(value, ngrams, grams):
    expected = [bucket(gram, 1000) for gram in grams]
    assert hashed(value, ngrams=ngrams, length=4, buckets=1000) == expected


def test_places_of_grams_fit_the_length():
    assert num_grams(text(length=4)) == 4
    assert num_grams(text(length=4, ngrams=3)) == 4 + 3 + 2
    assert num_grams(text(length=2, ngrams=5)) == 2 + 1
    many = hash_words(tf.constant(["a b c d e", "", "a"]), text(length=4, ngrams=3))
    assert many.shape == (3, 9)
    assert hash_words(tf.constant([], tf.string), text(length=4)).shape == (0, 4)


def test_an_encoder_answers_and_missing_text_is_zeros(save_encoder, tmp_path):
    encoder = PretrainedText(text(encoder=str(save_encoder(tmp_path / "e", WORDS, VECTORS))))
    assert encoder.dim == 3
    found = encoder(tf.constant(["red dress", "größe", "", "unheard of"])).numpy()
    expected = [(VECTORS[0] + VECTORS[2]) / 2, VECTORS[3], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert encoder.trainable_variables == ()


def test_large_batches_are_encoded_in_parts_and_empty_ones_too(tmp_path):
    class Counting(tf.Module):
        def __init__(self):
            super().__init__()
            self.largest = tf.Variable(0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, texts):
            self.largest.assign(tf.maximum(self.largest, tf.size(texts)))
            size = tf.fill(tf.shape(texts), tf.cast(self.largest, tf.float64))
            return tf.stack([tf.cast(tf.strings.length(texts), tf.float64), size], axis=1)

    tf.saved_model.save(Counting(), str(tmp_path / "counting"))
    encoder = PretrainedText(text(encoder=str(tmp_path / "counting")))
    found = encoder(tf.constant(["x" * (n % 7) for n in range(1000)]))
    assert found[:, 0].numpy().tolist() == [n % 7 for n in range(1000)]
    assert 2 < found[:, 1].numpy().max() <= 256
    assert found.dtype == tf.float32
    assert encoder(tf.constant([], tf.string)).shape == (0, 2)


def test_it_travels_inside_another_savedmodel(save_encoder, tmp_path):
    folder = save_encoder(tmp_path / "encoder", WORDS, VECTORS)
    tf.saved_model.save(PretrainedText(text(encoder=str(folder))), str(tmp_path / "saved"))
    again = tf.saved_model.load(str(tmp_path / "saved"))
    tf.saved_model.save(again, str(tmp_path / "again"))
    for gone in (folder, tmp_path / "saved"):
        shutil.rmtree(gone)
    (tmp_path / "again").rename(tmp_path / "moved")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ANSWER, str(tmp_path / "moved")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[[3.0, 4.0, 5.0], [0.0, 0.0, 0.0], [9.0, 10.0, 11.0]]"


def save(folder, answer, dtype=tf.string, name="serving_default", inputs=("text",)):
    module = tf.Module()
    specs = {i: tf.TensorSpec([None], dtype, i) for i in inputs}
    function = tf.function(lambda **given: answer(given[inputs[0]])).get_concrete_function(**specs)
    tf.saved_model.save(module, str(folder), signatures={name: function})
    return str(folder)


def lengths(texts):
    return tf.cast(tf.strings.length(texts), tf.float32)[:, tf.newaxis] * [[1.0, 2.0]]


@pytest.mark.parametrize("name", ["serving_default", "default"])
def test_a_signature_is_enough(tmp_path, name):
    path = save(tmp_path / "e", lambda texts: {"any": lengths(texts)}, name=name)
    found = PretrainedText(text(encoder=path))(tf.constant(["abc", ""])).numpy()
    assert found.tolist() == [[3, 6], [0, 0]]


def test_of_several_outputs_the_default_counts(tmp_path):
    def both(texts):
        return {"default": lengths(texts), "other": tf.zeros([2, 2])}

    encoder = PretrainedText(text(encoder=save(tmp_path / "e", both)))
    assert encoder(tf.constant(["ab"])).numpy().tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": lambda t: {"a": lengths(t), "b": lengths(t)}}, r"'default'; there are \['a', 'b'\]"),
        ({"answer": lambda t: {"a": tf.strings.length(t)}}, r"floats \[2, dim\], it gives int32 \[2\]"),
        ({"answer": lambda t: {"a": lengths(t)[0]}}, r"floats \[2, dim\], it gives float32 \[2\]"),
        ({"answer": lambda t: {"a": lengths(t)}, "name": "embed"}, r"none of the signatures .*has \['embed'\]"),
        ({"answer": lambda t: {"a": t[:, None]}, "dtype": tf.float32}, r"one input of strings .*'text': 'float32"),
        ({"answer": lambda t: {"a": lengths(t)}, "inputs": ("a", "b")}, r"one input of strings .*'a': .*'b'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, options, message):
    path = save(tmp_path / "e", **options)
    with pytest.raises(ArtifactError, match=f"feature 'title': encoder {path}.*{message}"):
        PretrainedText(text(encoder=path))


def test_a_folder_without_savedmodel_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"'title': encoder .*nowhere cannot be loaded"):
        PretrainedText(text(encoder=str(tmp_path / "nowhere")))
