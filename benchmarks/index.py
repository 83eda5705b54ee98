"""The tuned index beside exact search, faiss and hnswlib, at equal recall, on one core.

    pip install -e '.[benchmark]'
    taskset -c 1 python benchmarks/index.py [--size 1000000] [--clusters 2000] [--seconds 300]
                                            [--alone]

Corpus and queries are made here: clusters of very different size, vectors of very different
length, compared by dot product. Every contender is tuned on one half of the queries to the recall
asked for, and measured on the other, in batches of 100, round by round in turn. Queries per second
are per second of processor time, so that what else runs on the machine weighs little; the load is
noted beside them.

`--alone` makes our index only, and says what memory and time that takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version

import faiss
import hnswlib
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from records import Record
from records import replace as replace_rows

from recsys import config
from recsys.summary import index_table
from serving_export.index import ExactIndex
from serving_export.index_recall import Sample, halves
from serving_export.index_tuning import build
from serving_export.searcher import Structure, train

DIM = 64
K = 10
RECALL = 0.95
NUM_QUERIES = 2000
BATCH = 100
ROUNDS = 7
ALONE = "tuned index alone in a process"
TIE = 1e-5

Vectors = NDArray[np.float32]
Search = Callable[[Vectors], NDArray[np.integer]]


@dataclass(frozen=True)
class Contender:
    """An index that has been built and tuned: queries `[batch, dim]` to rows `[batch, K]`."""

    name: str
    search: Search
    build_seconds: float
    mib: float
    settings: str


def clustered(num_vectors: int, clusters: int, seed: int) -> Vectors:
    """Vectors `[num_vectors, DIM]` around centres that every seed shares.

    Cluster sizes follow a power law, lengths a log-normal law (the longest of a million are about
    four times the mean), as those of item embeddings do.
    """
    centres = np.random.default_rng(0).standard_normal((clusters, DIM), np.float32)
    share = 1 / np.arange(1, clusters + 1) ** 0.8
    random = np.random.default_rng(seed)
    vectors = np.empty((num_vectors, DIM), np.float32)
    for start in range(0, num_vectors, 100_000):
        part = vectors[start : start + 100_000]
        part[:] = centres[random.choice(clusters, len(part), p=share / share.sum())]
        part += np.float32(0.6) * random.standard_normal(part.shape, np.float32)
        part *= np.exp(np.float32(0.3) * random.standard_normal((len(part), 1), np.float32)) / 8
    return vectors


def recall(search: Search, sample: Sample) -> float:
    """Share of the exact top K that is found, by score."""
    hits = 0
    for start in range(0, len(sample.queries), BATCH):
        few = slice(start, start + BATCH)
        rows = search(sample.queries[few])
        scores = np.einsum("qd,qkd->qk", sample.queries[few], sample.corpus[rows])
        scores[rows < 0] = -np.inf
        hits += np.count_nonzero(scores >= sample.kth_best[few, np.newaxis] - TIE)
    return hits / (K * len(sample.queries))


def seconds_for(search: Search, queries: Vectors) -> float:
    """Processor seconds for all queries, in batches."""
    begun = time.process_time()
    for start in range(0, len(queries), BATCH):
        search(queries[start : start + BATCH])
    return time.process_time() - begun


def least(sample: Sample, most: int, make: Callable[[int], Search]) -> int | None:
    """The least effort that has the recall, to 10 %; None when `most` has not."""
    fails, meets = 0, 1
    while recall(make(meets), sample) < RECALL:
        if meets == most:
            return None
        fails, meets = meets, min(2 * meets, most)
    while meets - fails > max(1, fails // 10):
        middle = (fails + meets) // 2
        if recall(make(middle), sample) < RECALL:
            fails = middle
        else:
            meets = middle
    return meets


def exact(corpus: Vectors) -> Iterator[Contender]:
    """Exact search by TensorFlow (the exported variant `exact`) and by faiss."""
    made = ExactIndex(corpus)
    find = tf.function(made.search).get_concrete_function(
        tf.TensorSpec([None, DIM]), tf.TensorSpec([], tf.int32)
    )
    size = corpus.nbytes / 2**20
    k = tf.constant(K)
    yield Contender("exact, TensorFlow", lambda q: find(tf.constant(q), k)[0].numpy(), 0, size, "")
    flat = faiss.IndexFlatIP(DIM)
    flat.add(corpus)
    yield Contender("exact, faiss", lambda q: flat.search(q, K)[1], 0, size, "")


def alone(
    corpus: Vectors, queries: Vectors, seconds: float, data: str, command: str
) -> list[Record]:
    """Memory and time of tuning and building; the process has done nothing else before."""
    before, begun = _peak_gib(), time.process_time()
    _, report = build(corpus, queries, config.Index(min_recall=RECALL, k=K, max_seconds=seconds))
    print(index_table(report), flush=True)
    what = f"{ALONE}: {report.kind} " + " ".join(f"{n}={v:g}" for n, v in report.parameters.items())
    figures = {
        "peak GiB": _peak_gib(),
        "peak GiB before, libraries and corpus": before,
        "seconds to tune and build": report.seconds,
        "processor seconds to tune and build": time.process_time() - begun,
        f"recall@{K}": report.recall,
    }
    taken = Record(
        what,
        data,
        "processor ms a query",
        report.milliseconds_per_query,
        command,
        peer="exact, ScaNN",
        peer_value=next(p.milliseconds_per_query for p in report.curve if p.kind == "brute_force"),
    )
    rows = [Record(what, data, metric, value, command) for metric, value in figures.items()]
    return [taken, *rows]


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(corpus: Vectors, queries: Vectors, seconds: float) -> Contender:
    """The index that `recsys export` would write, called as in its SavedModel."""
    target = config.Index(min_recall=RECALL, k=K, max_seconds=seconds)
    made, report = build(corpus, queries, target)
    find = tf.function(made.search).get_concrete_function(
        tf.TensorSpec([None, DIM]), tf.TensorSpec([], tf.int32)
    )
    k = tf.constant(K)
    parameters = report.parameters
    structure = Structure(report.kind, int(parameters.get("num_leaves", 1)), parameters.get("avq"))
    begun = time.process_time()
    train(corpus, structure)
    built = time.process_time() - begun
    print(f"tuned in {report.seconds:.0f} s", index_table(report), sep="\n", flush=True)
    return Contender(
        "tuned index",
        lambda q: find(tf.constant(q), k)[0].numpy(),
        built,
        report.bytes / 2**20,
        f"{report.kind} " + " ".join(f"{n}={v:g}" for n, v in parameters.items()),
    )


def faiss_ivf(corpus: Vectors, tuning: Sample) -> Contender | None:
    """IVF-PQ fast-scan, candidates scored again in float32; lists, probes and candidates tuned.

    As many lists as our trees have leaves, from as many vectors a list. None where that does not
    reach the recall.
    """
    best: tuple[float, Contender] | None = None
    for lists in (int(len(corpus) ** 0.5), 2 * int(len(corpus) ** 0.5)):
        begun = time.process_time()
        index = faiss.index_factory(DIM, f"IVF{lists},PQ32x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(1).permutation(len(corpus))[: 256 * lists]
        index.train(corpus[sample])
        index.add(corpus)
        built = time.process_time() - begun
        for cost, factor, probes in _tuned_ivf(index, lists, tuning):
            if best is None or cost < best[0]:
                settings = f"IVF{lists},PQ32x4fs,RFlat nprobe={probes} k_factor={factor}"
                search = _ivf_search(index, factor, probes)
                best = (
                    cost,
                    Contender("faiss IVF-PQ fast-scan", search, built, _mib(index), settings),
                )
    return best[1] if best else None


def _tuned_ivf(index: faiss.Index, lists: int, tuning: Sample) -> Iterator[tuple[float, int, int]]:
    """Processor seconds, candidates scored again per neighbour, probes: what has the recall."""
    for factor in (2, 4, 8, 16, 32):
        probes = least(tuning, lists, lambda n, f=factor: _ivf_search(index, f, n))
        if probes:
            search = _ivf_search(index, factor, probes)
            yield min(seconds_for(search, tuning.queries) for _ in range(3)), factor, probes


def _ivf_search(index: faiss.Index, factor: int, probes: int) -> Search:
    inner = faiss.extract_index_ivf(index)

    def search(queries: Vectors) -> NDArray[np.integer]:
        index.k_factor, inner.nprobe = factor, probes
        return index.search(queries, K)[1]

    return search


def faiss_hnsw(corpus: Vectors, tuning: Sample) -> Contender:
    """HNSW of faiss: 16 links, 40 at construction (its default)."""
    begun = time.process_time()
    index = faiss.IndexHNSWFlat(DIM, 16, faiss.METRIC_INNER_PRODUCT)
    index.add(corpus)
    built = time.process_time() - begun

    def with_effort(ef: int) -> Search:
        def search(queries: Vectors) -> NDArray[np.integer]:
            index.hnsw.efSearch = ef
            return index.search(queries, K)[1]

        return search

    ef = least(tuning, 4096, with_effort) or 4096
    return Contender(
        "faiss HNSW", with_effort(ef), built, _mib(index), f"M=16 efConstruction=40 efSearch={ef}"
    )


def hnsw(corpus: Vectors, tuning: Sample) -> Contender:
    """HNSW of hnswlib: 16 links, 100 at construction."""
    begun = time.process_time()
    index = hnswlib.Index("ip", DIM)
    index.init_index(len(corpus), ef_construction=100, M=16)
    index.set_num_threads(1)
    index.add_items(corpus, num_threads=1)
    built = time.process_time() - begun

    def with_effort(ef: int) -> Search:
        def search(queries: Vectors) -> NDArray[np.integer]:
            index.set_ef(ef)
            return index.knn_query(queries, K, num_threads=1)[0].astype(np.int64)

        return search

    ef = least(tuning, 4096, lambda n: with_effort(max(n, K))) or 4096
    links = len(corpus) * (2 * 16 + 1) * 4
    settings = f"M=16 ef_construction=100 ef={ef}"
    return Contender("hnswlib", with_effort(ef), built, (corpus.nbytes + links) / 2**20, settings)


def _mib(index: faiss.Index) -> float:
    writer = faiss.VectorIOWriter()
    faiss.write_index(index, writer)
    return writer.data.size() / 2**20


def measure(contenders: list[Contender], reported: Sample) -> dict[str, float]:
    """Queries per second of processor time, the best of the rounds; all take part in each."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(ROUNDS):
        for contender in contenders:
            slow = contender.name.startswith("exact")
            queries = reported.queries[: 3 * BATCH if slow else None]
            seconds[contender.name].append(seconds_for(contender.search, queries) / len(queries))
    return {name: 1 / min(each) for name, each in seconds.items()}


