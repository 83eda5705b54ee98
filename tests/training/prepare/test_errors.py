import errno
from pathlib import Path

import pytest

from training.prepare.errors import PrepareError, explained


def test_full_disk_names_folder_and_free_space(tmp_path):
    folder = tmp_path / "data" / "train"
    with pytest.raises(PrepareError, match=r"no space left .*data/train: [\d,]+ MiB free there"):
        with explained(folder, str(tmp_path)):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("Job aborted due to stage failure") from error


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), explained(Path("x"), "y"):
        raise ZeroDivisionError
