"""The config of the second stage: which candidates it ranks, by which model, how it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recsys.section import Section


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
    cross_layers: int = Field(2, ge=0, description="of DCN-v2")
    cross_rank: int | None = Field(None, ge=1, description="of their matrices; full if empty")
    hidden: tuple[int, ...] = Field((64, 32), description="layers after the cross layers")
    dropout: float = Field(0.1, ge=0, lt=1)
    loss: Literal["pointwise", "listwise"] = Field(
        "pointwise", description="log loss of each candidate, or softmax over those of a request"
    )
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(64, ge=1, description="requests per step")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0, description="decoupled, as in AdamW")
    patience: int = Field(2, ge=1, description="epochs without a better loss on what is held out")
