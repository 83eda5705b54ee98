"""Several tasks in the second stage: will a candidate be clicked, put into the cart, bought?

One network reads the request; what its tasks share, and what each has for itself, is the choice of
`ranking.multitask.kind`. Every task has a tower of its own with an output for each candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.features import FeatureEncoder
from recsys.models.dropout import Dropouts
from recsys.models.ranker_features import KnownItems
from recsys.models.ranking import Ranker, Tower
from recsys.ranking_config import Ranking
from recsys.schema import Schema


class Expert(tf.keras.layers.Layer):
    """Layers with GELU, dropout before each.

    Args:
        hidden: units of the layers.
        dropouts: maker of the dropout layers.
    """

    def __init__(self, hidden: Sequence[int], dropouts: Dropouts) -> None:
        super().__init__()
        self._hidden = [tf.keras.layers.Dense(units, "gelu") for units in hidden]
        self._dropouts = [dropouts() for _ in hidden]

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give `[..., units of the last layer]`."""
        for layer, dropout in zip(self._hidden, self._dropouts, strict=True):
            inputs = layer(dropout(inputs, training=training))
        return inputs


class Gate(tf.keras.layers.Layer):
    """A mean of what experts say, weighed by the softmax of a linear layer over an input.

    Args:
        num_experts: how many it weighs.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._weights = tf.keras.layers.Dense(num_experts, "softmax", use_bias=False)

    def call(self, inputs: tf.Tensor, said: Sequence[tf.Tensor]) -> tf.Tensor:
        """Weigh `said`, `[..., units]` by expert, by `inputs`, `[..., any]`."""
        return tf.einsum("...e,...eu->...u", self._weights(inputs), tf.stack(said, axis=-2))


class SharedBottom(tf.keras.layers.Layer):
    """The layers of `hidden` once, for all tasks (Caruana, "Multitask Learning", 1997).

    Args:
        config: of the model; its `tasks` have a tower each.
        dropouts: maker of the dropout layers.
    """

    def __init__(self, config: Ranking, dropouts: Dropouts) -> None:
        super().__init__()
        self._bottom = Expert(config.hidden, dropouts)
        self._towers = [Tower(config.multitask.tower, dropouts) for _ in config.tasks]

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give `[..., tasks]` of `[..., any]`."""
        shared = self._bottom(inputs, training=training)
        return tf.concat([tower(shared, training=training) for tower in self._towers], axis=-1)


class MixtureOfExperts(tf.keras.layers.Layer):
    """Experts that all tasks share, and a gate for each task over all of them.

    MMoE: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", KDD 2018. An expert has the layers of `hidden`.

    Args:
        config: of the model.
        dropouts: maker of the dropout layers.
    """

    def __init__(self, config: Ranking, dropouts: Dropouts) -> None:
        super().__init__()
        count = config.multitask.experts
        self._experts = [Expert(config.hidden, dropouts) for _ in range(count)]
        self._gates = [Gate(count) for _ in config.tasks]
        self._towers = [Tower(config.multitask.tower, dropouts) for _ in config.tasks]

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give `[..., tasks]` of `[..., any]`."""
        said = [expert(inputs, training=training) for expert in self._experts]
        return tf.concat(
            [
                tower(gate(inputs, said), training=training)
                for gate, tower in zip(self._gates, self._towers, strict=True)
            ],
            axis=-1,
        )


class Extraction(tf.keras.layers.Layer):
    """One level of progressive extraction: experts of each task, experts of all, and their gates.

    A task sees its own experts and the shared ones; what is shared goes on as a mean of all.

    Args:
        units: of the experts, a layer each.
        config: of the model.
        dropouts: maker of the dropout layers.
        last: whether nothing shared is needed any more.
    """

    def __init__(self, units: int, config: Ranking, dropouts: Dropouts, last: bool) -> None:
        super().__init__()
        shared, own = config.multitask.experts, config.multitask.task_experts
        self._shared = [Expert([units], dropouts) for _ in range(shared)]
        self._own = [[Expert([units], dropouts) for _ in range(own)] for _ in config.tasks]
        self._gates = [Gate(own + shared) for _ in config.tasks]
        self._shared_gate = None if last else Gate(own * len(config.tasks) + shared)

    def call(self, states: Sequence[tf.Tensor], training: bool = False) -> list[tf.Tensor]:
        """Next states of the tasks, then that of what is shared; `[..., any]` each."""
        *tasks, shared = states
        common = [expert(shared, training=training) for expert in self._shared]
        said = [
            [expert(state, training=training) for expert in own]
            for state, own in zip(tasks, self._own, strict=True)
        ]
        found = [
            gate(state, [*own, *common])
            for gate, state, own in zip(self._gates, tasks, said, strict=True)
        ]
        if self._shared_gate is not None:
            found.append(self._shared_gate(shared, [*chain.from_iterable(said), *common]))
        return found


class ProgressiveExtraction(tf.keras.layers.Layer):
    """Levels in which tasks part step by step, one for each of the layers of `hidden`.

    PLE: Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for
    Personalized Recommendations", RecSys 2020; a single level is its CGC.

    Args:
        config: of the model.
        dropouts: maker of the dropout layers.
    """

    def __init__(self, config: Ranking, dropouts: Dropouts) -> None:
        super().__init__()
        last = len(config.hidden) - 1
        self._levels = [
            Extraction(units, config, dropouts, level == last)
            for level, units in enumerate(config.hidden)
        ]
        self._towers = [Tower(config.multitask.tower, dropouts) for _ in config.tasks]

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give `[..., tasks]` of `[..., any]`."""
        states = [inputs] * (len(self._towers) + 1)
        for level in self._levels:
            states = level(states, training=training)
        return tf.concat(
            [
                tower(state, training=training)
                for tower, state in zip(self._towers, states, strict=True)
            ],
            axis=-1,
        )