def records(
    contenders: list[Contender], reported: Sample, data: str, command: str
) -> Iterator[Record]:
    """Speed beside each peer, then recall, size and building of each."""
    speed = measure(contenders, reported)
    here = next(c for c in contenders if c.name == "tuned index")
    versions = {name: version(name) for name in ("faiss-cpu", "hnswlib")}
    made = []
    for peer in contenders:
        if peer is not here:
            target = "at least 10 times" if peer.name.startswith("exact") else "ahead"
            metric = f"queries/s at recall@{K} >= {RECALL}, batches of {BATCH}, one core"
            made.append(
                Record(
                    what=here.settings,
                    data=data,
                    metric=metric,
                    value=speed[here.name],
                    command=command,
                    peer=f"{peer.name} {peer.settings}".strip(),
                    peer_value=speed[peer.name],
                    target=target,
                )
            )
    for one in contenders:
        what = f"{one.name} {one.settings}".strip()
        found = recall(one.search, reported)
        made += [
            Record(what, data, f"recall@{K}", found, command, target=f"at least {RECALL}"),
            Record(what, data, "MiB", one.mib, command),
            Record(what, data, "processor seconds to build", one.build_seconds, command),
        ]
    together = "all of them in one process"
    made.append(Record(together, data, "peak GiB", _peak_gib(), command, target="6"))
    yield from (replace(one, versions=one.versions | versions) for one in made)


