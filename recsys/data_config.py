"""The config of the data: tables, columns, cleaning, split."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from recsys.section import Section
from recsys.split_config import Split


class Source(Section):
    """A table: files at `path`, a catalogue `table`, or a Spark SQL `query`."""

    path: str | None = Field(None, description="file, folder or glob; relative to the YAML file")
    table: str | None = Field(None, description="table of the Spark catalogue")
    query: str | None = Field(None, description="Spark SQL; {path} stands for `path`")
    format: Literal["csv", "json", "parquet", "delta", "text"] = "parquet"
    options: dict[str, str] = Field({}, description="options of Spark's reader")
    derive: dict[str, str] = Field({}, description="new column: Spark SQL expression")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if self.query is None and (self.path is None) == (self.table is None):
            raise ValueError("give exactly one of `path`, `table` or `query`")
        return self


class EventColumns(Section):
    """Which column of the click table plays which role."""

    user: str
    item: str
    time: str | None = None
    order: tuple[str, ...] = Field((), description="columns that order events of equal time")
    event: str | None = Field(None, description="event type; keys of `event_types`")
    session: str | None = Field(None, description="session id; else made by `session_gap_minutes`")


class Events(Source):
    """The click table."""

    columns: EventColumns
    time_format: str = Field(
        "iso", description="iso, epoch_seconds, epoch_milliseconds, or a Spark datetime pattern"
    )


class Items(Source):
    """The item table: features of candidates, and their readable names."""

    key: str


class Users(Source):
    """The user table: static query features."""

    key: str


class HeldOutColumns(Section):
    """Who took what; when is optional: then it is proved that it comes after the events."""

    user: str
    item: str
    time: str | None = None


class HeldOut(Source):
    """What is held back of the events: all items of a user are the labels of one test query."""

    columns: HeldOutColumns
    time_format: str = Field("iso", description="as in `events`")


class ImpressionColumns(Section):
    """Which column of the table of shown items plays which role."""

    request: str = Field(description="rows that agree in user and request are one shown list")
    user: str
    item: str
    time: str = Field(description="of showing; a list is asked for at its earliest")
    clicked: str = Field(description="1 or true where the item was taken, 0 or false where not")
    position: str | None = Field(None, description="in the list, whole numbers from 1")
    values: dict[str, str] = Field(
        {}, description="candidate feature of kind number: column of what it was when shown"
    )


class Impressions(Source):
    """What was shown, a row an item: the lists that the second stage learns from."""

    columns: ImpressionColumns
    time_format: str = Field("iso", description="as in `events`")


class EventType(Section):
    """What an event of this type counts, and whether it is something to predict."""

    weight: float = Field(1.0, gt=0)
    label: bool = True


class Cleaning(Section):
    """Which events are no clicks of a person."""

    drop: dict[str, str] = Field({}, description="reason: Spark SQL predicate of rows to drop")
    deduplicate: bool = True
    not_before: datetime | None = None
    not_after: datetime | None = None
    max_events_per_day: int | None = Field(
        None, ge=1, description="users above it on any day count as bots and are dropped"
    )
    min_user_events: int = Field(1, ge=1, description="training events a training user needs")
    min_item_events: int = Field(1, ge=1, description="training events a warm item needs")


class Data(Section):
    """From the click table to examples."""

    events: Events
    items: Items | None = None
    users: Users | None = None
    held_out: HeldOut | None = Field(None, description="with split.kind=held_out: what tests")
    impressions: Impressions | None = Field(
        None, description="what was shown; a ranker learns from it instead of retrieval's lists"
    )
    item_name: str | None = Field(None, description="column with the item's readable name")
    event_types: dict[str, EventType] = Field({}, description="empty: every event is a label")
    cleaning: Cleaning = Cleaning()
    session_gap_minutes: float = Field(30, gt=0)
    split: Split
    history_scope: Literal["user", "session"] = "user"
    min_history: int = Field(0, ge=0, description="earlier events that a label must have")
    exclude_seen: bool = Field(
        False, description="never recommend what the user has seen; evaluated and served alike"
    )
    shards: int = Field(4, ge=1, description="TFRecord files per split")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.event_types and self.events.columns.event is None:
            raise ValueError("`event_types` needs `events.columns.event`")
        if self.event_types and not any(kind.label for kind in self.event_types.values()):
            raise ValueError("at least one of `event_types` must be a label")
        if self.split.by_time and self.events.columns.time is None:
            raise ValueError("a time split needs `events.columns.time`")
        if (self.split.kind == "held_out") != (self.held_out is not None):
            raise ValueError("`held_out`, the table that tests, goes with `split.kind=held_out`")
        if self.held_out is not None and self.history_scope != "user":
            raise ValueError("`held_out` needs `history_scope=user`: its queries are the users'")
        if self.held_out and self.held_out.columns.time and self.events.columns.time is None:
            raise ValueError("`held_out.columns.time` needs `events.columns.time` to come after")
        if self.events.columns.time is None and not self.events.columns.order:
            raise ValueError("`events.columns` needs `time` or `order`: events must have an order")
        return self

    @model_validator(mode="after")
    def _check_impressions(self) -> Data:
        if self.impressions is not None and self.split.kind != "time":
            raise ValueError("`impressions` need `split.kind=time`, which says what is known when")
        if self.impressions is not None and self.history_scope != "user":
            raise ValueError("`impressions` need `history_scope=user`: requests name no session")
        return self
