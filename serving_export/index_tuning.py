"""Find the settings of a ScaNN index that reach a recall target in the least time.

What is given at call time (leaves to search, candidates to score again) is searched on one
trained searcher, and reordering in int8 is derived from it; only trees are trained anew. Settings
are chosen on one half of the queries and reported on the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import tensorflow as tf

from recsys import config
from recsys.artifacts import ArtifactError, IndexPoint, IndexReport
from serving_export.index import Effort, ScannIndex
from serving_export.index_recall import Sample, halves, measure
from serving_export.searcher import (
    Floats,
    State,
    Structure,
    reordering_int8,
    restored,
    train,
)

logger = logging.getLogger(__name__)

#: ScaNN's advice (google-research/scann/docs/algorithms.md): below it nothing beats exact search.
_BRUTE_FORCE_BELOW = 20_000
_HASHED_BELOW = 100_000
_AVQ = 2.0
#: Candidates that are scored again, per neighbour wanted, are doubled up to this; further only
#: where nothing has met the target so far.
_REORDER = 32
_MOST_REORDER = 256
#: Leaves are doubled from this share on, and then found to within the precision.
_FIRST_SHARE = 1 / 256
_PRECISION = 1.1
#: More leaves are given up when doubling them brings less recall than this.
_LEAST_GAIN = 0.003
#: Points of the curve are so far apart in recall.
_LEAST_STEP = 0.003
#: One-sided 95 %: a mean over the tuning queries must clear the target by so many errors.
_ERRORS = 1.645
#: Rounded scores also rank what is returned: int8 has to be so many times as fast to be chosen.
_INT8_HANDICAP = 1.25
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class _Trial:
    """An effort on the tuning queries: mean recall, its lower bound, milliseconds per query."""

    effort: Effort
    recall: float
    bound: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """The best so far: what to save, and how it does on the queries that did not tune it."""

    state: State
    effort: Effort
    point: IndexPoint
    cost: float


def build(
    embeddings: Floats, queries: Floats, target: config.Index
) -> tuple[ScannIndex, IndexReport]:
    """Index the corpus with the settings that meet the recall target in the least time.

    Time is that of the processor on one thread, in batches of 100, so that a busy machine does
    not decide. Which of nearly equal settings wins may still vary from run to run.

    Args:
        embeddings: `[num_candidates, dim]`, compared by dot product; norms may differ.
        queries: held-out query embeddings, `[num_queries, dim]`; the first half tunes.
        target: recall at k to reach, and the limits of the search.

    Raises:
        ArtifactError: no setting reaches the target within the limits; the best is named.
    """
    begun, k = time.monotonic(), min(target.k, len(embeddings))
    samples = halves(embeddings, queries, k)
    # All searchers hold the same tensor: one of the corpus, however many are tried.
    corpus = tf.constant(embeddings)
    best: _Choice | None = None
    points: list[IndexPoint] = []
    for structure in _within(target.max_seconds, _structures(len(embeddings))):
        best, measured = _improved(best, corpus, structure, k, samples, target)
        points += measured
        logger.info("index: %s tried, best so far %s", structure, best and best.point)
    if best is None:
        raise ArtifactError(_refusal(len(embeddings), k, points, target))
    report = IndexReport(
        **best.point.model_dump(),
        k=k,
        num_queries=len(samples[1].queries),
        seconds=time.monotonic() - begun,
        curve=tuple(sorted(points, key=lambda point: point.milliseconds_per_query)),
    )
    return ScannIndex(best.state, len(embeddings), best.effort), report


def _structures(num_candidates: int) -> list[Structure]:
    """What is worth training, most promising first; exact search is the measure of all."""
    root = math.isqrt(num_candidates)
    structures = [Structure("brute_force")]
    if num_candidates < _BRUTE_FORCE_BELOW:
        return structures
    if num_candidates < _HASHED_BELOW:
        structures.append(Structure("hashed"))
    # More leaves separate better and take longer to choose from; long vectors need AVQ.
    trees = [(root, _AVQ), (2 * root, _AVQ), (root // 2, _AVQ), (root, None)]
    return structures + [Structure("tree", leaves, avq) for leaves, avq in trees]


def _within(seconds: float, structures: list[Structure]) -> Iterator[Structure]:
    """Yield structures while the next can be expected to be done in time.

    Exact search and one other are always tried.
    """
    begun, longest = time.monotonic(), 0.0
    for number, structure in enumerate(structures):
        started = time.monotonic()
        if number > 1 and started - begun + longest > seconds:
            logger.info("index: %d s are over, %s is not tried", seconds, structure)
            return
        yield structure
        longest = max(longest, time.monotonic() - started)


def _improved(
    best: _Choice | None,
    corpus: tf.Tensor,
    structure: Structure,
    k: int,
    samples: tuple[Sample, Sample],
    target: config.Index,
) -> tuple[_Choice | None, list[IndexPoint]]:
    """The best after one more structure, and what that one does; of its searchers no other stays.

    Args:
        best: so far.
        corpus: `[num_candidates, dim]`.
        structure: to be trained.
        k: neighbours.
        samples: that tune and that report.
        target: what to reach.
    """
    points = []
    for bits, state in _states(corpus, structure):
        worth = best.point.milliseconds_per_query if best is not None else math.inf
        trials = _trials(state, structure, k, samples[0], target.min_recall, worth)
        measured = _frontier(state, structure, bits, trials, samples[1], target.min_recall)
        for trial, point in measured:
            points.append(point)
            if _meets(trial, point, target) and (best is None or _cost(point) < best.cost):
                best = _Choice(state, trial.effort, point, _cost(point))
    return best, points


def _states(corpus: tf.Tensor, structure: Structure) -> Iterator[tuple[int, State]]:
    """Yield trained searchers that score again in 32 and in 8 bits."""
    state = train(corpus, structure)
    yield 32, state
    if structure.kind != "brute_force":
        yield 8, reordering_int8(state)


def _trials(
    state: State,
    structure: Structure,
    k: int,
    tuning: Sample,
    min_recall: float,
    worth: float,
) -> list[_Trial]:
    """Try efforts: for each number of candidates to score again, the fewest leaves that do.

    `worth` is the milliseconds of the best index so far: what misses the target in more is not
    tried with yet more candidates.
    """
    if structure.kind == "brute_force":
        exact = Effort(k, 1, 1, state.dataset.shape[0])
        with restored(state) as handle:
            return [_tried(handle, exact, tuning)]
    trials: list[_Trial] = []
    size, fastest, recall, reorder = state.hashed.shape[0], math.inf, -1.0, k
    with restored(state) as handle:
        while True:
            start = Effort(k, structure.num_leaves, structure.num_leaves, min(reorder, size))
            tried = list(_fewest_leaves(handle, start, tuning, min_recall))
            trials += tried
            passed = min((t.milliseconds for t in tried if t.bound >= min_recall), default=math.inf)
            if fastest < passed or reorder >= min(size, _MOST_REORDER * k):
                return trials  # Scoring more of them again has ceased to save leaves.
            hopeless = tried[-1].recall - recall < _LEAST_GAIN or tried[-1].milliseconds > worth
            if reorder >= _REORDER * k and (passed < math.inf or hopeless):
                return trials
            fastest, recall, reorder = passed, tried[-1].recall, 2 * reorder


def _fewest_leaves(
    handle: tf.Tensor, effort: Effort, tuning: Sample, min_recall: float
) -> Iterator[_Trial]:
    """Double the leaves until the target is met, then halve the interval; yield all trials."""
    fails, meets, recall = 0, max(1, int(effort.num_leaves * _FIRST_SHARE)), -1.0
    while True:
        trial = _tried(handle, replace(effort, leaves_to_search=meets), tuning)
        yield trial
        if trial.bound >= min_recall:
            break
        if meets == effort.num_leaves or trial.recall - recall < _LEAST_GAIN:
            return
        recall = trial.recall
        fails, meets = meets, min(2 * meets, effort.num_leaves)
    while meets - fails > 1 and meets > fails * _PRECISION:
        middle = (fails + meets) // 2
        trial = _tried(handle, replace(effort, leaves_to_search=middle), tuning)
        yield trial
        fails, meets = (fails, middle) if trial.bound >= min_recall else (middle, meets)


def _tried(handle: tf.Tensor, effort: Effort, sample: Sample) -> _Trial:
    recalls, milliseconds = measure(handle, effort, sample)
    error = recalls.std() / math.sqrt(len(recalls))
    mean = float(recalls.mean())
    return _Trial(effort, mean, mean - _ERRORS * float(error), milliseconds)


def _frontier(
    state: State,
    structure: Structure,
    bits: int,
    trials: list[_Trial],
    reported: Sample,
    min_recall: float,
) -> Iterator[tuple[_Trial, IndexPoint]]:
    """Measure the trials that none other beats in both recall and time, on the other queries.

    The fastest that meets the target is among them, however little it is above the next.
    """
    size, best, met = state.bytes, -math.inf, False
    with restored(state) as handle:
        for trial in sorted(trials, key=lambda trial: (trial.milliseconds, -trial.recall)):
            first_to_meet = trial.bound >= min_recall and not met
            if trial.recall - best < _LEAST_STEP and not first_to_meet:
                continue
            best, met = max(best, trial.recall), met or first_to_meet
            measured = [measure(handle, trial.effort, reported) for _ in range(_REPEATS)]
            yield (
                trial,
                IndexPoint(
                    kind=structure.kind,
                    parameters=_parameters(structure, trial.effort, bits),
                    recall=float(measured[0][0].mean()),
                    bytes=size,
                    milliseconds_per_query=min(milliseconds for _, milliseconds in measured),
                ),
            )


def _parameters(structure: Structure, effort: Effort, bits: int) -> dict[str, float]:
    if structure.kind == "brute_force":
        return {}
    tree = {"num_leaves": effort.num_leaves, "leaves_to_search": effort.leaves_to_search}
    parameters: dict[str, float] = {"reorder": effort.reorder, "reorder_bits": bits}
    if structure.kind == "tree":
        parameters |= tree | ({} if structure.avq is None else {"avq": structure.avq})
    return parameters


def _meets(trial: _Trial, point: IndexPoint, target: config.Index) -> bool:
    """Whether the target is met on both halves: by a margin where the choice is made."""
    return (
        trial.bound >= target.min_recall
        and point.recall >= target.min_recall
        and point.bytes <= (target.max_mib or math.inf) * 2**20
        and point.milliseconds_per_query <= (target.max_milliseconds or math.inf)
    )


def _cost(point: IndexPoint) -> float:
    rounded = point.parameters.get("reorder_bits") == 8
    return point.milliseconds_per_query * (_INT8_HANDICAP if rounded else 1)


def _refusal(num_candidates: int, k: int, points: list[IndexPoint], target: config.Index) -> str:
    limits = {
        "export.index.max_mib": target.max_mib,
        "export.index.max_milliseconds": target.max_milliseconds,
    }
    given = ", ".join(f"{key}={value}" for key, value in limits.items() if value is not None)
    allowed = [
        point
        for point in points
        if point.bytes <= (target.max_mib or math.inf) * 2**20
        and point.milliseconds_per_query <= (target.max_milliseconds or math.inf)
    ]
    best = max(allowed or points, key=lambda point: point.recall)
    return (
        f"no index of {num_candidates} candidates reaches export.index.min_recall="
        f"{target.min_recall} at {k}{f' within {given}' if given else ''}; the best of "
        f"{len(points)} {'is' if allowed else 'keeps no limit:'} {best}. Lower the target, raise "
        "a limit, or raise model.embedding_dim, which separates candidates better"
    )
