"""Who is champion: promotion by evidence, rollback, and one winner where several promote at once.

MLflow moves an alias without asking what it was. What it does only once is to log a parameter, so
whoever first logs its version as the successor of a term has won it; every move begins a new term.
The numbers of each decision are tags of the version, whichever way it went.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recsys.artifacts import (
    ArtifactError,
    Check,
    EvaluationReport,
    IndexReport,
    Promotion,
    RegisteredModel,
)
from recsys.config import RunConfig
from serving_export.gate import (
    Comparison,
    Limit,
    against_baselines,
    against_champion,
    against_slices,
    of_index,
)
from serving_export.registry import CHAMPION, ModelVersion, find_champion, resolve

logger = logging.getLogger(__name__)

_TERM = "recsys_champion_term"
_PROMOTED = "gate_promoted"
_PREVIOUS = "gate_previous_version"
_REASON = "gate_reason_"
_CHECK = "gate_check_"
#: Unity Catalog allows neither dots nor slashes in keys, and 256 characters in values.
_TAG_LENGTH = 256
#: Leaves room for the numbers of a check, which must stay readable JSON.
_WHAT_LENGTH = 80


class Rival(NamedTuple):
    """The champion to beat: its evaluation on the same queries, or why there is none."""

    version: str
    report: EvaluationReport | str


class _Verdict(NamedTuple):
    promoted: bool
    reasons: list[str]
    checks: list[Check]


def promote(
    config: RunConfig,
    registered: RegisteredModel,
    report: EvaluationReport,
    index: IndexReport,
    rival: Rival | None,
    directory: Path,
) -> Promotion:
    """Make the version champion if it beats the counting baselines and the present champion.

    The decision with its numbers is kept as tags of the version before the alias moves, so that a
    repeated call tells the same story. Where another version has become champion since `rival` was
    evaluated, this one is refused and the reason says so.

    Args:
        config: `registry.gate` says by how much, and which limits hold.
        registered: the version to judge.
        report: its evaluation.
        index: of its export.
        rival: the champion when the evaluation began; None if there was none.
        directory: of the manifest.

    Raises:
        ArtifactError: the reports cannot be compared, or lack what the gate asks for.
    """
    client = MlflowClient()
    candidate = ModelVersion(registered.name, registered.model_version)
    term, present = _standing(client, candidate.name)
    if present == candidate.version:
        previous, verdict = _recall(client, candidate)
    else:
        previous = present
        verdict = _judge(config, report, index, rival, present)
        verdict = _contend(client, candidate, term, verdict)
        _remember(client, candidate, previous, verdict)
        if verdict.promoted:
            _move(client, candidate, term)
    logger.info("gate: %s is %s", candidate.uri, "promoted" if verdict.promoted else "refused")
    for reason in verdict.reasons:
        logger.info("gate: %s", reason)
    return Promotion(
        directory=directory,
        name=candidate.name,
        alias=CHAMPION,
        promoted=verdict.promoted,
        previous_version=previous,
        model_version=candidate.version,
        reasons=verdict.reasons,
        checks=verdict.checks,
    ).save()


def rollback(name: str, to: str | None = None) -> tuple[ModelVersion, ModelVersion]:
    """Make the version before the champion, or the version `to`, the champion.

    Returns:
        The champion that was, and the one that is.

    Raises:
        ArtifactError: there is no champion, no such version, or nothing says which was before.
    """
    client = MlflowClient()
    present = resolve(f"{name}@{CHAMPION}")
    tags = client.get_model_version(name, present.version).tags
    target = to or tags.get(_PREVIOUS)
    if not target:
        raise ArtifactError(
            f"nothing tells which version was {CHAMPION} before {present.uri}: it was the first, "
            "or was made champion by hand. Name a version with --to"
        )
    chosen = resolve(f"{name}/{target}")
    term, _ = _standing(client, name)
    client.set_model_version_tag(name, present.version, "rolled_back_to", chosen.version)
    _move(client, chosen, term)
    return present, chosen


def decision(model: ModelVersion) -> list[str]:
    """Tell what the gate has found of a version: its verdict, then its reasons."""
    tags = MlflowClient().get_model_version(model.name, model.version).tags
    if _PROMOTED not in tags:
        return ["not judged by the gate"]
    verdict = "promoted" if tags[_PROMOTED] == "true" else "refused"
    return [verdict, *_numbered(tags, _REASON)]


def _judge(
    config: RunConfig,
    report: EvaluationReport,
    index: IndexReport,
    rival: Rival | None,
    present: str | None,
) -> _Verdict:
    checks: list[Comparison | Limit] = [
        *against_baselines(config, report),
        *of_index(config, index),
    ]
    obstacle = ""
    if present != (rival.version if rival else None):
        was = f"version {rival.version}" if rival else "none"
        obstacle = (
            f"the champion is {f'version {present}' if present else 'none'} now, it was {was} when "
            "this version was evaluated beside it: run `recsys promote` again"
        )
    elif rival is not None and isinstance(rival.report, str):
        obstacle = (
            f"champion version {present} was not evaluated on this window, so it stays; to start "
            f"anew without it, delete its alias {CHAMPION!r}. {rival.report}"
        ).strip()
    elif rival is not None and isinstance(rival.report, EvaluationReport):
        checks.append(against_champion(config, report, rival.report, rival.version))
        checks += against_slices(config, report, rival.report, rival.version)
    first = [] if rival or obstacle else ["there was no champion to compare with"]
    return _Verdict(
        all(c.holds for c in checks) and not obstacle,
        [*map(str, checks), *first, *([obstacle] if obstacle else [])],
        [c.check for c in checks],
    )


def _standing(client: MlflowClient, name: str) -> tuple[int, str | None]:
    """Term and present champion; a move that was killed before it began a new term is ended."""
    term = int(client.get_registered_model(name).tags.get(_TERM, "0"))
    present = find_champion(name)
    if present is not None and _winner(client, name, term) == present:
        term += 1
        client.set_registered_model_tag(name, _TERM, str(term))
    return term, present


def _contend(
    client: MlflowClient, candidate: ModelVersion, term: int, verdict: _Verdict
) -> _Verdict:
    """Be the first to claim the term, or tell who was; give back a claim that no longer holds."""
    if not verdict.promoted:
        if _winner(client, candidate.name, term) == candidate.version:
            client.set_registered_model_tag(candidate.name, _TERM, str(term + 1))
        return verdict
    try:
        client.log_param(
            _anchor(client, candidate.name), _claim(candidate.name, term), candidate.version
        )
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
    winner = _winner(client, candidate.name, term)
    if winner == candidate.version:
        return verdict
    told = (
        f"version {winner} was chosen as champion while this one was judged: run `recsys promote` "
        f"again to compare with it (first that of version {winner}, if its job was killed)"
    )
    return verdict._replace(promoted=False, reasons=[*verdict.reasons, told])


def _winner(client: MlflowClient, name: str, term: int) -> str | None:
    return client.get_run(_anchor(client, name)).data.params.get(_claim(name, term))


def _claim(name: str, term: int) -> str:
    # Parameters allow fewer characters than names of models.
    return f"recsys.champion.{hashlib.sha256(name.encode()).hexdigest()[:12]}.{term}"


def _anchor(client: MlflowClient, name: str) -> str:
    """Run of the oldest version that still has one: all who promote find the same."""
    versions = client.search_model_versions(f"name='{name}'")
    for found in sorted(versions, key=lambda v: int(v.version)):
        if found.run_id and client.get_run(found.run_id).info.lifecycle_stage == "active":
            return str(found.run_id)
    raise ArtifactError(f"no version of {name!r} has a run that was not deleted: register it again")


def _move(client: MlflowClient, model: ModelVersion, term: int) -> None:
    client.set_registered_model_alias(model.name, CHAMPION, model.version)
    client.set_registered_model_tag(model.name, _TERM, str(term + 1))


def _remember(
    client: MlflowClient, model: ModelVersion, previous: str | None, verdict: _Verdict
) -> None:
    tags = {f"{_REASON}{n:02}": reason for n, reason in enumerate(verdict.reasons)}
    tags |= {
        f"{_CHECK}{n:02}": _shortened(check).model_dump_json(exclude_none=True)
        for n, check in enumerate(verdict.checks)
    }
    tags |= {_PROMOTED: str(verdict.promoted).lower(), _PREVIOUS: previous or ""}
    for stale in client.get_model_version(model.name, model.version).tags:
        if stale.startswith((_REASON, _CHECK)) and stale not in tags:
            client.delete_model_version_tag(model.name, model.version, stale)
    for key, value in tags.items():
        client.set_model_version_tag(model.name, model.version, key, value[:_TAG_LENGTH])


def _shortened(check: Check) -> Check:
    return check.model_copy(update={"what": check.what[:_WHAT_LENGTH]})


def _recall(client: MlflowClient, model: ModelVersion) -> tuple[str | None, _Verdict]:
    tags = client.get_model_version(model.name, model.version).tags
    reasons = _numbered(tags, _REASON) or ["it was made champion by hand"]
    checks = [Check.model_validate_json(value) for value in _numbered(tags, _CHECK)]
    return tags.get(_PREVIOUS) or None, _Verdict(True, reasons, checks)


def _numbered(tags: Mapping[str, str], prefix: str) -> list[str]:
    return [tags[key] for key in sorted(tags) if key.startswith(prefix)]
