"""A tiny prepared data set and hand-made towers, for tests of what reads them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import tensorflow as tf

from recsys.artifacts import Corpus, Examples, Impressions, PreparedData, Queries, Sequences
from recsys.config import Cluster, RunConfig

ITEMS = "abcdef"
FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 4},
    {"name": "country", "side": "query", "kind": "category"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "price", "side": "candidate", "kind": "number"},
]


def _record(**fields):
    def feature(value):
        values = value if isinstance(value, list) else [value]
        if all(isinstance(v, str) for v in values):
            content = tf.train.BytesList(value=[v.encode() for v in values])
            return tf.train.Feature(bytes_list=content)
        if all(isinstance(v, int) for v in values):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    features = tf.train.Features(feature={name: feature(v) for name, v in fields.items()})
    return tf.train.Example(features=features).SerializeToString()


def _write(folder, records):
    folder.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(folder / "part-00000.tfrecord")) as writer:
        for record in records:
            writer.write(record)


def _examples(folder, name, triples, exclude_seen, outcomes=None):
    """Write examples; outcomes are pairs of item and event, a list for each triple."""
    records = [
        _record(
            user=user,
            time=1,
            label=label,
            weight=1.0,
            history=list(history),
            country="AT",
            **({"exclusions": sorted(set(history))} if exclude_seen else {}),
            outcome_items=[item for item, _ in followed],
            outcome_events=[event for _, event in followed],
        )
        for (user, label, history), followed in zip(
            triples, outcomes or [[]] * len(triples), strict=True
        )
    ]
    _write(folder / name, records)
    return Examples(path=name, **_told(triples))


def _sequences(folder, name, triples):
    """Write sequences of one label each; country is a list, as it belongs to the label."""
    records = [
        _record(
            user=user,
            history=list(history),
            label=[label],
            known=[len(history)],
            time=[1],
            weight=[1.0],
            country=["AT"],
        )
        for user, label, history in triples
    ]
    _write(folder / name, records)
    return Sequences(path=name, num_sequences=len(triples), **_told(triples))


def _impressions(folder, shown):
    """Write shown lists by window: (user, history, items, clicked items), and prices if there are.

    `zz` is no candidate.
    """
    told = {}
    priced = any(prices for lists in shown.values() for *_, prices in map(_list, lists))
    for window, lists in shown.items():
        records = [
            _record(
                user=user,
                time=n,
                label=list(clicked),
                history=list(history),
                country="AT",
                shown_items=list(items),
                shown_positions=[place + 1 for place in range(len(items))],
                **({"as_shown_price": prices} if priced else {}),
            )
            for n, (user, history, items, clicked, prices) in enumerate(map(_list, lists))
        ]
        _write(folder / "impressions" / window, records)
        clicks = sum(len(clicked) for *_, clicked, _ in map(_list, lists))
        told[window] = Queries(path=f"impressions/{window}", num_labels=clicks, **_told(lists))
    counts = [_record(item=i, shown=[n, 9], clicked=[n // 2, 5]) for n, i in enumerate(ITEMS)]
    _write(
        folder / "impressions" / "counts",
        [_record(item="zz", shown=[9, 9], clicked=[9, 9]), *counts],
    )
    longest = max(len(one[2]) for lists in shown.values() for one in lists)
    values = ("price",) if priced else ()
    counts = "impressions/counts"
    return Impressions(**told, counts=counts, longest=longest, positions=True, values=values)


def _list(told):
    return told if len(told) == 5 else (*told, [])


def _told(triples):
    moment = datetime(2008, 8, 1, tzinfo=UTC)
    return {"num_examples": len(triples), "num_files": 1, "first_at": moment, "last_at": moment}


@pytest.fixture
def tiny_config():
    """Config of the tiny data: k of 1 and 3, all counting baselines."""
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {
                "events": {"path": "x.csv", "columns": {"user": "u", "item": "i", "order": ["n"]}},
                "split": {"kind": "leave_last_out"},
            },
            "features": FEATURES,
            "evaluation": {
                "k": [1, 3],
                "baselines": ["popularity", "last_viewed", "markov", "covisitation"],
                "bootstrap_samples": 50,
            },
            "registry": {"model": "tiny", "gate": {"metric": "ndcg@3"}},
        }
    )


@pytest.fixture
def tiny_data(tmp_path, tiny_config):
    """Write splits of (user, label, history) triples; the corpus is a to f, a most popular.

    `outcomes` are those of `validation` and `test`, `shown` what was shown in them.
    """

    def write(train, validation, test, exclude_seen=False, outcomes=None, shown=None):
        folder = tmp_path / "data"
        followed = outcomes or {}
        splits = {
            "train": _sequences(folder, "train", train),
            "recent": _sequences(folder, "recent", validation),
        }
        for name, triples in (("validation", validation), ("test", test)):
            own = followed.get(name)
            splits[name] = _examples(folder, name, triples, exclude_seen, own)
        labels = [sum(label == item for _, label, _ in train) for item in ITEMS]
        counts = [7, 5, 4, 2, 1, 0]  # f is cold
        _write(
            folder / "corpus",
            [
                _record(item=i, name=i, count=c, labels=n, item_id=i, price=float(p))
                for i, c, n, p in zip(ITEMS, counts, labels, range(6, 0, -1), strict=True)
            ],
        )
        return PreparedData(
            directory=folder,
            features=tiny_config.schema_,
            fingerprint=tiny_config.schema_.fingerprint,
            **splits,
            corpus=Corpus(path="corpus", num_items=6, num_warm=5),
            users="users",
            num_users=3,
            vocabularies={},
            statistics={},
            cleaning={},
            sources={},
            exclude_seen=exclude_seen,
            outcomes=outcomes is not None,
            impressions=_impressions(folder, shown) if shown else None,
        ).save()

    return write


class NextLetter(tf.Module):
    """Towers that predict the letter after the last one; all others by falling price."""

    def __init__(self, history="history", price_dtype=tf.float32, broken=False):
        super().__init__()
        letters = tf.constant(list(ITEMS))
        self.rows = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(letters, tf.range(6)), default_value=-1
        )
        self.broken = broken
        self.by_name = {
            "embed_query": tf.function(
                lambda **inputs: {"embedding": self._query(inputs[history])},
                input_signature=None,
            ).get_concrete_function(**{history: tf.TensorSpec([None, None], tf.string, history)}),
            "embed_candidate": tf.function(
                lambda item_id, price: {"embedding": self._candidate(item_id, price)}
            ).get_concrete_function(
                item_id=tf.TensorSpec([None], tf.string, "item_id"),
                price=tf.TensorSpec([None], price_dtype, "price"),
            ),
        }

    def _query(self, history):
        rows = self.rows.lookup(history)
        length = tf.reduce_sum(tf.cast(rows >= 0, tf.int32), axis=1)
        last = tf.gather(rows, tf.maximum(length - 1, 0), batch_dims=1)
        following = tf.one_hot(tf.where(last >= 0, (last + 1) % 6, -1), 6)
        constant = tf.ones([tf.shape(history)[0], 1]) / (0.0 if self.broken else 1.0)
        return tf.concat([following, constant], axis=1)

    def _candidate(self, item_id, price):
        cheap = tf.cast(price, tf.float32)[:, None] / 100
        return tf.concat([tf.one_hot(self.rows.lookup(item_id), 6), cheap], axis=1)


@pytest.fixture
def tiny_towers(tmp_path):
    """Write a SavedModel with the two signatures; returns its folder."""

    def write(name="model/towers", **settings):
        module = NextLetter(**settings)
        tf.saved_model.save(module, str(tmp_path / name), signatures=module.by_name)
        return tmp_path / name

    return write


@pytest.fixture
def two_workers():
    """Cluster section for two workers on Spark, impatient."""
    return Cluster(kind="spark", workers=2, restart_seconds=0, heartbeat_timeout_seconds=10)


@pytest.fixture
def launched(spark, monkeypatch):
    """The module of functions to launch, known to driver and executors."""
    file = Path(__file__).with_name("launched.py")
    monkeypatch.syspath_prepend(str(file.parent))
    spark.sparkContext.addPyFile(str(file))
    import launched

    return launched
