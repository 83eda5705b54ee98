"""Find the model that a fit begins with, and keep that of this run for the next.

It is the champion of the registry, whose run has logged its towers, or that of a run folder.
Training sees neither: it gets a copy in its own folder, so that a fit that was killed goes on from
the same weights, whoever is champion by then.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from recsys.artifacts import MANIFEST, ArtifactError, ExportedModel, PreparedData, TrainedModel
from recsys.atomic import replaced
from recsys.config import ConfigError, RunConfig
from recsys.model_config import CHAMPION
from recsys.overrides import with_values
from recsys.registered import connect_registry
from recsys.run_folder import RunFolder
from recsys.starting_model import START, StartingModel, check_fits, check_learned_before
from recsys.steps import STEPS

if TYPE_CHECKING:
    from training.tracking import Tracker

logger = logging.getLogger(__name__)

#: What stands for no model, where one is asked for.
SCRATCH = "none"
_TOWERS = "towers"
_KEY = "train.warm_start"


class _Found(NamedTuple):
    """A model to begin with: what it is called, and its manifest, whose folder has the towers."""

    source: str
    model: TrainedModel


class WarmStart:
    """What `train.warm_start` of a run names.

    Args:
        config: of the run.
        folder: of the run; without `cluster.tracking_uri` the registry lies beside it.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder

    def check(self) -> None:
        """Find within seconds that a run cannot begin so; one that has begun is not asked.

        Raises:
            ArtifactError: the champion or the folder holds no model to begin with.
            ConfigError: the model does not fit the config.
        """
        if self._fit_folder.exists():
            return
        with self._found(MANIFEST) as found:
            if found is not None:
                check_fits(*found, self._config)

    def copy(self, data: PreparedData, directory: Path, begun: bool) -> StartingModel | None:
        """Copy the model to `directory/start`, once.

        Args:
            data: to be trained on.
            directory: of what trains.
            begun: whether it has trained before; what began without a copy goes on without.

        Returns:
            The copy; None to train from scratch, as is told where there is no champion yet.

        Raises:
            ArtifactError: there is no model, or it has learned labels that it is to be tested with.
            ConfigError: the model does not fit the config.
        """
        copy = directory / START
        if StartingModel.exists(copy):
            return StartingModel.load(copy)
        if self._config.train.warm_start is None or begun:
            return None
        with self._found() as found:
            if found is None:
                name = self._config.registry.model
                logger.info("no version of %s is champion yet: fit from scratch", name)
                return None
            check_fits(*found, self._config)
            check_learned_before(*found, self._config, data)
            with replaced(copy) as new:
                shutil.copytree(found.model.directory / _to_begin_with(found.model), new / _TOWERS)
                StartingModel(directory=new, towers=_TOWERS, **found._asdict()).save()
        return StartingModel.load(copy)

    def change(self, to: str, begun: bool) -> RunConfig:
        """Let the next fit of the run begin with something else; no other step reads it.

        Args:
            to: `champion`, the folder of a run, or `none` to train from scratch.
            begun: whether a fit was interrupted; it would go on from its checkpoint.

        Returns:
            The config that the run has now.

        Raises:
            ConfigError: a fit has begun with other weights, or these do not fit.
            ArtifactError: there is no model, or it has learned labels that it is to be tested with.
        """
        named = None if to == SCRATCH else to if to == CHAMPION else str(Path(to).resolve())
        if named == self._config.train.warm_start:
            return self._config
        if begun:
            raise ConfigError(
                f"{self._fit_folder} holds a fit that began with "
                f"{_KEY}={self._config.train.warm_start} and was interrupted: finish it by "
                f"`recsys fit` without --warm-start, or remove the folder"
            )
        changed = with_values(self._config, {_KEY: named})
        with WarmStart(changed, self._folder)._found(MANIFEST) as found:
            if found is not None:
                check_fits(*found, changed)
                # Now, as the fit that is there is taken away before the next one looks.
                if PreparedData.exists(data := self._folder.step(STEPS["prepare"][0])):
                    check_learned_before(*found, changed, PreparedData.load(data))
        # Made by a fit that has not come to its first checkpoint.
        shutil.rmtree(self._fit_folder / START, ignore_errors=True)
        return self._folder.amend(changed)

    @property
    def _fit_folder(self) -> Path:
        return self._folder.step(STEPS["fit"][0])

    @contextmanager
    def _found(self, part: str = "") -> Iterator[_Found | None]:
        """Yield the model, None without one; of a champion `part` alone is there, or all of it."""
        named = self._config.train.warm_start
        if named == CHAMPION:
            with TemporaryDirectory() as temporary:
                yield self._champion(part, Path(temporary))
        else:
            yield self._of_run(Path(named)) if named is not None else None

    def _of_run(self, named: Path) -> _Found:
        if named.resolve() == self._folder.path.resolve():
            raise ConfigError(f"{_KEY}={named} is this run itself: name an earlier one")
        directory = RunFolder(named).step(STEPS["fit"][0])
        if not TrainedModel.exists(directory):
            raise ArtifactError(
                f"{_KEY}={named} holds no model: expected {CHAMPION}, or the folder of a run whose "
                "`recsys fit` has finished"
            )
        return _Found(str(named), TrainedModel.load(directory))

    def _champion(self, part: str, temporary: Path) -> _Found | None:
        from serving_export.registry import ModelVersion, describe, download_logged, find_champion

        connect_registry(self._config, self._folder.path)
        name = self._config.registry.model
        version = find_champion(name)
        if version is None:
            return None
        model = ModelVersion(name, version)
        logged = f"{START}/{describe(model)['digest']}/{part}".rstrip("/")
        try:
            fetched = download_logged(model, logged, temporary)
        except ArtifactError as error:
            raise ArtifactError(
                f"{_KEY}={CHAMPION}: nothing to begin with was logged when {model.uri} was "
                f"registered, so train once without. {error}"
            ) from error
        return _Found(model.uri, TrainedModel.load(fetched.parent if part else fetched))


def begun_with(config: RunConfig, start: StartingModel | None) -> RunConfig:
    """The config for training, whose `train.warm_start` is the copy to begin with."""
    return with_values(config, {_KEY: str(start.directory) if start else None})


def keep_for_next(tracker: Tracker, model: TrainedModel, exported: ExportedModel) -> None:
    """Log the towers that a later run may begin with, by the digest of the version they go with.

    The folder of the run may be gone by then, or hold a later fit.
    """
    folder, towers = f"{START}/{exported.digest}", _to_begin_with(model)
    tracker.log_artifact(model.directory / MANIFEST, folder)
    tracker.log_folder(model.directory / towers, f"{folder}/{towers}")


def _to_begin_with(model: TrainedModel) -> str:
    return model.before_refit or model.towers
