import signal
import subprocess
import sys

import pytest
from killed_at import COUNT

from recsys.artifacts import ArtifactError
from serving_export.partial import resumed


def fill(directory, plan, *names, fail=False):
    with resumed(directory, plan) as folder:
        before = sorted(p.name for p in folder.iterdir())
        for name in names:
            (folder / name).write_text(name)
        if fail:
            raise RuntimeError("killed")
    return before


def test_what_a_failed_attempt_has_done_is_there_for_the_next(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last").write_text("last result")
    with pytest.raises(RuntimeError, match="killed"):
        fill(tmp_path / "out", "plan", "one", fail=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["last"]

    assert fill(tmp_path / "out", "plan", "two") == ["one", "plan.json"]

    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_plan_begins_anew(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        fill(tmp_path / "out", "plan", "one", fail=True)
    assert fill(tmp_path / "out", "another plan", "two") == ["plan.json"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]


def test_after_success_everything_is_done_again(tmp_path):
    fill(tmp_path / "out", "plan", "one")
    assert fill(tmp_path / "out", "plan", "two") == ["plan.json"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]


# Fills the folder, and kills itself at the change of the file system whose number is given.
KILLED = f"""{COUNT}
from serving_export.partial import resumed

sys.addaudithook(count)
with resumed(target, "plan") as folder:
    (folder / "new").touch()
"""


def test_killed_at_any_step_a_whole_result_is_there_again(tmp_path):
    kept = []
    for step in range(20):
        out = tmp_path / str(step) / "out"
        out.mkdir(parents=True)
        (out / "old").touch()
        command = [sys.executable, "-c", KILLED, str(out), str(step)]
        code = subprocess.run(command, check=False).returncode
        with pytest.raises(RuntimeError, match="killed"):
            fill(out, "another plan", fail=True)
        kept += [p.name for p in out.iterdir()]
        assert len(kept) == step + 1
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kept[0] == "old"
    assert kept[-1] == "new"
    assert len(kept) > 4


def test_two_at_once_do_not_fill_the_same_folder(tmp_path):
    with resumed(tmp_path / "out", "plan") as folder:
        (folder / "one").touch()
        with pytest.raises(ArtifactError, match=r"another process is filling .*\.out\.partial"):
            fill(tmp_path / "out", "another plan")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one"]
