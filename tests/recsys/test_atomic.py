import signal
import subprocess
import sys

import pytest
from killed_at import COUNT

from recsys.atomic import replaced, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "state.json"
    write_atomically(file, "good")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "bad \udcff")
    assert file.read_text() == "good"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "export"
    with replaced(target) as folder:
        (folder / "old").write_text("old")
        assert not target.exists()
    assert names(target) == ["old"]
    with replaced(target) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(target.parent) == ["export"]


def test_an_error_keeps_the_folder_that_was_there(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").write_text("old")

    def fill(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), replaced(target) as folder:
        fill(folder)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["export"]


def test_leftovers_of_a_killed_process_are_not_taken_over(tmp_path):
    leftover = tmp_path / ".export.new"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with replaced(tmp_path / "export") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["export"]


# Replaces a folder, and kills itself at the change of the file system whose number is given.
KILLED = f"""{COUNT}
from recsys.atomic import replaced

sys.addaudithook(count)
with replaced(target) as folder:
    (folder / "text").write_text("new")
"""


def test_killed_at_any_step_the_next_call_finds_a_whole_folder(tmp_path):
    target, kept = tmp_path / "export", []
    for step in range(20):
        target.mkdir()
        (target / "text").write_text("old")
        command = [sys.executable, "-c", KILLED, str(target), str(step)]
        code = subprocess.run(command, check=False).returncode
        with pytest.raises(OSError, match="disk full"), replaced(target):
            raise OSError("disk full")
        assert names(tmp_path) == ["export"]
        kept.append((target / "text").read_text())
        (target / "text").unlink()
        target.rmdir()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert "".join(kept).count("oldnew") == 1
    assert kept.count("new") > 2