def beside(corpus: Vectors, queries: Vectors, seconds: float) -> tuple[list[Contender], Sample]:
    """All contenders, built and tuned, and the queries to measure them with."""
    tuning, reported = halves(corpus, queries, K)
    contenders = list(exact(corpus))
    for make in (
        lambda: ours(corpus, queries, seconds),
        lambda: faiss_ivf(corpus, tuning),
        lambda: faiss_hnsw(corpus, tuning),
        lambda: hnsw(corpus, tuning),
    ):
        made = make()
        print(time.strftime("%H:%M:%S"), made or "it does not reach the recall", flush=True)
        contenders += [made] if made else []
    return contenders, reported


def main() -> None:
    """Measure all contenders, or what ours takes alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=2000, help="in the corpus made here")
    parser.add_argument("--seconds", type=float, default=300, help="for the search of our settings")
    parser.add_argument("--alone", action="store_true", help="ours only: its memory and time")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) > 1:
        parser.error(
            "give it one core, `taskset -c 1 python ...`: all threads of all libraries share it"
        )
    faiss.omp_set_num_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    corpus = clustered(arguments.size, arguments.clusters, seed=1)
    queries = clustered(NUM_QUERIES, arguments.clusters, seed=2)
    made_of = f"{arguments.size} x {DIM}, {arguments.clusters} clusters, norms vary"
    given = f"--size {arguments.size} --clusters {arguments.clusters}"
    command = f"taskset -c 1 python benchmarks/index.py {given}"
    if arguments.alone:
        data = f"{made_of}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        found = alone(corpus, queries, arguments.seconds, data, f"{command} --alone")
    else:
        contenders, reported = beside(corpus, queries, arguments.seconds)
        data = f"{made_of}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        found = list(records(contenders, reported, data, command))

    def stale(row: dict[str, object]) -> bool:
        is_alone = str(row["what"]).startswith(ALONE)
        return str(row["data"]).startswith(made_of) and is_alone == arguments.alone

    replace_rows("index", found, stale)
    for record in found:
        print(
            record.what,
            record.metric,
            f"{record.value:.4g}",
            record.peer,
            record.peer_value,
            record.ratio,
        )


if __name__ == "__main__":
    main()
