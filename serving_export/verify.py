"""Ask exported models in a fresh process, compare with an independent exact answer in NumPy.

What a second stage makes of the candidates is that of the ranker that evaluation calls.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError, IndexReport, PreparedData
from recsys.config import Export
from recsys.dataset import Corpus
from serving_export.diversity import follows
from serving_export.exploration import explains
from serving_export.filter_probe import probe
from serving_export.list_end import Options
from serving_export.retriever import log_prior
from serving_export.searcher import Floats
from serving_export.two_stage import Second

logger = logging.getLogger(__name__)

_ANSWER = Path(__file__).with_name("answer.py")
_TIE = 1e-5
_RANKED_AT_ONCE = 64
_TIMEOUT_SECONDS = 1800
#: Recall of an index on few queries may fall this much below that on all of them.
_SAMPLING_SLACK = 0.05


@dataclass(frozen=True, slots=True)
class Expectation:
    """Queries, and what is needed to answer them without TensorFlow.

    Attributes:
        data: vocabularies (which query is cold) and whether seen items are excluded.
        corpus: candidates.
        queries: raw query features, `[num_queries]` or `[num_queries, length]`.
        embeddings: of the candidates, `[num_candidates, dim]`.
        embedded: of the queries, `embedding` `[num_queries, dim]`, and `repeat`
            `[num_queries, length]` if items of the history have scores of their own.
        prior_when_cold: whether cold queries are answered by popularity.
        second: ranks the candidates; None where retrieval alone recommends.
    """

    data: PreparedData
    corpus: Corpus
    queries: dict[str, NDArray[Any]]
    embeddings: Floats
    embedded: dict[str, Floats]
    prior_when_cold: bool = True
    second: Second | None = None

    def scores(self) -> Floats:
        """Score of every candidate for every query, -inf where excluded."""
        prior = log_prior(self.corpus)
        rows = {item: row for row, item in enumerate(self.corpus.item)}
        scores = self.embedded["embedding"] @ self.embeddings.T
        for query, item, score in self._repeats():
            if item in rows:
                scores[query, rows[item]] += score
        for query, (cold, seen) in enumerate(zip(self._cold(), self._seen(), strict=True)):
            if cold and self.prior_when_cold:
                scores[query] = prior
            scores[query, [rows[item] for item in seen if item in rows]] = -np.inf
        return scores

    def ranked(self, first: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Scores after the second stage, -inf for what it does not rank, of some of the queries.

        Args:
            first: `[num_queries, num_candidates]` of the first stage, -inf where excluded.

        Returns:
            The scores of all queries, and which of them, `[num_queries]`, are certain: elsewhere
            more candidates tie for the last place that is ranked than have room.
        """
        assert self.second is not None
        depth = min(self.second.candidates, first.shape[1])
        rows = np.argsort(-first, axis=1, kind="stable")[:, :depth]
        best = np.take_along_axis(first, rows, axis=1)
        found = np.isfinite(best)
        scores = self._by_ranker(self.second, np.where(found, rows, -1), best)
        cold = np.array(list(self._cold())) & self.prior_when_cold
        scores = np.where(cold[:, np.newaxis], best, scores)
        ranked = np.full_like(first, -np.inf)
        np.put_along_axis(ranked, rows, np.where(found, scores, -np.inf), axis=1)
        return ranked, _certain(first, depth)

    def _by_ranker(self, second: Second, rows: NDArray[Any], first: Floats) -> Floats:
        """Log odds of `rows`, `[num_queries, ranked]`, by the pipeline that evaluation uses."""
        rank = second.ranker.signatures["rank"]
        parts = [
            rank(
                **{name: tf.constant(values[own]) for name, values in self.queries.items()},
                candidates=tf.constant(rows[own], tf.int32),
                retrieval_scores=tf.constant(first[own]),
            )["scores"].numpy()
            for own in (
                slice(begin, begin + _RANKED_AT_ONCE)
                for begin in range(0, len(rows), _RANKED_AT_ONCE)
            )
        ]
        return np.concatenate(parts)

    def _repeats(self) -> Iterable[tuple[int, bytes, float]]:
        """Yield what is added to the score of an item, with the query."""
        if "repeat" in self.embedded:
            history = self.queries[self.data.features.item_histories[0].name]
            for query, scores in enumerate(self.embedded["repeat"]):
                for item, score in zip(history[query], scores, strict=True):
                    yield query, item, float(score)

    def _seen(self) -> Iterable[set[bytes]]:
        histories = self.data.features.item_histories if self.data.exclude_seen else ()
        for query in range(len(self.embedded["embedding"])):
            yield {item for f in histories for item in self.queries[f.name][query]}

    def _cold(self) -> Iterable[bool]:
        schema = self.data.features
        identifying = [(f.of or "", f.name) for f in schema.item_histories]
        identifying += [(f.name, f.name) for f in schema.user_ids]
        known = {name: self._vocabulary(name) for name, _ in identifying}
        for query in range(len(self.embedded["embedding"])):
            yield bool(identifying) and not any(
                known[vocabulary].intersection(np.atleast_1d(self.queries[feature][query]))
                for vocabulary, feature in identifying
            )

    def _vocabulary(self, name: str) -> set[bytes]:
        file = self.data.directory / self.data.vocabularies[name].path
        return set(file.read_bytes().split(b"\n")) - {b""}


