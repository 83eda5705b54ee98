"""The base of every part of the config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config: immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
