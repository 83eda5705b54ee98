"""Who may move the alias `champion`: of all who try in one term, the first to claim it.

MLflow moves an alias without asking what it was. What a database does only once is to log a
parameter, so whoever first logs its version as the successor of a term has won it; every move
begins a new term.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recsys.artifacts import ArtifactError
from serving_export.registry import ABSENT, CHAMPION, find_champion

_TERM = "recsys_champion_term"
_LOCK = ".recsys-champion.lock"


class Succession:
    """The terms of one registered model.

    Args:
        client: of the registry and of the runs of its versions.
        name: of the registered model.
    """

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client = client
        self._name = name

    def standing(self) -> tuple[int, str | None]:
        """Present term and champion.

        What was begun in a term and cannot be ended by its own is ended: a move that was killed
        before the next term, and a claim of a version that was deleted.
        """
        term, present = self.term(), find_champion(self._name)
        winner = self.winner(term)
        while winner is not None and (winner == present or not self._exists(winner)):
            term = self._begin(term + 1)
            winner = self.winner(term)
        return term, present

    def term(self) -> int:
        """Present term."""
        return int(self._client.get_registered_model(self._name).tags.get(_TERM, "0"))

    def winner(self, term: int) -> str | None:
        """Version that has claimed a term; None before anybody has."""
        return self._client.get_run(self._anchor()).data.params.get(self._key(term))

    def claim(self, version: str, term: int) -> str | None:
        """Claim a term; the version that has it."""
        with _alone(self._client.tracking_uri):
            try:
                self._client.log_param(self._anchor(), self._key(term), version)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
        return self.winner(term)

    def give_back(self, version: str, term: int) -> None:
        """Let others claim the term, if this version has."""
        if self.winner(term) == version:
            self._begin(term + 1)

    def overrule(self, version: str, term: int) -> int:
        """Claim this term or a later one, whoever has claimed; the term that was claimed.

        Those who have claimed an earlier term find that it is over: `move` tells them.
        """
        while self.claim(version, term) != version:
            term = self._begin(term + 1)
        return term

    def move(self, version: str, term: int) -> bool:
        """Make the version that has claimed the term champion, unless the term is over.

        A term may end while the alias moves; then it goes to who has claimed the next.
        """
        if self.term() != term:
            return False
        self._client.set_registered_model_alias(self._name, CHAMPION, version)
        now = self.term()
        if now == term:
            self._begin(term + 1)
            return True
        overruled_by = self.winner(now) or self.winner(now - 1) or version
        self._client.set_registered_model_alias(self._name, CHAMPION, overruled_by)
        return overruled_by == version

    def _begin(self, term: int) -> int:
        """Begin a term, unless that or a later one has begun; the present term."""
        present = self.term()
        if present < term:
            self._client.set_registered_model_tag(self._name, _TERM, str(term))
        return max(present, term)

    def _exists(self, version: str) -> bool:
        try:
            self._client.get_model_version(self._name, version)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return False
        return True

    def _key(self, term: int) -> str:
        # Parameters allow fewer characters than names of models.
        return f"recsys.champion.{hashlib.sha256(self._name.encode()).hexdigest()[:12]}.{term}"

    def _anchor(self) -> str:
        """Run of the oldest version that still has one: all who promote find the same."""
        versions = self._client.search_model_versions(f"name='{self._name}'")
        for found in sorted(versions, key=lambda v: int(v.version)):
            run_id = found.run_id
            if run_id and self._client.get_run(run_id).info.lifecycle_stage == "active":
                return str(run_id)
        raise ArtifactError(
            f"no version of {self._name!r} has a run that was not deleted: register it again"
        )


@contextmanager
def _alone(tracking_uri: str) -> Iterator[None]:
    """Hold a lock where the store is a folder of files, which two can write a parameter into."""
    parts = urlsplit(tracking_uri)
    folder = Path(unquote(parts.path))
    # `databricks` has no scheme either.
    if parts.scheme not in ("", "file") or not folder.is_dir():
        yield
        return
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
