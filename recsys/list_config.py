"""The config of the end of the list: how what was ranked becomes what is shown."""

from __future__ import annotations

from pydantic import Field

from recsys.section import Section


class Diversity(Section):
    """Maximal marginal relevance: an item gives way to one less like those above it."""

    relevance: float = Field(
        0.7, ge=0, le=1, description="lambda of MMR; the rest of 1 weighs likeness to items above"
    )
    pool: int = Field(100, ge=2, description="best candidates that are ordered so")
