"""Towers and corpus to two SavedModels with one signature, each proven in a fresh process."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import (
    CORPUS_MANIFEST,
    MANIFEST,
    ArtifactError,
    ExportedModel,
    IndexReport,
    PreparedData,
    TrainedModel,
    TrainedRanker,
    check_same_schema,
)
from recsys.atomic import replaced, write_atomically
from recsys.config import RunConfig
from recsys.dataset import Corpus, raw_batches, read_corpus
from recsys.models.embed import embed, in_batches, load_towers
from recsys.summary import index_table
from serving_export.index import ExactIndex
from serving_export.index_tuning import build
from serving_export.joint import JointRetriever
from serving_export.list_end import Options
from serving_export.restrictions import restrictions
from serving_export.retriever import Policy, Retriever, SearchIndex
from serving_export.searcher import Floats
from serving_export.two_stage import Second, Stages, TwoStageRecommender, load_second
from serving_export.verify import Expectation, verify

logger = logging.getLogger(__name__)

_VERSIONS_OF = ("tensorflow", "scann", "numpy")
_TUNING_QUERIES = 1000


def export(
    config: RunConfig,
    data: PreparedData,
    model: TrainedModel,
    directory: Path,
    ranker: TrainedRanker | None = None,
) -> ExportedModel:
    """Write the variants `scann` and `exact` into `directory`, which is replaced as a whole.

    `exact` needs stock TensorFlow ops only; `scann` needs `scann.scann_ops.py.scann_ops` imported
    before it is loaded. Signatures: `serving_export.retriever.Retriever`, with a ranker those of
    `serving_export.two_stage.TwoStageRecommender`, whose `rank` takes the place of that of a
    joint training (`serving_export.joint.JointRetriever`). Each variant carries
    `assets.extra/contract.json`: schema and its fingerprint, signature, filters, diversity,
    exploration, index, measured recall.
    Beside them `index.txt` and `index.png` show what the index was chosen from, and `corpus.json`
    is the manifest of the data that the items are from.

    Raises:
        ArtifactError: model, ranker and data differ in their schema, there is no held-out query,
            the index misses its recall target, no item has a value to filter by, or a variant
            answers otherwise in a fresh process.
    """
    learned = _learned(config, data, model, ranker)
    scann_index, report = build(
        learned.embeddings, learned.embedded["embedding"], config.export.index
    )
    exact_index = ExactIndex(learned.embeddings)
    indexes: dict[str, SearchIndex] = {"scann": scann_index, "exact": exact_index}
    with replaced(directory) as folder, TemporaryDirectory() as scratch:
        policy = learned.policy(config, Path(scratch))
        contract = _contract(learned, report, policy)
        for name, index in indexes.items():
            logger.info("writing %s", name)
            _write(learned.recommender(index, policy), folder / name, contract)
        _write_curve(report, config.export.index.min_recall, folder)
        written = {name: folder / name for name in indexes}
        parity = verify(learned.expectation(config), written, report, config.export)
        corpus = (data.directory / data.corpus.path).resolve()
        shutil.copyfile(corpus.with_name(MANIFEST), folder / CORPUS_MANIFEST)
        exported = ExportedModel(
            directory=folder,
            variants={name: name for name in indexes},
            features=data.features,
            fingerprint=data.fingerprint,
            num_candidates=len(learned.corpus),
            corpus=str(corpus),
            exclude_seen=data.exclude_seen,
            filters=config.export.filters,
            explores=config.export.exploration is not None,
            index=report,
            parity=parity,
            digest=_digest(config, data, model, ranker),
            versions=_versions(),
        ).save()
    return exported.model_copy(update={"directory": directory})


@dataclass(frozen=True, slots=True)
class _Learned:
    """What was trained, and what it makes of the corpus and of held-out queries."""

    data: PreparedData
    towers: Any
    ranker: TrainedRanker | None
    second: Second | None
    corpus: Corpus
    embeddings: Floats
    queries: dict[str, NDArray[Any]]
    embedded: dict[str, Floats]

    def policy(self, config: RunConfig, scratch: Path) -> Policy:
        """What decides an answer beside scores; `scratch` lives until the models are saved."""
        return Policy(
            _prior_when_cold(config),
            restrictions(config.export, self.corpus, self.data.features, scratch),
            Options(config.export.diversity, config.export.exploration),
        )

    def recommender(self, index: SearchIndex, policy: Policy) -> Retriever:
        """Make the module that a SavedModel holds."""
        if self.second is not None:
            stages = Stages(self.towers, self.second)
            return TwoStageRecommender(
                stages, index, self.corpus, self.data, self.embeddings, policy
            )
        joint = "log_odds" in self.towers.signatures
        restricted = policy.restrictions is not None
        needed = "repeat" in self.embedded or restricted or any(policy.end) or joint
        kept = self.embeddings if needed else None
        kind = JointRetriever if joint else Retriever
        return kind(self.towers, index, self.corpus, self.data, kept, policy)

    def expectation(self, config: RunConfig) -> Expectation:
        """Give the first queries, and what they are to be answered from."""
        few = slice(config.export.parity_queries)
        return Expectation(
            data=self.data,
            corpus=self.corpus,
            queries={name: values[few] for name, values in self.queries.items()},
            embeddings=self.embeddings,
            embedded={name: values[few] for name, values in self.embedded.items()},
            prior_when_cold=_prior_when_cold(config),
            second=self.second,
        )


def _learned(
    config: RunConfig, data: PreparedData, model: TrainedModel, ranker: TrainedRanker | None
) -> _Learned:
    check_same_schema(model, data)
    if ranker is not None:
        check_same_schema(ranker, data)
    towers = load_towers(model.directory / model.towers)
    corpus = read_corpus(data)
    queries = _held_out_queries(data, max(_TUNING_QUERIES, config.export.parity_queries))
    return _Learned(
        data=data,
        towers=towers,
        ranker=ranker,
        second=None if ranker is None else load_second(ranker),
        corpus=corpus,
        embeddings=embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"],
        queries=queries,
        embedded=embed(towers, "embed_query", in_batches(queries)),
    )


def _prior_when_cold(config: RunConfig) -> bool:
    # Without a least history, training saw queries of which nothing is known.
    return config.data.min_history > 0


def _held_out_queries(data: PreparedData, count: int) -> dict[str, NDArray[Any]]:
    """Raw features of the first `count` test examples, `[<= count]` or `[<= count, length]`."""
    if not data.test.num_examples:
        raise ArtifactError(
            "the test split has no examples, so neither recall nor parity can be measured: "
            "change data.split and run `recsys prepare` again"
        )
    first: dict[str, NDArray[Any]]
    first = next(iter(raw_batches(data, data.test, count).as_numpy_iterator()))
    return first


def _write(retriever: Retriever, folder: Path, contract: dict[str, Any]) -> None:
    signatures = retriever.signatures()
    tf.saved_model.save(
        retriever,
        str(folder),
        signatures=signatures,
        options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"]),
    )
    extra = folder / "assets.extra"
    extra.mkdir(exist_ok=True)
    described = contract | {"signatures": {n: _describe(s) for n, s in signatures.items()}}
    write_atomically(extra / "contract.json", json.dumps(described, indent=2))


def _write_curve(report: IndexReport, target: float, folder: Path) -> None:
    write_atomically(folder / "index.txt", index_table(report) + "\n")
    # Matplotlib comes with MLflow (extra `tracking`); an exporter alone does without the picture.
    if find_spec("matplotlib"):
        from serving_export.index_plot import draw

        draw(report, target, folder / "index.png")


def _describe(function: Any) -> dict[str, Any]:
    inputs = function.structured_input_signature[1]
    return {
        kind: {
            name: {"dtype": spec.dtype.name, "shape": _shape(spec)}
            for name, spec in sorted(specs.items())
        }
        for kind, specs in (("inputs", inputs), ("outputs", function.structured_outputs))
    }


def _shape(spec: tf.TensorSpec) -> list[int | None] | None:
    """Dimensions, None for one of any size; None where even their number is free."""
    dimensions: list[int | None] | None
    dimensions = None if spec.shape.rank is None else spec.shape.as_list()
    return dimensions


def _contract(learned: _Learned, index: IndexReport, policy: Policy) -> dict[str, Any]:
    data, ranker = learned.data, learned.ranker
    ranking: dict[str, Any] = {}
    if ranker is not None:
        tasks = {"tasks": list(ranker.tasks)} if ranker.tasks else {}
        ranking = {"ranking": {"candidates": ranker.candidates} | tasks}
    restricted = {} if policy.restrictions is None else policy.restrictions.describe()
    ends = policy.end._asdict().items()
    return {
        **ranking,
        "version": 1,
        "fingerprint": data.fingerprint,
        "features": data.features.model_dump(mode="json")["features"],
        "exclude_seen": data.exclude_seen,
        "num_candidates": len(learned.corpus),
        "index": index.model_dump(exclude={"curve"}),
        "versions": _versions(),
        **restricted,
        **{name: option.model_dump() for name, option in ends if option is not None},
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS_OF}


def _digest(
    config: RunConfig, data: PreparedData, model: TrainedModel, ranker: TrainedRanker | None
) -> str:
    """Hash of towers and ranker, then of what else an export depends on.

    That is the corpus, the vocabularies and the settings.
    """
    folders = [model.directory / model.towers]
    if ranker is not None:
        folders.append(ranker.directory / ranker.ranker)
    trained = [path for f in folders for path in sorted(f.rglob("*")) if path.is_file()]
    others = [Path(file) for file in data.files(data.corpus)]
    others += [data.directory / v.path for _, v in sorted(data.vocabularies.items())]
    settings = f"{config.export.model_dump_json()}{data.fingerprint} {data.exclude_seen}"
    return f"{_hash(trained)}-{_hash(others, settings)}"


def _hash(files: Sequence[Path], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
