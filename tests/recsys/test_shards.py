import pytest

from recsys.artifacts import ArtifactError
from recsys.shards import WHOLE, Shards, Share


def shards(folder, counts, kib=512):
    files = [folder / f"part-{number:05d}" for number in range(len(counts))]
    for file in files:
        file.write_bytes(bytes(kib * 1024))
    return Shards(tuple(map(str, files)), tuple(counts))


def test_small_files_become_a_table_however_many_read_them(tmp_path):
    small = shards(tmp_path, [5, 5])
    assert {small.reading(processes, cache_mib=1) for processes in (1, 2, 9)} == {"table"}


def test_large_files_are_dealt_out_where_that_can_be_done_evenly(tmp_path):
    even = shards(tmp_path, [100, 98, 102, 101, 99, 100])
    found = {processes: even.reading(processes, cache_mib=2) for processes in (1, 2, 3, 4, 6, 7)}
    own, every = "own files", "all files"
    assert found == {1: every, 2: own, 3: own, 4: every, 6: own, 7: every}
    assert shards(tmp_path, [100, 10, 10]).reading(2, cache_mib=0) == "all files"


def test_each_file_is_read_by_one(tmp_path):
    dealt = shards(tmp_path, [70, 20, 40, 10, 30, 30])
    hands = [dealt.own(Share(range(rank * 2, rank * 2 + 2), 6)) for rank in range(3)]
    assert hands == [[0], [1, 2, 3], [4, 5]]
    assert dealt.own(WHOLE) == list(range(6))


def test_a_share_knows_its_process():
    share = Share(range(4, 6), 8)
    assert (share.process, share.processes) == (2, 4)
    assert share.within_process() == Share(range(2), 2)


def test_large_files_of_an_earlier_version_are_refused(tmp_path):
    unknown = Shards(shards(tmp_path, [5, 5]).files, ())
    assert unknown.reading(2, cache_mib=1) == "table"
    with pytest.raises(ArtifactError, match=r"recsys prepare.*train\.cache_mib"):
        unknown.reading(2, cache_mib=0)


def test_counts_of_a_manifest_come_with_the_files(prepared):
    found = Shards.of(prepared, [prepared.train, prepared.recent])
    assert len(found.files) == len(found.num_sequences) == 4
    assert sum(found.num_sequences[:2]) == prepared.train.num_sequences
    assert sum(found.num_sequences[2:]) == prepared.recent.num_sequences
    earlier = prepared.train.model_copy(update={"sequences_by_file": ()})
    assert Shards.of(prepared, [earlier, prepared.recent]).num_sequences == ()
