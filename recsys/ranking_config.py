"""The config of the second stage: which candidates it ranks, by which model, how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recsys.section import Section


class Multitask(Section):
    """How the tasks of the second stage share what they learn."""

    kind: Literal["shared_bottom", "mmoe", "ple"] = Field(
        "mmoe", description="of what lies between the cross layers and the tasks' towers"
    )
    experts: int = Field(4, ge=1, description="of mmoe; of ple those that all tasks share")
    task_experts: int = Field(1, ge=1, description="of ple: those that each task has of its own")
    tower: tuple[int, ...] = Field((16,), description="layers of each task's tower")
    weights: Literal["fixed", "learned"] = Field(
        "fixed", description="learned: by uncertainty, on top of those in `tasks`"
    )


class Ranking(Section):
    """A model that orders the best candidates of retrieval anew."""

    candidates: int = Field(
        100, ge=2, description="best of retrieval that are ranked; no answer is longer"
    )
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of the validation queries, the latest, that calibrate"
    )
    embedding_dim: int = Field(8, ge=1, description="of features that are no ids")
    attention_dim: int = Field(32, ge=1, description="of items where history meets candidate")
    interaction: Literal["cross", "dot"] = Field(
        "cross", description="of features: cross layers as in DCN-v2, dot products as in DLRM"
    )
    cross_layers: int = Field(2, ge=0, description="of DCN-v2")
    cross_rank: int | None = Field(None, ge=1, description="of their matrices; full if empty")
    bottom: tuple[int, ...] = Field(
        (64, 32),
        min_length=1,
        description="of DLRM, layers over numbers; the last sizes all vectors",
    )
    hidden: tuple[int, ...] = Field((64, 32), description="layers after the interaction")
    dropout: float = Field(0.1, ge=0, lt=1)
    loss: Literal["pointwise", "pairwise", "listwise"] = Field(
        "pointwise",
        description="log loss of each candidate, of each pair of a request, or softmax over all",
    )
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(64, ge=1, description="requests per step")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0, description="decoupled, as in AdamW")
    patience: int = Field(2, ge=1, description="epochs without a better loss on what is held out")
    tasks: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="event type: weight of its loss, 0 of what is only measured; empty: the label, "
        "whatever its type",
    )
    multitask: Multitask = Multitask()
    order: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="event type: weight of its probability in the score; the first task if empty",
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> Ranking:
        learned = [task for task, weight in self.tasks.items() if weight]
        if self.tasks and not learned:
            raise ValueError("tasks: at least one needs a weight above 0")
        strangers = sorted(set(self.order) - set(learned))
        if strangers:
            raise ValueError(
                f"order: {strangers[0]!r} is none of the learned tasks, which are {learned}"
            )
        mixed = self.multitask.kind in ("mmoe", "ple")
        if self.tasks and mixed and not self.hidden:
            raise ValueError(
                f"multitask.kind={self.multitask.kind} needs layers in `hidden`: they are those of "
                "the experts"
            )
        return self

    @property
    def task_order(self) -> tuple[float, ...]:
        """Weight of the probability of each task in the score."""
        learned = [task for task, weight in self.tasks.items() if weight]
        order = self.order or dict.fromkeys(learned[:1], 1.0)
        return tuple(order.get(task, 0.0) for task in self.tasks)
