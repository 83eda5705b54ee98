"""The registered versions of a run's model: ask one, publish it, tell its story, roll back."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from recsys.artifacts import ArtifactError, PreparedData
from recsys.config import RunConfig
from recsys.summary import Recommendation, recommendation_lines

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_USERS = 3


class Registered:
    """What one asks of the registry for the model of a run.

    Args:
        config: of the run.
        folder: of the run; without `cluster.tracking_uri` the registry lies beside it.
        data: folder of the prepared data.
    """

    def __init__(self, config: RunConfig, folder: Path, data: Path) -> None:
        self._config = config
        self._data = data
        connect_registry(config, folder)

    def recommend(self, user: str, k: int, alias: str) -> str:
        """Recommendations of a registered model to one user of this run, readable.

        Raises:
            ArtifactError: the run has no such user, or the registry no such alias.
        """
        shown = self.ask(f"{self._config.registry.model}@{alias}", user, k)
        return "\n".join(recommendation_lines(shown))

    def publish(self, directory: Path, alias: str, keep: int) -> str:
        """Publish a registered version of this run's model for servers, tell where.

        Raises:
            ArtifactError: there is no such version, it has another schema than this run's data, or
                it does not answer as its signatures say.
        """
        from serving_export.handoff import VARIANTS, publish
        from serving_export.registry import describe, download, resolve

        data = PreparedData.load(self._data)
        chosen = resolve(f"{self._config.registry.model}@{alias}")
        with TemporaryDirectory() as folder:
            copies = {v: download(chosen, Path(folder) / v, f"artifacts/{v}") for v in VARIANTS}
            number = publish(copies, data, describe(chosen), directory, keep)
        places = "\n".join(f"{v:10} {directory / v / str(number)}" for v in VARIANTS)
        return f"published  {chosen.uri} as version {number}\n{places}"

    def champion(self) -> str:
        """Tell which version of this run's model is champion, and what the gate found of it."""
        from serving_export.promotion import decision
        from serving_export.registry import describe, resolve

        chosen = resolve(self._config.registry.model)
        verdict, *reasons = decision(chosen)
        lines = [f"champion   {chosen.uri} (MLflow run {describe(chosen)['run_id']})"]
        lines += [f"gate       {verdict}", *(f"           - {reason}" for reason in reasons)]
        return "\n".join(lines)

    def lineage(self, version: str | None) -> str:
        """Tell what the champion of this run's model, or a `version` of it, was made from.

        Raises:
            ArtifactError: there is no such version, or its MLflow run does not say.
        """
        from serving_export.lineage import lineage
        from serving_export.registry import resolve

        name = self._config.registry.model
        return "\n".join(lineage(resolve(f"{name}/{version}" if version else name)).lines())

    def rollback(self, to: str | None) -> str:
        """Make the version before the champion, or the version `to`, the champion.

        Raises:
            ArtifactError: there is no champion, or no such version.
        """
        from serving_export.promotion import rollback

        was, now = rollback(self._config.registry.model, to)
        return f"champion   {now.uri} (it was {was.uri})"

    def ask(self, model: str, user: str | None, k: int) -> list[Recommendation]:
        """Ask a registered model for one user, or for a few that have a history."""
        from recsys.dataset import read_corpus
        from serving_export.registry import recommend

        data = PreparedData.load(self._data)
        queries = _queries(data, user)
        corpus = read_corpus(data)
        names = {i.decode(): n.decode() for i, n in zip(corpus.item, corpus.name, strict=True)}
        answers = recommend(model, queries.drop(columns="user"), k)
        histories = [f.name for f in data.features.item_histories[:1]]
        pasts = list(queries[histories[0]]) if histories else [[] for _ in answers.index]
        return [
            Recommendation(
                user=who,
                history=[names.get(item, item) for item in past],
                items=[(names.get(i, i), score) for i, score in zip(ids, scores, strict=True)],
            )
            for who, past, ids, scores in zip(
                queries["user"], pasts, answers["ids"], answers["scores"], strict=True
            )
        ]


def connect_registry(config: RunConfig, folder: Path) -> None:
    """Point the registry at the tracking store, without opening the MLflow run."""
    from serving_export.registry import connect
    from training.tracking import tracking_uri

    connect(tracking_uri(config.cluster, folder))


def _queries(data: PreparedData, user: str | None) -> pd.DataFrame:
    """Query features of one user, or of the first few users with the longest histories."""
    import pyarrow.parquet as pq

    folder = data.directory / data.users
    if user is not None:
        found = pq.read_table(folder, filters=[("user", "=", user)]).to_pandas()
        if found.empty:
            raise ArtifactError(f"{folder} has no user {user!r}: ids are those of the click table")
        return found
    # One file is enough to find users to show, and stays small where the table is large.
    first = pq.read_table(sorted(folder.glob("*.parquet"))[0]).to_pandas()
    histories = [f.name for f in data.features.item_histories[:1]]
    if histories:
        first = first.sort_values(histories[0], key=lambda past: -past.str.len(), kind="stable")
    return first.head(_SHOWN_USERS)
