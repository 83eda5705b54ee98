"""Who is champion: promotion by evidence, and rollback.

The numbers of each decision are tags of the version, whichever way it went.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient

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
from serving_export.registry import CHAMPION, ModelVersion, resolve
from serving_export.succession import Succession

logger = logging.getLogger(__name__)

_PROMOTED = "gate_promoted"
_PREVIOUS = "gate_previous_version"
_REASON = "gate_reason_"
_CHECK = "gate_check_"
_MOVED = "the champion was moved while this version was judged: run `recsys promote` again"
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
    succession = Succession(client, candidate.name)
    term, present = succession.standing()
    if present == candidate.version:
        previous, verdict = _recall(client, candidate)
    else:
        previous = present
        if present is not None and same_model(candidate.name, candidate.version, present):
            verdict = _judge_index(config, index, present)
        else:
            verdict = _judge(config, report, index, rival, present)
        verdict = _contend(succession, candidate, term, verdict)
        _remember(client, candidate, previous, verdict)
        if verdict.promoted and not succession.move(candidate.version, term):
            verdict = _refused(verdict, _MOVED)
            _remember(client, candidate, previous, verdict)
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

    A promotion that is judged meanwhile is refused.

    Returns:
        The champion that was, and the one that is.

    Raises:
        ArtifactError: there is no champion, no such version, or nothing says which was before; or
            another job has moved the champion at the same moment.
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
    succession = Succession(client, name)
    term = succession.overrule(chosen.version, succession.standing()[0])
    client.set_model_version_tag(name, present.version, "rolled_back_to", chosen.version)
    if not succession.move(chosen.version, term):
        raise ArtifactError(
            f"another job has moved the {CHAMPION} of {name} at this moment: look at it by "
            "`recsys champion`, and roll back again if that is still wanted"
        )
    return present, chosen


def same_model(name: str, one: str, other: str) -> bool:
    """Whether two versions have the same towers and ranker, which is how their digests begin.

    Then it is the index that tells them apart, and `promote` needs no evaluation of the champion.
    """
    client = MlflowClient()
    found = [client.get_model_version(name, version) for version in (one, other)]
    ours, theirs = (version.tags.get("digest", "").split("-") for version in found)
    return len(ours) > 1 and ours[0] == theirs[0]


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


def _judge_index(config: RunConfig, index: IndexReport, present: str) -> _Verdict:
    checks = of_index(config, index)
    told = f"it is the model of champion version {present}, exported anew: the index alone counts"
    return _Verdict(
        all(c.holds for c in checks), [*map(str, checks), told], [c.check for c in checks]
    )


def _contend(
    succession: Succession, candidate: ModelVersion, term: int, verdict: _Verdict
) -> _Verdict:
    """Be the first to claim the term, or tell who was; give back a claim that no longer holds."""
    if not verdict.promoted:
        succession.give_back(candidate.version, term)
        return verdict
    winner = succession.claim(candidate.version, term)
    if winner == candidate.version:
        return verdict
    return _refused(
        verdict,
        f"version {winner} was chosen as champion while this one was judged: run `recsys promote` "
        f"again to compare with it (first the promotion of version {winner}, or the rollback to "
        "it, if that was killed)",
    )


def _refused(verdict: _Verdict, told: str) -> _Verdict:
    return verdict._replace(promoted=False, reasons=[*verdict.reasons, told])


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
