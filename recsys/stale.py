"""What a step that is done anew makes worthless, and takes away before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from recsys.artifacts import MANIFEST
from recsys.run_folder import RunFolder
from recsys.starting_model import START
from recsys.steps import STEPS

#: Folders of what is done beside the steps.
TUNING = "tuning"
MONITORING = "monitoring"
#: What a step that is done again still needs of its own last result: answers that may be kept, and
#: the weights that the same training began with.
_NEEDED = {"score": None, "fit": START}


def invalidate(folder: RunFolder, step: str) -> None:
    """Remove a finished result that is made again, and what later steps made of it.

    What a killed attempt left stays: each step knows how to go on from there.
    """
    names = list(STEPS)
    stale = [folder.step(STEPS[later][0]) for later in names[names.index(step) + 1 :]]
    stale.append(folder.step(MONITORING))
    own = folder.step(STEPS[step][0])
    if step == "prepare":
        stale.append(folder.step(TUNING))
    finished = STEPS[step][1].exists(own)
    for directory in (*stale, *([own] if finished else ())):
        # First, so that a kill in the middle leaves nothing that looks finished.
        (directory / MANIFEST).unlink(missing_ok=True)
    for directory in filter(Path.is_dir, stale):
        shutil.rmtree(directory)
    if finished and step not in _NEEDED:
        shutil.rmtree(own)
    elif finished and _NEEDED[step] is not None:
        _remove_all_but(own, str(_NEEDED[step]))


def _remove_all_but(directory: Path, kept: str) -> None:
    for path in directory.iterdir():
        if path.is_dir() and path.name != kept:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()
