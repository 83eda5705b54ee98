"""What a run is made with: the revision of the code, and the versions of the packages."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import recsys
from recsys.artifacts import PreparedData
from recsys.starting_model import StartingModel

_PACKAGES = (
    "tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "pyspark", "mlflow", "numpy",
)  # fmt: skip
#: MLflow's own name, which its pages show.
_COMMIT = "mlflow.source.git.commit"


def origin(data: PreparedData, folder: Path, start: StartingModel | None = None) -> dict[str, str]:
    """Tags that say what made a run.

    Args:
        data: what it learns from.
        folder: where to look for a Git checkout, if this package is not in one: a shop's own
            configs have a history too.
        start: the model whose weights it begins with, if any.
    """
    tags = {
        "recsys.version": recsys.__version__,
        "recsys.schema_fingerprint": data.fingerprint,
        "recsys.started_from": start.source if start else "from scratch",
        "recsys.versions.python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            tags[f"recsys.versions.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    found = revision(Path(recsys.__file__).parent) or revision(folder)
    if found is not None:
        tags[_COMMIT], tags["recsys.git_changed"] = found[0], str(found[1]).lower()
    return tags


def revision(folder: Path) -> tuple[str, bool] | None:
    """Commit of the Git checkout that tracks `folder`, and whether its files differ from it."""
    tracked = _git(folder, "ls-files", "--", ".")
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of Git, None without Git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
