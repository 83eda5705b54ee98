"""The folder of one run: where each step writes, and the config that all of them share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from recsys.artifacts import ArtifactError
from recsys.atomic import write_atomically
from recsys.config import ConfigError, RunConfig, explain
from recsys.steps import STEPS

_CONFIG = "config.json"
_TOKEN = "run_token"
#: Sections that may change, and the first step whose result they decide. (What `evaluate` draws of
#: the gate's metric stays as it is.)
_READ_FIRST_BY = {"export": "export", "registry.model": "register", "registry.gate": "promote"}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk: `config.json`, and a folder with a manifest for each finished step."""

    path: Path

    def step(self, name: str) -> Path:
        """Folder of a step: data, model, ranking, evaluation, export, and so on."""
        return self.path / name

    def freeze(self, config: RunConfig) -> RunConfig:
        """Write the config of a new run, or one that an existing run may have instead.

        Raises:
            ConfigError: see `outdated`.
        """
        if not self.exists():
            self._check_empty()
        self.outdated(config)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, config.model_dump_json(indent=2))
        return config

    def outdated(self, config: RunConfig) -> str | None:
        """Name the first step that other settings than those of the run would do otherwise.

        `export` and `registry` may change, as what comes before does not know them. So may
        `cluster`, `tune`, `scoring` and `monitoring`, without any effect on what is finished: they
        say where a run computes, what is tried beside it, whom a scoring that is done again asks
        for and when it alarms, not what model a run makes.

        Returns:
            None where every finished step stays as it is, as in a folder without a run.

        Raises:
            ConfigError: the folder belongs to a run whose other settings differ; their keys are
                named.
        """
        if not self.exists():
            return None
        changed = self._changed(config)
        fixed = sorted(told for key, told in changed.items() if _step_of(key) is None)
        if fixed:
            raise ConfigError(
                f"{self.path} holds a run with other settings: {'; '.join(fixed)}. "
                "Give another --run-dir, or remove the folder"
            )
        return next((step for step in STEPS if step in map(_step_of, changed)), None)

    def changes(self, config: RunConfig) -> list[str]:
        """Tell the settings that differ from those of the run, but for those of no effect."""
        return sorted(self._changed(config).values())

    def _changed(self, config: RunConfig) -> dict[str, str]:
        return dict(_differences(_comparable(self.config()), _comparable(config)))

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    @property
    def config_file(self) -> Path:
        """The frozen config."""
        return self.path / _CONFIG

    def amend(self, config: RunConfig) -> RunConfig:
        """Give the run another config, for a step that is done again."""
        write_atomically(self.config_file, config.model_dump_json(indent=2))
        return config

    def token(self) -> str:
        """Name of this run that no other has, also not a later one in a folder of the same name."""
        file = self.path / _TOKEN
        if not file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(file, uuid4().hex)
        return file.read_text(encoding="utf-8")

    def config(self) -> RunConfig:
        """Read the frozen config.

        Raises:
            ArtifactError: no run was started in this folder.
            ConfigError: another version of this package wrote it, with other keys.
        """
        file = self.config_file
        if not self.exists():
            raise ArtifactError(
                f"{file} does not exist: start with `recsys run` or `recsys prepare`, "
                f"or name the folder of a run with --run-dir"
            )
        try:
            return RunConfig.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise ConfigError(
                "\n".join(
                    [
                        f"{file} is of another version of this package:",
                        *explain(error),
                        "use that version for this run, or start a new one",
                    ]
                )
            ) from error

    def _check_empty(self) -> None:
        # Steps replace folders with names as common as `model` and `data`.
        strangers = [p.name for p in self.path.glob("*") if p.name != _TOKEN]
        if strangers:
            raise ConfigError(
                f"{self.path} holds no run, but {', '.join(sorted(strangers)[:3])}: "
                "give --run-dir a new or an empty folder"
            )


def _comparable(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"cluster", "tune", "scoring", "monitoring"})


def _step_of(key: str) -> str | None:
    """First step that reads the section of a key; None where all do."""
    return next((step for section, step in _READ_FIRST_BY.items() if key.startswith(section)), None)


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield keys whose values differ, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, f"{key} was {old!r}, now {new!r}"
