"""A DataFrame as JSON and back: dtypes kept, NaN as null, infinities as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def plain_frame(points: pd.DataFrame) -> dict[str, Any]:
    """A DataFrame as JSON-ready data: per column its dtype and values; NaN as null, infinities as text."""
    columns = []
    for name in points.columns:
        series = points[name]
        kind = "float" if series.dtype.kind == "f" else series.dtype.kind
        values = [_plain(value) for value in series.tolist()]
        columns.append({"name": str(name), "kind": kind, "values": values})
    return {"columns": columns, "index": [_plain(value) for value in points.index.tolist()]}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else (None if np.isnan(value) else str(value))
    return None if value != value else str(value)


def frame(plain: dict[str, Any]) -> pd.DataFrame:
    """The DataFrame of `plain_frame`."""
    import pandas as pd

    series = {}
    for column in plain["columns"]:
        values = column["values"]
        if column["kind"] == "float":
            values = [np.nan if v is None else float(v) for v in values]
        series[column["name"]] = pd.Series(
            values, index=plain["index"], dtype="float64" if column["kind"] == "float" else None
        )
    return pd.DataFrame(series, index=plain["index"])
