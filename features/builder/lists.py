"""List columns made of parts of a flat table; only the positions of each part's rows are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa


def list_columns(rows: pl.DataFrame, picked: np.ndarray, lengths: np.ndarray) -> dict[str, pa.ListArray]:
    """The columns of ``rows`` as list columns.

    Args:
        picked: the rows of all lists, one list after the other.
        lengths: of every list.
    """
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    chosen = rows[picked]
    return {name: pa.ListArray.from_arrays(ends, chosen[name].to_arrow()) for name in rows.columns}


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """start[0], …, stop[0] − 1, start[1], …, stop[1] − 1, and so on."""
    lengths = stop - start
    ends = np.cumsum(lengths)
    return np.repeat(start - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def parts_of(column: pl.Series, values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Where each of these values stands in an ordered column: (value, first row, row after the last)."""
    ends = (column.to_numpy().searchsorted(values, side) for side in ("left", "right"))
    yield from zip(values, *(end.tolist() for end in ends), strict=True)
