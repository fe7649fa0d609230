"""Where images come from, and the parts that they are predicted in: the same parts in every run over the same source."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ..data.images import is_image, looked_for
from ..nearest import did_you_mean
from .storage import connect, full_name, is_local, reaching

SUFFIXES = {"parquet": (".parquet",), "tar": (".tar", ".tar.gz", ".tgz")}
TITLES = {"images": "images", "parquet": "Parquet files", "tar": "tar shards"}
FOOTERS = 32  # of Parquet files that are read at a time


class Part(NamedTuple):
    """What a worker predicts at a time and writes to one file."""

    number: int
    kind: str  # images, tar or parquet
    files: list[str]  # images; or the shard or Parquet file, alone
    groups: list[int]  # row groups of a Parquet file
    first: int  # row of the first of them
    images: int  # 0 where that is not known before it is read, as of a shard


def find_parts(sources: Sequence[str], size: int, column: str) -> list[Part]:
    """The parts of all sources: so many files each, or one tar shard, or so many rows of a Parquet file and what its row group has beyond.

    Args:
        sources: Files, folders and patterns such as `photos/*.jpg`, as paths or URLs. Folders are searched, and hold images, tar shards or
            Parquet files.
        size: Images of a part.
        column: Of Parquet files that holds the images: bytes, or a struct with `bytes`.

    Raises:
        FileNotFoundError: If there is nothing.
        ImportError: If the driver of a URL is not installed.
        Unreachable: If a disk or a store does not answer, or refuses.
        ValueError: If a folder holds images of several kinds, or a Parquet file cannot be read or has no such column.
    """
    parts: list[Part] = []
    seen: set[str] = set()
    for source in sources:
        with reaching(source):
            fs, files = find_files(source)
            files = [file for file in files if full_name(fs, file) not in seen]
            seen.update(full_name(fs, file) for file in files)
            for kind, some in by_kind(files).items():
                parts += [Part(len(parts) + index, kind, *rest) for index, rest in enumerate(cut(fs, kind, some, size, column))]
    return parts


def cut(fs: AbstractFileSystem, kind: str, files: list[str], size: int, column: str) -> list[tuple[list[str], list[int], int, int]]:
    """Files of a kind in parts, each as the last fields of `Part`; raises what `find_parts` raises of them."""
    names = [full_name(fs, file) for file in files]
    if kind == "images":
        return [(some, [], 0, len(some)) for some in (names[begin : begin + size] for begin in range(0, len(names), size))]
    if kind == "tar":
        return [([name], [], 0, 0) for name in names]
    with ThreadPoolExecutor(FOOTERS) as pool:
        layouts = list(pool.map(partial(row_groups, fs, column), files))
    return [([name], *rows) for name, layout in zip(names, layouts, strict=True) for rows in runs_of(layout, size)]


def find_files(source: str) -> tuple[AbstractFileSystem, list[str]]:
    """The files that a source stands for, in order; raises what `find_parts` raises of it."""
    fs, path = connect(source)
    if fs.isdir(path):
        walk = (os.path.join(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        kinds = by_kind(sorted(file for file in (walk if is_local(fs) else fs.find(path)) if holds_images(file)))
        if len(kinds) > 1:
            held = " and ".join(f"{len(files)} {TITLES[kind]}" for kind, files in kinds.items())
            raise ValueError(f"{source} holds {held}: say which, with a pattern such as {source.rstrip('/')}/**/*.jpg")
        found = next(iter(kinds.values()), [])
        if not found:
            endings = " ".join(f"*{suffix}" for suffixes in SUFFIXES.values() for suffix in suffixes)
            raise FileNotFoundError(f"no images in {source}: looked for files named {looked_for()} {endings}")
        return fs, found
    if fs.exists(path):  # before its brackets are taken for a pattern's
        return fs, [path]
    found = sorted(file for file, entry in fs.glob(path, detail=True).items() if entry["type"] != "directory")
    if not found:
        raise FileNotFoundError(f"no such file or folder, and nothing of that pattern: {source}")
    return fs, found


def kind_of(file: str) -> str:
    """By name; what is neither a shard nor Parquet is taken for an image."""
    return next((kind for kind, suffixes in SUFFIXES.items() if file.lower().endswith(suffixes)), "images")


def holds_images(file: str) -> bool:
    """Whether a file of a folder is looked at: images, shards and Parquet files that are not hidden."""
    name = file.rpartition("/")[2]
    return is_image(file) or (kind_of(file) != "images" and not name.startswith((".", "_")))


def by_kind(files: Sequence[str]) -> dict[str, list[str]]:
    """Files apart by what they are."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        kinds.setdefault(kind_of(file), []).append(file)
    return kinds


def row_groups(fs: AbstractFileSystem, column: str, file: str) -> list[int]:
    """Rows of each row group of a Parquet file; raises a ValueError if it cannot be read or has no images in the column."""
    name = full_name(fs, file)
    try:
        with fs.open(file) as opened:
            footer = pq.ParquetFile(opened)
            schema, rows = footer.schema_arrow, [footer.metadata.row_group(index).num_rows for index in range(footer.num_row_groups)]
    except (pa.ArrowInvalid, OSError) as error:
        if not is_damaged(error):
            raise
        raise ValueError(f"{name} is no Parquet file, or cut short: {error}") from error
    if column not in schema.names:
        raise ValueError(f"{name} has no column {column!r}: {did_you_mean(column, schema.names)}; --column names the one with the images")
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(f"{name}: the column {column!r} holds {kind}, not the bytes of images; --column names the one that does")
    return rows


def is_damaged(error: Exception) -> bool:
    """Whether an error is Arrow's word on a Parquet file; those of disks and stores have numbers, or types of their own."""
    return isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None)


def runs_of(rows: Sequence[int], size: int) -> Iterator[tuple[list[int], int, int]]:
    """Row groups in runs that have at least `size` rows, but for the last: their indices, the first row of them, and how many they have."""
    groups: list[int] = []
    first = count = 0
    for index, number in enumerate(rows):
        groups.append(index)
        count += number
        if count >= size or index == len(rows) - 1:
            yield groups, first, count
            groups, first, count = [], first + count, 0
