import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recsys.artifacts import ArtifactError
from serving_export.versions import Superseded, VersionFolder

VARIANTS = ("exact", "scann")
FILES = {
    "saved_model.pb": b"graph",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": os.urandom(3000),
    "assets.extra/contract.json": b"{}",
}
EXTRAS = {"assets.extra/tf_serving_warmup_requests": b"warm"}

# Publishes, and kills itself at the file operation whose number is given: an audit hook sees
# each open, mkdir, rename and removal before the system does it.
KILLED = """
import os, signal, sys
from pathlib import Path
from serving_export.versions import VersionFolder

source, directory, call, keep = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
VARIANTS = ("exact", "scann")
EXTRAS = {"assets.extra/tf_serving_warmup_requests": b"warm"}
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")


def change(step):
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in EVENTS:
            if event == "open" and not str(arguments[0]).startswith(str(directory)):
                return
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)
    folder = VersionFolder(directory, VARIANTS)
    if call == "add":
        folder.add({v: source for v in VARIANTS}, {v: EXTRAS for v in VARIANTS}, keep)
    else:
        folder.withdraw()


for line in sys.stdin:
    child = os.fork()
    if not child:
        change(int(line))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return VersionFolder(tmp_path / "models", VARIANTS)


def add(folder, source, keep=3):
    return folder.add(dict.fromkeys(VARIANTS, source), dict.fromkeys(VARIANTS, EXTRAS), keep)


def seen_by_a_server(directory):
    """By variant, the numbers that a server takes for versions; each must be whole."""
    seen = {}
    for variant in VARIANTS:
        numbers = [p for p in (directory / variant).glob("*") if p.name.isdigit()]
        for number in numbers:
            files = {str(p.relative_to(number)): p for p in number.rglob("*") if p.is_file()}
            assert {name: p.read_bytes() for name, p in files.items()} == FILES | EXTRAS
        seen[variant] = sorted(int(p.name) for p in numbers)
    return seen


def test_versions_are_numbered_whole_and_pruned(folder, source):
    assert [add(folder, source) for _ in range(4)] == [1, 2, 3, 4]
    assert seen_by_a_server(folder.directory) == {"exact": [2, 3, 4], "scann": [2, 3, 4]}
    assert folder.versions() == [2, 3, 4]
    assert [p.name for p in folder.directory.iterdir() if p.name.startswith(".")] == [".lock"]


def test_lists_of_what_is_available_push_no_earlier_model_out(folder, source):
    for name in (b"A", b"B", b"B", b"B", b"B"):
        extras = EXTRAS | {"assets.extra/registered.json": name}
        folder.add(dict.fromkeys(VARIANTS, source), dict.fromkeys(VARIANTS, extras), keep=2)
    assert folder.versions() == [1, 4, 5]
    assert [folder.withdraw() for _ in range(2)] == [(5, 4), (4, 1)]


def test_the_newest_is_never_removed(folder, source):
    assert [add(folder, source, keep=0) for _ in range(2)] == [1, 2]
    assert folder.versions() == [2]


def test_a_withdrawn_number_is_not_given_again(folder, source):
    for _ in range(3):
        add(folder, source)
    assert folder.withdraw() == (3, 2)
    assert seen_by_a_server(folder.directory) == {"exact": [1, 2], "scann": [1, 2]}
    assert folder.withdraw() == (2, 1)
    with pytest.raises(ArtifactError, match=r"exact holds version 1 alone: there is no older"):
        folder.withdraw()
    assert add(folder, source) == 4
    assert folder.versions() == [1, 4]
    assert not list((folder.directory / "exact").glob(".*"))


def test_nothing_to_withdraw(folder):
    with pytest.raises(ArtifactError, match="holds no version"):
        folder.withdraw()


def test_a_source_without_a_graph_is_refused(folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"is no SavedModel: it has no saved_model\.pb"):
        add(folder, tmp_path)
    assert folder.versions() == []


def test_an_older_version_that_is_changed_shares_its_files(folder, source):
    add(folder, source)
    older = {variant: folder.directory / variant / "1" for variant in VARIANTS}
    extras = {variant: {"assets.extra/contract.json": b"another"} for variant in VARIANTS}
    assert folder.add(older, extras, keep=3, after=1) == 2
    for variant, old in older.items():
        new = folder.directory / variant / "2"
        for name in FILES | EXTRAS:
            is_changed = name == "assets.extra/contract.json"
            assert (new / name).samefile(old / name) != is_changed
        assert (new / "assets.extra/contract.json").read_bytes() == b"another"
        assert (old / "assets.extra/contract.json").read_bytes() == b"{}"
    folder.add(older, extras, keep=1)
    assert (folder.directory / "exact" / "3" / "saved_model.pb").read_bytes() == b"graph"


def test_what_was_made_of_an_older_version_is_refused(folder, source):
    sources, extras = dict.fromkeys(VARIANTS, source), dict.fromkeys(VARIANTS, EXTRAS)
    assert folder.newest() == 0
    assert folder.add(sources, extras, keep=3, after=0) == 1
    with pytest.raises(Superseded, match="has got version 1 since version 0 was read"):
        folder.add(sources, extras, keep=3, after=0)
    assert folder.versions() == [1]


def killer(source, directory, call, keep):
    command = [sys.executable, "-c", KILLED, source, directory, call, keep]
    return subprocess.Popen(
        [*map(str, command)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("call", ["add", "withdraw"])
def test_killed_at_every_file_operation_no_half_version_is_visible(folder, source, call):
    process, killed = killer(source, folder.directory, call, 2), 0
    with process:
        for step in range(500):
            while len(folder.versions()) < 2:
                add(folder, source, keep=5)
            process.stdin.write(f"{step}\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            seen = seen_by_a_server(folder.directory)
            assert all(seen.values()), "servers were left without any version"
            if code == 0:
                break
            assert code == -signal.SIGKILL
            killed += 1
        process.stdin.close()
    assert killed > (40 if call == "add" else 8)
    newest = max(max(numbers) for numbers in seen.values())
    assert add(folder, source) > newest
    assert [p.name for p in folder.directory.iterdir() if p.name.startswith(".")] == [".lock"]


def test_many_publishers_get_versions_of_their_own(folder, source):
    def publish(_):
        with killer(source, folder.directory, "add", 9) as process:
            return process.communicate("100000\n")[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(publish, range(4))) == ["0\n"] * 4
    assert seen_by_a_server(folder.directory) == {v: [1, 2, 3, 4] for v in VARIANTS}


def test_a_full_disk_publishes_nothing(source, tmp_path):
    """A real, small file system that fills up while the second variant is copied."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=36k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        folder = VersionFolder(disk / "models", VARIANTS)
        with pytest.raises(ArtifactError, match=r"No space left on device\. No half version"):
            add(folder, source)
        assert seen_by_a_server(folder.directory) == {"exact": [], "scann": []}
        assert not (folder.directory / ".incoming").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_is_a_file_is_named(source, tmp_path):
    (tmp_path / "models").write_text("no folder")
    with pytest.raises(ArtifactError, match=r"models.*(Not a directory|File exists)"):
        add(VersionFolder(tmp_path / "models", VARIANTS), source)
    assert Path(tmp_path / "models").read_text() == "no folder"
