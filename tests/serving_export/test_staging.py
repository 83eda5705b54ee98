import pytest

from serving_export.staging import replaced


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_appears_whole(tmp_path):
    target = tmp_path / "deep" / "export"
    with replaced(target) as folder:
        (folder / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert names(target.parent) == ["export"]


def test_replaces_as_a_whole(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").write_text("old")
    with replaced(target) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["export"]


def test_error_keeps_what_was_there(tmp_path):
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
