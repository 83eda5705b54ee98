"""Several held-out items a user in a table without time stamps: from two CSV files to the gate."""

import csv
from collections import defaultdict

import numpy as np
import pytest

from recsys.config import load_config
from recsys.dataset import raw_batches, read_corpus, read_interactions
from recsys.models.embed import embed, in_batches, load_towers
from serving_export.gate import against_baselines, against_champion
from training.evaluate import evaluate, evaluate_savedmodel
from training.fit import fit
from training.prepare import prepare

YAML = """
name: held_out
data:
  events:
    path: train.csv
    format: csv
    options: {header: "true"}
    columns: {user: user, item: item, order: [position]}
  held_out:
    path: test.csv
    format: csv
    options: {header: "true", sep: ";"}
    columns: {user: who, item: what}
  split: {kind: held_out}
  exclude_seen: true
  shards: 2
features:
  - {name: history, side: query, kind: history, of: item_id, length: 5}
  - {name: item_id, side: candidate, kind: id, column: item}
model: {embedding_dim: 16, dropout: 0.1}
train: {epochs: 3, global_batch_size: 32, learning_rate: 0.02, monitor: ndcg@10}
evaluation: {k: [3, 10], bootstrap_samples: 50, baselines: [popularity, markov]}
registry: {model: held_out, gate: {metric: ndcg@10}}
cluster: {master: "local[2]"}
"""


@pytest.fixture(scope="module")
def tables(planted, tmp_path_factory):
    """Folder of the config; all but the last three clicks of a user, and these as a set."""
    folder = tmp_path_factory.mktemp("held_out")
    clicks = defaultdict(list)
    for user, item in zip(planted.user, planted.item, strict=True):
        clicks[f"u{user}"].append(f"i{item}")
    held_out = {user: set(items[-3:]) for user, items in clicks.items()}
    # A user that no event has, and an item that none has.
    held_out |= {"stranger": {"i1", "i2"}, "u0": held_out["u0"] | {"no such item"}}
    events = {user: items[:-3] for user, items in clicks.items()}
    with (folder / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user", "item", "position"])
        for user, items in events.items():
            writer.writerows([user, item, place] for place, item in enumerate(items))
    with (folder / "test.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["who", "what"])
        writer.writerows([user, item] for user, items in held_out.items() for item in items)
    (folder / "config.yaml").write_text(YAML)
    return folder, events, held_out


@pytest.fixture(scope="module")
def run(tables, spark):
    config = load_config(tables[0] / "config.yaml")
    data = prepare(config, spark, tables[0] / "data")
    model = fit(config, data, tables[0] / "model")
    return config, data, model, evaluate(config, data, model, None, tables[0] / "evaluation")


def expected_lists(data, model, events):
    """Ten best items that the user has not seen, by user, from the towers alone."""
    towers, corpus = load_towers(model.directory / model.towers), read_corpus(data)
    queries = embed(towers, "embed_query", raw_batches(data, data.test, 256))["embedding"]
    candidates = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    users = read_interactions(data, data.test, corpus).user_id
    for user, scores in zip(users, queries @ candidates.T, strict=True):
        best = corpus.item[np.argsort(-scores)].astype(str)
        seen = events.get(user.decode(), [])
        yield user.decode(), [item for item in best if item not in seen][:10]


def test_the_report_is_what_sets_of_items_give(run, tables):
    """Counted anew, from the towers and the two tables, without ranks."""
    _, data, model, report = run
    _, events, held_out = tables
    wanted = {user: items - set(events.get(user, [])) for user, items in held_out.items()}
    wanted = {user: items for user, items in wanted.items() if items}
    assert max(map(len, wanted.values())) >= 3
    assert report.num_queries == len(wanted) == data.test.num_examples > 300
    assert data.test.num_labels == sum(map(len, wanted.values()))
    assert (data.test.num_cold_users, data.test.num_cold_items) == (1, 1)
    assert report.window == (None, None)
    found = {"recall@10": [], "ndcg@10": [], "mrr@10": [], "hit_rate@10": []}
    discount = 1 / np.log2(np.arange(2, 12))
    for user, best in expected_lists(data, model, events):
        if user == "stranger":
            continue
        hit = np.array([item in wanted[user] for item in best])
        found["recall@10"].append(hit.sum() / len(wanted[user]))
        found["ndcg@10"].append((hit * discount).sum() / discount[: len(wanted[user])].sum())
        found["mrr@10"].append(1 / (1 + hit.argmax()) if hit.any() else 0)
        found["hit_rate@10"].append(hit.any())
    # Without a history all items tie, so what any sorting of them would hit is luck.
    stranger = report.slices["user"]["cold"]
    assert stranger["queries"] == 1
    for metric, values in found.items():
        expected = np.mean([*values, stranger[metric]])
        assert report.model[metric].value == pytest.approx(expected), metric
    unknown = report.slices["item_popularity"]["cold"]
    assert (unknown["queries"], unknown["recall@10"], unknown["ndcg@10"]) == (1, 0, 0)


def test_what_follows_in_the_plant_is_found(run):
    *_, report = run
    popular, markov = (report.baselines[name]["recall@10"] for name in ("popularity", "markov"))
    assert markov.value > popular.high
    assert report.model["recall@10"].low > popular.high
    assert report.lifts["popularity"]["ndcg@10"].low > 0


def test_champion_and_gate_read_the_same_queries(run, tmp_path):
    config, data, model, report = run
    champion = evaluate_savedmodel(config, data, model.directory / model.towers, tmp_path)
    assert champion.model == report.model
    draw = against_champion(config, report, champion, "1")
    assert (draw.lift.low, draw.lift.value, draw.lift.high) == (0, 0, 0)
    assert not draw.holds
    assert [c.rival for c in against_baselines(config, report)] == ["popularity", "markov"]
