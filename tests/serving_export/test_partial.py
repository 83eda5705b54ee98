import pytest

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
