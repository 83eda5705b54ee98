"""Raw columns of any type to the types of a feature: string, double, microseconds, vector."""

from __future__ import annotations

from datetime import UTC, datetime

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from recsys.config import ConfigError
from recsys.schema import Feature

#: Java regular expression of what would break a line of a vocabulary file in some reader.
LINE_BREAK = r"[\n\r\x0B\x0C\x1C-\x1E\x{85}\x{2028}\x{2029}]"

_SPARK_TYPES = {"string": "string", "float": "float", "int64": "bigint"}

# Years 1 to 9999: what Python's datetime can hold.
_FIRST, _LAST = -62_135_596_800_000_000, 253_402_300_799_999_999


def spark_type(feature: Feature) -> str:
    """Return Spark's type of a feature's value; a history is a list of it."""
    return "array<float>" if feature.vector_dim else _SPARK_TYPES[feature.dtype]


def column(name: str) -> Column:
    """Return the column of exactly this name, whatever characters it holds."""
    return F.col("`" + name.replace("`", "``") + "`")


def identifier(frame: DataFrame, name: str, key: str) -> Column:
    """Return ids or categories as strings, integers as plain decimals, nothing as null.

    Raises:
        ConfigError: the column is a list, map or struct.
    """
    dtype, raw = _type_of(frame, name), column(name)
    if isinstance(dtype, T.ArrayType | T.MapType | T.StructType):
        raise ConfigError(
            f"{key}: expected strings or integers in column {name!r}, found {dtype.simpleString()}"
        )
    if isinstance(dtype, T.FloatType | T.DoubleType):
        whole = (F.floor(raw) == raw) & (F.abs(raw) < 2**53)
        text = F.when(whole, raw.try_cast("bigint").cast("string"))
        text = F.when(~F.isnan(raw), F.coalesce(text, raw.cast("string")))
    elif isinstance(dtype, T.DecimalType):
        whole = raw.try_cast(f"decimal({dtype.precision},0)")
        text = F.when(whole == raw, whole.cast("string")).otherwise(raw.cast("string"))
    else:
        text = raw.cast("string")
    return F.when(F.trim(text) != "", text)


def number(name: str) -> Column:
    """Return a double; null where the value is missing, NaN, infinite or no number."""
    value = column(name).try_cast("double")
    return F.when(~F.isnan(value) & (F.abs(value) != float("inf")), value)


def not_a_number(name: str) -> Column:
    """Return the text of a value that should be a number and is none, else null."""
    raw = column(name).cast("string")
    missing = (F.trim(raw) == "") | (F.lower(F.trim(raw)) == "nan")
    return F.when(number(name).isNull() & ~missing, raw)


def vector(frame: DataFrame, name: str, key: str) -> Column:
    """Return an array of floats, nothing as null; `wrong_value` tells what is wrong with one.

    Raises:
        ConfigError: the column holds something else than arrays of numbers.
    """
    dtype = _type_of(frame, name)
    if not (isinstance(dtype, T.ArrayType) and isinstance(dtype.elementType, T.NumericType)):
        raise ConfigError(
            f"{key}: expected arrays of numbers in column {name!r}, found {dtype.simpleString()}; "
            f"a text such as [0.1, 0.2] becomes one by derive: from_json({name}, 'array<float>')"
        )
    return column(name).cast("array<float>")


def wrong_value(feature: Feature, owner: Column) -> Column | None:
    """Return the text of a value that a number or vector feature cannot have, else null.

    Args:
        feature: None is returned for a kind that takes any value.
        owner: who has the value, for the text.
    """
    if feature.vector_dim:
        return _not_a_vector(feature, owner)
    return not_a_number(feature.source_column) if feature.kind == "number" else None


def _not_a_vector(feature: Feature, owner: Column) -> Column:
    values = column(feature.source_column).cast("array<float>")
    size = F.size(values)
    broken = F.exists(values, lambda v: v.isNull() | F.isnan(v) | (F.abs(v) == float("inf")))
    found = F.when(size != feature.vector_dim, F.concat(size.cast("string"), F.lit(" numbers")))
    found = found.when(broken, F.lit("null, NaN or infinity among them"))
    return F.concat(owner, F.lit(": "), found)


def microseconds(frame: DataFrame, name: str, time_format: str) -> Column:
    """Return microseconds since 1970 UTC (bigint); null where the value is no such time.

    Args:
        frame: table.
        name: its column; dates and timestamps are taken as they are.
        time_format: of other types: iso, epoch_seconds, epoch_milliseconds or a Spark pattern.
    """
    dtype, raw = _type_of(frame, name), column(name)
    if isinstance(dtype, T.TimestampType | T.TimestampNTZType | T.DateType):
        micros = F.unix_micros(raw.cast("timestamp"))
    elif time_format in ("epoch_seconds", "epoch_milliseconds"):
        unit = 1_000_000 if time_format == "epoch_seconds" else 1_000
        # Decimals: a double has no room for microseconds of this century.
        micros = (raw.try_cast("decimal(24,6)") * F.lit(unit)).try_cast("bigint")
    else:
        pattern = () if time_format == "iso" else (F.lit(time_format),)
        micros = F.unix_micros(F.try_to_timestamp(raw.cast("string"), *pattern))
    return F.when(micros.between(_FIRST, _LAST), micros)


def feature_value(frame: DataFrame, feature: Feature, key: str, time_format: str) -> Column:
    """Return the value of a feature in Spark's type for its dtype."""
    name = feature.source_column
    if feature.vector_dim:
        return vector(frame, name, key)
    if feature.dtype == "float":
        return number(name)
    if feature.dtype == "int64":
        return microseconds(frame, name, time_format)
    return identifier(frame, name, key)


def to_microseconds(moment: datetime) -> int:
    """Return microseconds since 1970; a time without zone is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def to_datetime(micros: int) -> datetime:
    """Return the UTC time of microseconds since 1970."""
    seconds, rest = divmod(micros, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def _type_of(frame: DataFrame, name: str) -> T.DataType:
    return frame.select(column(name)).schema[0].dataType
