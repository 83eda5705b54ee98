"""The earlier model that a fit begins with: its copy in the run folder, and whether it fits."""

from __future__ import annotations

from typing import Any, ClassVar

from recsys.artifacts import ArtifactError, Manifest, PreparedData, TrainedModel
from recsys.config import ConfigError, RunConfig
from recsys.model_config import FIXED_BY_WARM_START

#: Folder of the copy, in that of what trains.
START = "start"
_SCRATCH = "or leave train.warm_start empty to train from scratch"


class StartingModel(Manifest):
    """Made by `fit` before it trains: a copy of the towers whose weights it begins with.

    They are those before a refit, where there was one: the labels that a refit has learned may be
    what the next training is validated with.
    """

    step: ClassVar[str] = "fit"

    source: str
    towers: str
    model: TrainedModel


def check_fits(source: str, start: TrainedModel, config: RunConfig) -> None:
    """Refuse a model that cannot give its weights to the towers of a config.

    Args:
        source: what the model is called.
        start: the model, which `train.warm_start` names.
        config: of the run that begins with it.

    Raises:
        ConfigError: naming the key, what it is and what it was.
    """
    chosen = f"{source} (train.warm_start={config.train.warm_start})"
    differences = start.features.differences(config.schema_)
    if differences:
        raise ConfigError(
            f"`features` differ from those of {chosen}: {'; '.join(differences)}. "
            f"Put them back, {_SCRATCH}"
        )
    if start.model is None:
        raise ConfigError(f"{chosen} does not tell its settings: fit it again, {_SCRATCH}")
    for key in FIXED_BY_WARM_START:
        if key == "history.num_heads" and config.model.history.kind != "attention":
            continue
        was, now = _value(start.model, key), _value(config.model, key)
        if was != now:
            raise ConfigError(
                f"model.{key}={now} does not fit {chosen}, which has {was}: "
                f"set model.{key}={was}, {_SCRATCH}"
            )


def check_learned_before(
    source: str, start: TrainedModel, config: RunConfig, data: PreparedData
) -> None:
    """Refuse a model that knows labels of the validation or test window.

    It would seem better there than it is, and the epoch would be chosen by what it remembers. Only
    splits by time have such windows.

    Raises:
        ArtifactError: saying until when it has learned, and when validation begins.
    """
    first, until = data.validation.first_at, start.learned_until
    if not config.data.split.by_time or first is None:
        return
    if until is None or until >= first:
        raise ArtifactError(
            f"{source} (train.warm_start={config.train.warm_start}) has learned labels until "
            f"{until or 'an unknown time'}, but {data.directory} validates from {first}: begin "
            f"with an older model, move data.split forward, {_SCRATCH}"
        )


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings
