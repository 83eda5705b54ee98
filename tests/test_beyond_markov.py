"""Sessions in which the last click alone does not tell the next: encoders must beat counting."""

import pandas as pd
import pytest

from recsys.config import load_config
from recsys.synthetic import clickstream
from training.evaluate import evaluate
from training.fit import fit
from training.prepare import prepare

YAML = """
name: moods
data:
  events: {path: clicks.parquet, columns: {user: user, item: item, time: clicked_at}}
  split: {kind: time, validation_days: 2, test_days: 4}
  history_scope: session
  min_history: 2
  shards: 1
features:
  - {name: history, side: query, kind: history, of: item_id, length: 5}
  - {name: item_id, side: candidate, kind: id, column: item}
model: {embedding_dim: 32, dropout: 0.1, loss: {temperature: 0.1}}
train: {epochs: 12, patience: 12, global_batch_size: 32, learning_rate: 0.02, monitor: recall@1}
evaluation: {k: [1, 20], baselines: [markov], bootstrap_samples: 50}
registry: {model: moods}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each session follows one of two successors of an item, told by the clicks before the last."""
    folder = tmp_path_factory.mktemp("moods")
    clicks = clickstream(
        num_sessions=900, num_items=24, num_clusters=2, predictability=0.9, num_moods=2, seed=1
    )
    events = {"user": clicks.user, "item": clicks.item}
    frame = pd.DataFrame({name: values.astype(str) for name, values in events.items()})
    # Timestamps of nanoseconds are none that Spark reads.
    frame["clicked_at"] = pd.Series(clicks.clicked_at).astype("datetime64[us, UTC]")
    frame.to_parquet(folder / "clicks.parquet")
    (folder / "moods.yaml").write_text(YAML)
    return folder


@pytest.fixture(scope="module")
def data(folder, spark):
    return prepare(load_config(folder / "moods.yaml"), spark, folder / "data")


@pytest.mark.parametrize("kind", ["gru", "lstm", "attention"])
def test_an_encoder_finds_what_markov_cannot(folder, data, kind):
    config = load_config(folder / "moods.yaml", [f"model.history.kind={kind}"])
    model = fit(config, data, folder / kind / "model")
    report = evaluate(config, data, model, None, folder / kind / "evaluation")
    assert report.baselines["markov"]["recall@1"].value < 0.6
    assert report.lifts["markov"]["recall@1"].low > 0.1
