"""The config of the model and of its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field, model_validator

from recsys.section import Section

#: Instead of a folder: the version of the registry that has this alias.
CHAMPION = "champion"
#: Columns of the events that `joint` learns from, beside those of their queries.
_OF_JUDGED = {"event", "outcome", "total"}
#: Keys of `model` with other values of which weights have another shape, or mean something else.
FIXED_BY_WARM_START = (
    "embedding_dim",
    "history.kind",
    "history.num_heads",
    "num_neighbours",
    "share_item_embeddings",
    "loss.normalize",
)


class Loss(Section):
    """Softmax: over which candidates, at which temperature."""

    temperature: float = Field(0.07, gt=0)
    normalize: bool = Field(True, description="compare by cosine instead of dot product")
    full_softmax_up_to: int = Field(
        20_000, ge=0, description="corpora up to this size are their own negatives, all of them"
    )
    num_uniform_negatives: int = Field(4096, ge=0, description="drawn per step from all items")
    num_popular_negatives: int = Field(
        0, ge=0, description="drawn per step by how often items are labels"
    )
    in_batch_negatives: bool = Field(
        True, description="labels of a batch are negatives of each other, beside those drawn"
    )
    num_hard_negatives: int | None = Field(
        None, ge=1, description="only the hardest negatives of each query count; all if empty"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that all candidates divide evenly"
    )
    recency_half_life_days: float | None = Field(
        None, gt=0, description="a label so much older than the last one counts half"
    )
    half_precision: bool = Field(
        False, description="multiply in bfloat16: faster where the processor has it"
    )

    @model_validator(mode="after")
    def _has_negatives(self) -> Loss:
        drawn = self.num_uniform_negatives + self.num_popular_negatives
        if not self.in_batch_negatives and not drawn:
            raise ValueError(
                "in_batch_negatives=false needs num_uniform_negatives or num_popular_negatives"
            )
        return self


class HistoryEncoder(Section):
    """What makes a vector of the events before a query."""

    kind: Literal["mean", "gru", "lstm", "attention"] = "gru"
    num_blocks: int = Field(1, ge=1, description="of attention")
    num_heads: int = Field(2, ge=1, description="of attention; divides model.embedding_dim")
    salience: bool = Field(
        False, description="pools weigh an event by what it is, not by its recency alone"
    )
    repeats: bool = Field(
        True, description="seen items get a score of their own, where they may be recommended"
    )


class Joint(Section):
    """Retrieval and ranking jointly: the towers also learn of which type an event is."""

    positive: tuple[str, ...] = Field(
        min_length=1, description="event types that are 1; the others of data.event_types are 0"
    )
    weight: float = Field(1.0, ge=0, description="of the ranking loss")
    retrieval_weight: float = Field(1.0, ge=0, description="of the retrieval loss")
    hidden: tuple[int, ...] = Field((64,), description="layers of the ranking head")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the ranking head")

    @model_validator(mode="after")
    def _learns(self) -> Joint:
        if not self.weight and not self.retrieval_weight:
            raise ValueError("weight and retrieval_weight are both 0: nothing would be learned")
        return self


class TwoTowerConfig(Section):
    """Two towers that meet in a dot product."""

    kind: Literal["two_tower"] = "two_tower"
    embedding_dim: int = Field(128, ge=2)
    history: HistoryEncoder = HistoryEncoder()
    share_item_embeddings: bool = Field(
        True, description="histories and candidates use the same vectors"
    )
    num_neighbours: int = Field(
        0, ge=0, description="of the items visited closest to an item the mean vector is added"
    )
    hidden: tuple[int, ...] = Field((), description="hidden layers of the query tower")
    dropout: float = Field(0.5, ge=0, lt=1)
    candidate_dropout: float = Field(0.0, ge=0, lt=1)
    id_dropout: float = Field(
        0.0, ge=0, lt=1, description="item ids dropped, so that features carry new items"
    )
    mixed_precision: bool = Field(
        False, description="encoder and hidden layers train in bfloat16; what is saved is float32"
    )
    loss: Loss = Loss()
    joint: Joint | None = Field(None, description="without it the towers learn retrieval alone")

    @model_validator(mode="after")
    def _divisible(self) -> TwoTowerConfig:
        if self.history.kind == "attention" and self.embedding_dim % self.history.num_heads:
            raise ValueError(
                f"embedding_dim={self.embedding_dim} is not divisible by "
                f"history.num_heads={self.history.num_heads}"
            )
        return self

    def check_events(self, times: bool, items: bool) -> None:
        """Refuse to learn from what the events do not tell: times, or which items came before."""
        if self.loss.recency_half_life_days and not times:
            raise ValueError("model.loss.recency_half_life_days needs data.events.columns.time")
        if self.num_neighbours and not items:
            raise ValueError(
                "model.num_neighbours counts which items are visited together: it needs a feature "
                "of kind history that lists item ids"
            )


class Train(Section):
    """How long, how fast, and when to stop."""

    epochs: int = Field(12, ge=1)
    global_batch_size: int = Field(256, ge=1, description="sequences per step")
    optimizer: Literal["adam", "adagrad"] = "adam"
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as in AdamW; adam only")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="cosine falls to zero at the last epoch"
    )
    warmup_steps: int = Field(0, ge=0, description="the learning rate rises linearly")
    clip_norm: float | None = Field(None, gt=0, description="of the gradient of all variables")
    shuffle_buffer: int = Field(100_000, ge=1, description="sequences")
    cache_mib: int = Field(
        256, ge=0, description="training files of so many MiB in all are parsed once, into memory"
    )
    monitor: str = Field(
        "ndcg@20",
        pattern=r"^((recall|ndcg|mrr|hit_rate)@[1-9][0-9]*|auc)$",
        description="on the validation window; auc is that of model.joint",
    )
    patience: int = Field(3, ge=1, description="epochs without a better `monitor` before stopping")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints within an epoch; none if empty"
    )
    refit: bool = Field(
        False, description="in the end train anew, for as many epochs, on validation labels too"
    )
    warm_start: str | None = Field(
        None, description="`champion`, or the folder of a run: begin with the weights of its model"
    )

    @model_validator(mode="after")
    def _decays(self) -> Train:
        if self.weight_decay and self.optimizer != "adam":
            raise ValueError(f"weight_decay needs optimizer adam, not {self.optimizer}")
        return self


def check_joint(
    joint: Joint | None, train: Train, types: Sequence[str], names: Iterable[str]
) -> None:
    """Refuse a second task of the towers that no event, or every event of these types, fulfils.

    Args:
        joint: the task, if there is one.
        train: of the same run.
        types: of `data.event_types`.
        names: of all features.
    """
    if joint is None:
        if train.monitor == "auc":
            raise ValueError("train.monitor=auc is that of a ranking head: add `model.joint`")
        return
    for name in sorted(_OF_JUDGED & set(names)):
        raise ValueError(f"features: {name!r} is what model.joint calls something else; rename it")
    strangers = sorted(set(joint.positive) - set(types))
    if strangers:
        raise ValueError(
            f"model.joint.positive: {strangers[0]!r} is none of data.event_types, which are "
            f"{list(types)}"
        )
    if set(joint.positive) == set(types):
        raise ValueError(
            "model.joint.positive names all of data.event_types: an event of another type is what "
            "it is told from, maybe one with `label: false`"
        )
    if not joint.retrieval_weight and train.monitor != "auc":
        raise ValueError(
            "model.joint.retrieval_weight=0 learns no retrieval: set train.monitor=auc"
        )
