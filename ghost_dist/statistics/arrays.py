"""Arrays on disk: Zarr, and a hash of each that its reader compares.

Zarr alone would not do, see docs/design.md. So empty chunks are written, floats are filled with
NaN, and who writes keeps the entry that :func:`describe` gives and hands it to who reads.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ghost_dist.errors import CorruptStoreError

CHUNK_BYTES = 64 << 20

Array = np.ndarray[Any, np.dtype[Any]]


def write_array(path: Path, values: Array) -> dict[str, Any]:
    """Write one array in chunks of whole rows, contiguous in memory; returns its entry."""
    import zarr

    chunks = list(values.shape)
    row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
    chunks[0] = max(1, min(values.shape[0], CHUNK_BYTES // max(1, row_bytes)))
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=tuple(chunks),
        dtype=values.dtype,
        compressors=None,
        fill_value=float("nan") if values.dtype.kind == "f" else -1,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return describe(values)


def read_array(path: Path, expected: Mapping[str, Any]) -> Array:
    """Read one array and compare it with the entry that writing it gave; errors name no path."""
    import zarr

    try:
        values = np.asarray(zarr.open_array(path, mode="r")[...])
    except Exception as error:  # zarr raises many kinds; each means that it cannot be read
        raise CorruptStoreError(f"cannot be read ({type(error).__name__}: {error})") from error
    found = describe(values)
    for key, value in expected.items():
        if found.get(key) != value:
            raise CorruptStoreError(f"has {key} {found.get(key)}, but {value} was committed")
    return values


def describe(values: Array) -> dict[str, Any]:
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "xxh3": xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data),
    }
