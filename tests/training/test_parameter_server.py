import pytest
import tensorflow as tf

from training.parameter_server import batches, tables


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ([100_000, 64], [3, 1]),  # an embedding table
        ([200, 16], [1, 1]),  # too small to be worth two requests
        ([300, 16], [2, 1]),
        ([512, 128], [1, 1]),  # the kernel of a layer, large as it is
        ([100_000], [1]),
        ([], []),
    ],
)
def test_only_large_tables_are_divided_over_the_servers(shape, parts):
    assert tables(3)(tf.TensorShape(shape), tf.float32) == parts


def test_without_servers_each_process_reads_its_own_data():
    seen = []

    def make(context):
        seen.append(context.num_replicas_in_sync)
        return tf.data.Dataset.range(2)

    read = [int(element) for element in batches(tf.keras.Sequential(), make)]
    assert (seen, read) == ([1], [0, 1])
