"""The container: TensorFlow's reader and writer, damage of every sort, and bounded windows."""

import errno
import gzip
import os
import subprocess

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pyarrow as pa
import pytest
import tensorflow as tf

from training.tfrecord import TFRecordError, decode_file, encode_records, framing, write_records
from training.tfrecord.framing import read_windows

RECORDS = [b"", b"one", b"x" * 1000, b"\x00\xff"]


def array(records):
    return pa.array(records, pa.large_binary())


def contents(path):
    return [r for window in read_windows(path) for r in window.records.to_pylist()]


@pytest.fixture(params=["d.tfrecord", "d.tfrecord.gz"])
def path(request, tmp_path):
    file = tmp_path / request.param
    assert write_records(file, [array(RECORDS[:2]), array([]), array(RECORDS[2:])]) == 4
    return file


def test_tensorflow_reads_ours(path):
    kind = "GZIP" if path.suffix == ".gz" else ""
    data = tf.data.TFRecordDataset(str(path), compression_type=kind)
    assert [r.numpy() for r in data] == RECORDS


def test_we_read_tensorflows(path):
    kind = "GZIP" if path.suffix == ".gz" else ""
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(kind)) as writer:
        for record in RECORDS:
            writer.write(record)
    assert contents(path) == RECORDS


def test_bytes_depend_on_the_records_alone(path, tmp_path):
    records = [f"record {n % 700} {n}".encode() * 20 for n in range(3000)]
    other = tmp_path / f"other.name{path.suffix}"
    write_records(other, [array(records)])
    write_records(path, [array(records[at : at + 7]) for at in range(0, 3000, 7)])
    assert path.read_bytes() == other.read_bytes()
    if path.suffix == ".gz":
        flags_and_time = other.read_bytes()[3:8]
        assert flags_and_time == bytes(5)


@pytest.mark.parametrize("window", [1, 12, 17, 64, 1 << 20])
def test_windows_of_any_size_give_the_same_records(path, window, monkeypatch):
    monkeypatch.setattr(framing, "WINDOW_BYTES", window)
    monkeypatch.setattr(framing, "WINDOW_RECORDS", 3)
    windows = list(read_windows(path))
    assert [r for w in windows for r in w.records.to_pylist()] == RECORDS
    assert max(len(w.records) for w in windows) <= 3
    starts = [int(o) for w in windows for o in w.offsets]
    assert starts == [0, 16, 35, 1051]
    assert windows[0].first == 0


def test_every_truncation_is_found(path):
    whole = path.read_bytes()
    boundaries = {0, 16, 35, 1051} if path.suffix != ".gz" else set()
    found = 0
    for cut in range(len(whole)):
        if cut in boundaries:
            continue
        path.write_bytes(whole[:cut])
        with pytest.raises(TFRecordError, match="truncated") as error:
            contents(path)
        assert str(path) in str(error.value)
        assert "byte" in str(error.value)
        found += 1
    assert found == len(whole) - len(boundaries)


def test_truncation_names_the_record_and_its_offset(path):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    else:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TFRecordError, match="record 3 at byte 1051 needs 18 bytes, found 13"):
        contents(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "d.tfrecord"
    write_records(path, [array(RECORDS[:2])])
    whole = path.read_bytes()
    found = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(TFRecordError, match="corrupt") as error:
            contents(path)
        where = 0 if at < 16 else 16
        assert f"{path}: corrupt TFRecord: record {where // 16} at byte {where}:" in str(
            error.value
        )
        found += 1
    assert found == len(whole)


def test_flipped_byte_in_gzip_is_found(tmp_path):
    path = tmp_path / "d.tfrecord.gz"
    write_records(path, [array([os.urandom(4000)])])
    damaged = bytearray(path.read_bytes())
    damaged[2000] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(TFRecordError, match=r"corrupt .* byte"):
        contents(path)


def test_gzip_of_several_members_and_padding(tmp_path):
    path = tmp_path / "d.tfrecord.gz"
    write_records(path, [array(RECORDS)])
    path.write_bytes(path.read_bytes() * 3 + bytes(100))
    assert contents(path) == RECORDS * 3


def test_gzip_under_a_plain_name_says_so(tmp_path):
    path = tmp_path / "d.tfrecord.gz"
    write_records(path, [array(RECORDS)])
    with pytest.raises(TFRecordError, match=r"extension \.gz"):
        contents(path.rename(tmp_path / "d.tfrecord"))


def test_wrong_feature_names_file_record_and_offset(tmp_path):
    path = tmp_path / "d.tfrecord"
    first, second = (encode_records(pa.record_batch({"a": [v]})) for v in (1, "text"))
    write_records(path, [first, second])
    with pytest.raises(TFRecordError) as error:
        list(decode_file(path, pa.schema([("a", pa.int64())])))
    offset = len(first[0].as_py()) + 16
    assert f"{path}: record 1 at byte {offset}: feature 'a': expected int64_list" in str(
        error.value
    )


def test_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        path = tmp_path / "d.tfrecord"
        with pytest.raises(OSError, match="while writing this file") as error:
            write_records(path, [array([b"x" * 1000] * 1000)])
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(path)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_failing_input_leaves_nothing(tmp_path):
    def batches():
        yield array(RECORDS)
        raise RuntimeError("upstream")

    with pytest.raises(RuntimeError, match="upstream"):
        write_records(tmp_path / "d.tfrecord", batches())
    assert list(tmp_path.iterdir()) == []
