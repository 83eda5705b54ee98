"""Benchmark records: JSON is the source, the Markdown beside it is made from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("clickstream-recommender", "tensorflow", "tensorflow-recommenders", "scann", "pyspark")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        # Not every benchmark needs all of them.
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class Record:
    """One measured figure beside its peer."""

    what: str
    data: str
    metric: str
    value: float
    command: str
    peer: str = ""
    peer_value: float | None = None
    target: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    versions: dict[str, str] = field(default_factory=_versions)

    @property
    def ratio(self) -> float | None:
        """How many times the peer's value."""
        return self.value / self.peer_value if self.peer_value else None


def write(name: str, records: Sequence[Record]) -> None:
    """Write `results/NAME.json`, and `results/NAME.md` from it."""
    rows = [asdict(record) | {"ratio": record.ratio} for record in records]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(_markdown(name, rows), encoding="utf-8")


def replace(
    name: str, records: Sequence[Record], stale: Callable[[dict[str, object]], bool]
) -> None:
    """Write records in place of the stale rows of `results/NAME.json`; data keep their order."""
    known = read(name) if (RESULTS / f"{name}.json").is_file() else []
    fields = [{k: v for k, v in row.items() if k != "ratio"} for row in known if not stale(row)]
    kept = [Record(**row) for row in fields]  # type: ignore[arg-type]
    order = list(dict.fromkeys([*(str(row["data"]) for row in known), *(r.data for r in records)]))
    write(name, sorted([*kept, *records], key=lambda record: order.index(record.data)))


def read(name: str) -> list[dict[str, object]]:
    """Rows of `results/NAME.json`."""
    rows: list[dict[str, object]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return rows


def _markdown(name: str, rows: Sequence[dict[str, object]]) -> str:
    columns = ["data", "what", "metric", "value", "peer", "peer_value", "ratio", "target"]
    commands = sorted({str(row["command"]) for row in rows})
    lines = [
        f"# {name}",
        "",
        f"Made from `{name}.json` on {rows[0]['date']}; versions stand there. Commands:",
        "",
        *(f"- `{command}`" for command in commands),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
