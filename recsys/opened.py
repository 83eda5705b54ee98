"""Open a run: a new one from a config, or one that was started, maybe with other settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from recsys.config import ConfigError, RunConfig, load_config
from recsys.pipeline import Run
from recsys.run_folder import RunFolder
from recsys.stale import invalidate

logger = logging.getLogger(__name__)


def start_run(config: str, overrides: Sequence[str], run_dir: Path | None) -> Run:
    """Open a new run, or an existing one with the same config, after checking what it needs.

    Where settings of later steps have changed, what these have left is taken away.

    Raises:
        ConfigError: the config is not valid, or the folder holds a run that differs in more.
    """
    settings = load_config(config_file(config), overrides)
    folder = RunFolder(run_dir or Path("runs") / settings.name)
    folder.outdated(settings)
    started = Run(folder, settings)
    started.preflight()
    return _with_settings(folder, settings)


def continue_run(run_dir: Path, overrides: Sequence[str] = ()) -> Run:
    """Open a started run, with overrides of what comes after training.

    Raises:
        ArtifactError: no run was started in this folder.
        ConfigError: an override is not valid, or is of what finished steps were done with.
    """
    folder = RunFolder(run_dir)
    config = folder.config()
    if not overrides:
        return Run(folder, config)
    return _with_settings(folder, load_config(folder.config_file, overrides))


def ready_configs() -> list[Path]:
    """Configs that come with the package."""
    return sorted(Path(str(files("training") / "configs")).glob("*.yaml"))


def config_file(name: str) -> Path:
    """File of a config that is named by its path, or by its name if it comes with the package.

    Raises:
        ConfigError: there is none.
    """
    ready = {file.stem: file for file in ready_configs()}
    if name in ready and not Path(name).is_file():
        return ready[name]
    if not Path(name).is_file() and not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"no config {name!r}: give a YAML file, or one of {', '.join(ready)}")
    return Path(name)


def _with_settings(folder: RunFolder, settings: RunConfig) -> Run:
    step = folder.outdated(settings)
    if step is not None:
        # Before the config is written: a kill in between leaves nothing of other settings.
        logger.info("settings have changed: what %s and later steps have left is removed", step)
        invalidate(folder, step)
    return Run(folder, folder.freeze(settings))
