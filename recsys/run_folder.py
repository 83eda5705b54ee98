"""The folder of one run: where each step writes, and the config that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from recsys.artifacts import ArtifactError
from recsys.atomic import write_atomically
from recsys.config import ConfigError, RunConfig

_CONFIG = "config.json"
_TOKEN = "run_token"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk: `config.json`, and a folder with a manifest for each finished step."""

    path: Path

    def step(self, name: str) -> Path:
        """Folder of a step: data, model, ranking, evaluation, export, and so on."""
        return self.path / name

    def freeze(self, config: RunConfig) -> RunConfig:
        """Write the config of a new run, or make sure that an existing run has the same.

        The sections `cluster`, `tune`, `scoring` and `monitoring` may change: they say where a run
        computes, what is tried beside it, whom a scoring that is done again asks for and when it
        alarms, not what model a run makes.

        Raises:
            ConfigError: the folder belongs to a run with other settings, whose keys are named, or
                holds something else than a run.
        """
        file = self.path / _CONFIG
        if file.is_file():
            _check_same(self.path, _comparable(self.config()), _comparable(config))
        else:
            self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(file, config.model_dump_json(indent=2))
        return config

    def amend(self, config: RunConfig) -> RunConfig:
        """Give the run another config, for a step that is done again."""
        write_atomically(self.path / _CONFIG, config.model_dump_json(indent=2))
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
        """
        file = self.path / _CONFIG
        if not file.is_file():
            raise ArtifactError(
                f"{file} does not exist: start with `recsys run` or `recsys prepare`, "
                f"or name the folder of a run with --run-dir"
            )
        return RunConfig.model_validate_json(file.read_bytes())

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


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = sorted(_differences(old, new))
    if changed:
        raise ConfigError(
            f"{path} holds a run with other settings: {'; '.join(changed)}. "
            "Give another --run-dir, or remove the folder"
        )


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for name in old.keys() | new.keys()
            for text in _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{key} was {old!r}, now {new!r}"]