HEADS = {
    "shared_bottom": SharedBottom,
    "mmoe": MixtureOfExperts,
    "ple": ProgressiveExtraction,
}


class TaskWeights(tf.keras.layers.Layer):
    """Losses of tasks to one, by fixed weights, or by learned uncertainties on top of them.

    Learned, the loss of task t is `w (loss exp(-s) + s / 2)`, where `s` is the logarithm of a
    variance: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics", CVPR 2018. Where a loss is small by nature, as that of a rare event is,
    it then counts as much as others.

    Args:
        weights: `w` by task.
        learned: whether there are uncertainties.
    """

    def __init__(self, weights: Sequence[float], learned: bool) -> None:
        super().__init__()
        self._fixed = np.array(weights, np.float32)
        self._log_variance = None
        if learned:
            shape = self._fixed.shape
            self._log_variance = self.add_weight("log_variance", shape, initializer="zeros")

    def call(self, losses: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give a scalar of `[tasks]`; what is held out is always weighed by the fixed weights."""
        if training and self._log_variance is not None:
            losses = losses * tf.exp(-self._log_variance) + self._log_variance / 2
        return tf.reduce_sum(self._fixed * losses)


class Multitask(Ranker):
    """Trains a `RankingNetwork` for several tasks, `config.tasks`, at once.

    Args:
        config: of the model.
        schema: of the run.
        encoder: of raw features.
        items: of the corpus.
        seed: of masks.
        prior: `[tasks]` log odds of a candidate, where the logits begin.
    """

    def __init__(
        self,
        config: Ranking,
        schema: Schema,
        encoder: FeatureEncoder,
        items: KnownItems,
        seed: int,
        prior: NDArray[np.floating[Any]],
    ) -> None:
        super().__init__(config, schema, encoder, items, seed, prior)
        self._order = [np.float32(weight) for weight in config.task_order]
        learned = config.multitask.weights == "learned"
        self.task_weights = TaskWeights(list(config.tasks.values()), learned)

    def _head(self, config: Ranking, dropouts: Dropouts) -> tf.keras.layers.Layer:
        return HEADS[config.multitask.kind](config, dropouts)

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Log odds of the candidates of encoded requests by task, `[batch, candidates, tasks]`."""
        return self.network(encoded, training=training)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Loss of a batch of requests.

        Args:
            inputs: beside an encoded request `task_labels` `[batch, candidates, tasks]`, 1 where
                the user did that with the candidate, and `weight` `[batch]`.
            training: whether to drop units, and to learn the weights of the tasks.
        """
        logits = tf.unstack(self(inputs, training=training), axis=-1)
        labels = tf.unstack(tf.cast(inputs["task_labels"], tf.float32), axis=-1, num=len(logits))
        pairs = zip(labels, logits, strict=True)
        losses = tf.stack([self._loss(*pair, inputs) for pair in pairs])
        return self.task_weights(losses, training=training)

    def answers(self, log_odds: tf.Tensor) -> dict[str, tf.Tensor]:
        """Beside `scores` `log_odds` by task, `[batch, candidates, tasks]`.

        A score is the log odds of the mean of the tasks' probabilities, weighed by `config.order`.
        """
        parts = [
            (tf.math.log(weight), odds)
            for weight, odds in zip(self._order, tf.unstack(log_odds, axis=-1), strict=True)
            if weight
        ]
        yes = [weight + tf.math.log_sigmoid(odds) for weight, odds in parts]
        no = [weight + tf.math.log_sigmoid(-odds) for weight, odds in parts]
        total = [tf.reduce_logsumexp(tf.stack(part), axis=0) for part in (yes, no)]
        return {"scores": total[0] - total[1], "log_odds": log_odds}
