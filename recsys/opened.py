"""Open a run: a new one from a config, or one that was started, maybe with other settings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from recsys.config import ConfigError, load_config
from recsys.overrides import overridden
from recsys.pipeline import Run
from recsys.run_folder import RunFolder
from recsys.stale import invalidate
from recsys.steps import STEPS


def start_run(config: str, overrides: Sequence[str], run_dir: Path | None) -> Run:
    """Open a new run, or an existing one with the same config, after checking what it needs.

    Settings of steps that are not finished may have changed.

    Raises:
        ConfigError: the config is not valid, or the folder holds a run that differs in more.
    """
    settings = load_config(config_file(config), overrides)
    folder = RunFolder(run_dir or Path("runs") / settings.name)
    step = folder.outdated(settings)
    if step is not None and (finished := _finished(folder, step)):
        raise ConfigError(
            f"{folder.path} has finished {', '.join(finished)} with other settings: "
            f"{'; '.join(folder.changes(settings))}. Change them by `recsys {step} --run-dir "
            f"{folder.path} --set KEY=VALUE`, which does away with what they have left, or give "
            "another --run-dir"
        )
    started = Run(folder, settings)
    started.preflight()
    folder.freeze(settings)
    return started


def continue_run(run_dir: Path, overrides: Sequence[str] = (), step: str | None = None) -> Run:
    """Open a started run to do a step again, maybe with other settings of this step and later ones.

    What the step and later ones have left with the old settings is removed.

    Raises:
        ArtifactError: no run was started in this folder.
        ConfigError: an override is not valid, or is read by an earlier step.
    """
    folder = RunFolder(run_dir)
    config = folder.config()
    settings = overridden(config, overrides) if overrides else config
    outdated = folder.outdated(settings)
    if outdated is None:
        return Run(folder, folder.freeze(settings) if overrides else settings)
    order = list(STEPS)
    if step is None or order.index(outdated) < order.index(step):
        raise ConfigError(
            f"{'; '.join(folder.changes(settings))}: {outdated} reads this first, so change it by "
            f"`recsys {outdated} --run-dir {run_dir} --set KEY=VALUE`"
        )
    # Before the config is written: a kill in between leaves nothing of other settings.
    invalidate(folder, outdated)
    return Run(folder, folder.freeze(settings))


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


def _finished(folder: RunFolder, step: str) -> list[str]:
    """Finished steps from this one on."""
    names = list(STEPS)
    later = names[names.index(step) :]
    return [name for name in later if STEPS[name][1].exists(folder.step(STEPS[name][0]))]