def verify(
    expectation: Expectation, variants: Mapping[str, Path], index: IndexReport, export: Export
) -> dict[str, float]:
    """Compare both variants with the exact top k; every other query excludes its best item.

    Queries also filter, by each of `export.filters` and by all at once.

    Returns:
        By variant, the share of places where id and score are those of the exact answer (`exact`),
        or whose score belongs to the exact top k (`scann`: recall). Ties are scores within 1e-5.
        With diversity or exploration the share of places that hold what their rules may choose,
        with its propensity (`exact`), or whose score belongs to the exact pool (`scann`).

    Raises:
        ArtifactError: a variant does not load or answer, or answers differently.
    """
    filters = [expectation.data.features[name] for name in export.filters]
    asked, passing = probe(expectation.corpus, filters, len(expectation.embedded["embedding"]))
    scores = np.where(passing, expectation.scores(), -np.inf)
    best = scores.argmax(axis=1)
    exclusions = expectation.corpus.item[best][:, np.newaxis].copy()
    exclusions[::2] = b""
    scores[np.arange(1, len(scores), 2), best[1::2]] = -np.inf
    # A list that reaches the end of the pool would leave its slots nothing to draw from.
    k = index.k if export.exploration is None else min(index.k, export.exploration.pool // 2)
    requests = expectation.queries | asked | {"exclusions": exclusions, "k": np.int32(k)}
    answers = ask(variants, requests)
    if expectation.second is not None:
        scores, certain = expectation.ranked(scores)
        scores, answers = _only(certain, scores, answers, "ranking.candidates")
    options = Options(export.diversity, export.exploration)
    for name, option in options._asdict().items():
        if option is not None:
            key = f"export.{name}.pool"
            scores, answers = _only(_certain(scores, option.pool), scores, answers, key)
    parity = {
        "exact": float(_right(expectation, options, scores, answers["exact"]).mean()),
        "scann": _recall(expectation.corpus, scores, answers["scann"], options.pool),
    }
    logger.info("parity with exact search in a fresh process: %s", parity)
    if parity["exact"] < 1:
        raise ArtifactError(
            f"the exact SavedModel, loaded in a fresh process, gives {parity['exact']:.4f} of the "
            f"expected ids and scores of {len(scores)} queries (all of them were expected)"
        )
    least = export.index.min_recall - _SAMPLING_SLACK
    if parity["scann"] < least:
        raise ArtifactError(
            f"the scann SavedModel, loaded in a fresh process, has recall@{k} "
            f"{parity['scann']:.4f} on {len(scores)} queries, expected at least {least:.4f} "
            f"(it was {index.recall:.4f} before it was saved)"
        )
    return parity


def ask(
    variants: Mapping[str, Path], request: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Outputs of `recommend` by variant, from a process that knows nothing of this package."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # A prefix keeps a feature called `file` apart from the argument of savez.
        inputs: dict[str, Any] = {f"input_{name}": _plain(v) for name, v in request.items()}
        np.savez(folder / "request.npz", **inputs)
        models = [f"{variant}={path.resolve()}" for variant, path in sorted(variants.items())]
        environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
        done = subprocess.run(
            [sys.executable, "-I", str(_ANSWER), *models],
            cwd=folder,
            env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ArtifactError(
                f"the exported model does not answer in a fresh process "
                f"(exit code {done.returncode}):\n{_traceback(done.stderr)}"
            )
        answers = {}
        for variant in variants:
            with np.load(folder / f"{variant}.npz") as arrays:
                answers[variant] = dict(arrays)
        return answers


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Bytes objects as fixed-width bytes, which need no pickle."""
    return values.astype(bytes) if values.dtype == object else values


def _traceback(stderr: str) -> str:
    start = stderr.rfind("Traceback (most recent call last)")
    return stderr[max(start, 0) :][-4000:] or "(it wrote nothing)"


def _certain(scores: Floats, depth: int) -> NDArray[np.bool_]:
    """Which queries have no candidates that tie for the last of `depth` places, `[n]`."""
    depth = min(depth, scores.shape[1])
    last = -np.partition(-scores, depth - 1, axis=1)[:, depth - 1, np.newaxis]
    within = np.count_nonzero(scores >= last - _TIE, axis=1)
    return np.isneginf(last[:, 0]) | (within <= depth)


def _only(
    certain: NDArray[np.bool_], scores: Floats, answers: dict[str, dict[str, Any]], key: str
) -> tuple[Floats, dict[str, dict[str, Any]]]:
    """Scores and answers of the queries whose candidates are certain."""
    if not certain.any():
        raise ArtifactError(
            f"equal scores tie for the last place of {key} for each of {len(certain)} queries, so "
            "it is a matter of chance which candidates there are: raise it"
        )
    own = {v: {n: a[certain] for n, a in found.items()} for v, found in answers.items()}
    return scores[certain], own


def _right(
    expectation: Expectation, options: Options, scores: Floats, answer: dict[str, NDArray[Any]]
) -> NDArray[np.bool_]:
    """Which places of an answer hold what they may, `[n, k]`."""
    corpus, (diversity, exploration) = expectation.corpus, options
    rows = _rows(corpus, answer["ids"])
    right = _equal(corpus, scores, answer, reordered=diversity is not None)
    if diversity is not None:
        right &= follows(diversity, scores, expectation.embeddings, rows)
    if exploration is not None:
        slots = explains(exploration, scores, rows, answer["propensities"], diversity is not None)
        fixed = rows.shape[1] - slots.shape[1]
        own = _equal(corpus, scores, answer, reordered=True)
        right[:, fixed:] = slots & own[:, fixed:]
        right[:, :fixed] &= answer["propensities"][:, :fixed] == (rows[:, :fixed] >= 0)
    return right


def _equal(
    corpus: Corpus, scores: Floats, answer: dict[str, NDArray[Any]], reordered: bool
) -> NDArray[np.bool_]:
    """Which places have the expected score and an item that has this score, `[n, k]`.

    Where the order is not that of scores, the score of an item is all that is expected.
    """
    own = _true_scores(corpus, scores, answer["ids"])
    if reordered:
        return _close(answer["scores"], own)
    expected = -np.sort(-scores, axis=1)[:, : answer["ids"].shape[1]]
    return _close(answer["scores"], expected) & _close(own, expected)


def _recall(
    corpus: Corpus, scores: Floats, answer: dict[str, NDArray[Any]], pool: int = 0
) -> float:
    """Share of the exact top k, or of places filled from the exact pool, that was found, by score.

    Places that cannot be filled count.
    """
    width = answer["ids"].shape[1]
    best = -np.sort(-scores, axis=1)[:, : max(width, pool)]
    # Where fewer than k may be returned, each of them must be.
    least = np.where(np.isfinite(best), best, np.inf).min(axis=1, keepdims=True)
    found = _true_scores(corpus, scores, answer["ids"]) >= least - _TIE
    return float((found | ~np.isfinite(best[:, :width])).mean())


def _true_scores(corpus: Corpus, scores: Floats, ids: NDArray[np.bytes_]) -> Floats:
    """What the exact answer says of the ids given, `[num_queries, k]`; -inf for no id."""
    taken = _rows(corpus, ids)
    return np.where(taken < 0, -np.inf, np.take_along_axis(scores, np.maximum(taken, 0), axis=1))


def _rows(corpus: Corpus, ids: NDArray[np.bytes_]) -> NDArray[np.int_]:
    """Corpus rows of ids, -1 for no id, of the same shape."""
    rows = {item: row for row, item in enumerate(corpus.item)}
    return np.array([[rows[item] if item else -1 for item in found] for found in ids.tolist()])


def _close(left: Floats, right: Floats) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return (left == right) | (np.abs(left - right) <= _TIE * np.maximum(1, np.abs(right)))
