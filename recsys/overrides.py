"""Change a config by dotted keys, and write a change the way `--set` takes it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from recsys.config import ConfigError, RunConfig, explain, read_overrides
from recsys.model_config import FIXED_BY_WARM_START

#: Sections whose keys can be tuned: the others decide the data, or come after the training.
TUNABLE = ("model", "train")


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with these dotted keys set, validated anew.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the key.
    """
    tree = config.model_dump()
    for key, value in values.items():
        _set(tree, key, value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error


def overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with `a.b=c` overrides; relative paths are from the working directory.

    Raises:
        ConfigError: see `with_values`, and `recsys.config.read_overrides`.
    """
    return with_values(config, dict(_leaves(read_overrides(overrides))))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """`a.b=c` for each dotted key, readable by `load_config`."""
    return [f"{key}={_text(value)}" for key, value in values.items()]


def value_of(config: RunConfig, key: str) -> Any:
    """Value at a dotted key, as JSON has it: lists for tuples."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) and part in value else None
    return value


def check_space(config: RunConfig) -> None:
    """Try each end and each choice of `tune.space` on the config.

    Raises:
        ConfigError: a key cannot be tuned, is unknown, or has a value that the config refuses.
    """
    for key, distribution in config.tune.space.items():
        _check_key(config, key)
        for value in distribution.extremes:
            try:
                with_values(config, {key: value})
            except ConfigError as error:
                raise ConfigError(f"tune.space.{key}, value {value!r}:\n{error}") from error


def check_tunable(config: RunConfig) -> None:
    """Make sure that there is something to tune, and `check_space`.

    Raises:
        ConfigError: `tune.space` is empty or does not fit.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: say what to vary, such as "
            "`space: {train.learning_rate: {low: 0.0001, high: 0.01, log: true}}`"
        )
    check_space(config)


def _check_key(config: RunConfig, key: str) -> None:
    if key == "train.monitor":
        raise ConfigError("tune.space.train.monitor: it is what the trials are compared by")
    if key == "train.warm_start":
        raise ConfigError("tune.space.train.warm_start: all trials begin with the same weights")
    if config.train.warm_start and key.removeprefix("model.") in FIXED_BY_WARM_START:
        raise ConfigError(
            f"tune.space.{key}: the weights of train.warm_start={config.train.warm_start} fit one "
            "value alone; leave one of the two out"
        )
    section, _, rest = key.partition(".")
    if section in TUNABLE and rest:
        return
    valid = [k for k in _keys(config.model_dump()) if k.startswith(tuple(f"{s}." for s in TUNABLE))]
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"tune.space.{key}: only keys of `model` and `train` can be tuned; {hint}"
        f"such keys are {', '.join(valid)}"
    )


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    section: Any = tree
    for part in path:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"  {key}: {part!r} is a value, not a section")
    section[last] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _text(value: Any) -> str:
    # A word needs no quotes, unless YAML takes it for something else, such as null or off.
    if isinstance(value, str) and value.isidentifier() and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)
