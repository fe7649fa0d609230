"""Folders and files on disks and in object stores, by path or URL: what a run has written there, and writing it whole."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

RECORD = "_run.json"  # readers of Parquet folders pass over names that begin so
UNFINISHED = ".unfinished"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"}  # where a file is there when it is whole, and not before
REPEATED = ["label", "labels.list.element"]  # columns to be kept as numbers of their few values; numbers of floats would only add to them
HELD = 2**26  # bytes of rows that wait to be written


class Unreachable(OSError):
    """A disk or an object store that does not answer as it should: another attempt may find it well."""


def connect(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it.

    Raises:
        ImportError: If its driver is not installed.
        ValueError: If there is no such protocol.
    """
    try:
        return url_to_fs(address)
    except ImportError as error:  # which says what to install
        raise ImportError(f"{address}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from error


@contextmanager
def reaching(name: str) -> Iterator[None]:
    """What drivers raise of a disk or store that does not answer, or refuses, becomes Unreachable, by a name; the rest is as it was."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, ImportError, ValueError):
        raise
    except Exception as error:  # each driver has errors of its own
        raise Unreachable(f"{name} cannot be reached: {error}") from error


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether files are on disks of the machine, or mounted like them."""
    return isinstance(fs, LocalFileSystem)


def full_name(fs: AbstractFileSystem, path: str) -> str:
    """What a file is called from anywhere: an absolute path, or a URL."""
    return path if is_local(fs) else fs.unstrip_protocol(path)


class Output:
    """The folder of a run: a file for each part, and a record of what the run is.

    Args:
        address: A path or a URL.

    Raises:
        ImportError, ValueError: As `connect`.
    """

    def __init__(self, address: str) -> None:
        self.fs, self.folder = connect(address)
        self.address = full_name(self.fs, self.folder)  # which holds in other folders and on other machines too
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.whole = bool(protocols & OBJECT_STORES)  # whether no file is ever seen half written

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write down what the run is, or see that it is the one that the folder holds.

        Raises:
            FileExistsError: If the folder holds something else.
            PermissionError: If it cannot be written.
            Unreachable: If it cannot be reached.
            ValueError: If the run that it holds is another one.
        """
        file = f"{self.folder}/{RECORD}"
        with reaching(f"--output {self.address}"):
            held = self.fs.cat_file(file) if self.fs.exists(file) else None
            there = self.fs.ls(self.folder, detail=False) if held is None and self.fs.exists(self.folder) else []
            other = [name for name in there if not name.endswith(UNFINISHED)]
        if held is not None:
            before = json.loads(held)
            others = [f"{name} was {before.get(name)} and is {value}" for name, value in record.items() if before.get(name) != value]
            if others:
                told = f"--output {self.address} holds a run with other settings: {', '.join(others)}"
                raise ValueError(f"{told}. Go on with what it was, or name another folder")
            return
        if other:
            raise FileExistsError(f"--output {self.address} holds something else, it has no {RECORD}: name another folder")
        try:
            self.fs.makedirs(self.folder, exist_ok=True)
            beside = file if self.whole else file + UNFINISHED
            self.fs.pipe_file(beside, json.dumps(record, indent=2).encode())
            if beside != file:
                self.fs.mv(beside, file)
        except Exception as error:  # each driver has errors of its own
            raise PermissionError(f"--output {self.address} cannot be written ({error}): name another folder") from error

    def finished(self) -> set[int]:
        """Numbers of the parts whose files are there; raises Unreachable if that cannot be told."""
        with reaching(self.address):
            self.fs.invalidate_cache()
            names = {entry["name"].rpartition("/")[2]: entry["size"] for entry in self.fs.ls(self.folder, detail=True)}
        found = {re.fullmatch(r"part-(\d{8})\.parquet", name): size for name, size in names.items()}
        return {int(match[1]) for match, size in found.items() if match and size}

    def clear(self) -> None:
        """Remove what workers that were killed have left unfinished."""
        for entry in self.fs.ls(self.folder, detail=False):
            if entry.endswith(UNFINISHED):
                self.fs.rm_file(entry)

    def put(self, file: Path, number: int) -> None:
        """Bring a finished file to its place, where it is whole or not there at all, whatever happens.

        Raises:
            Unreachable: If that fails.
        """
        place = f"{self.folder}/part-{number:08}.parquet"
        try:
            if is_local(self.fs):
                file.replace(place)
            elif self.whole:
                self.fs.put_file(str(file), place)
            else:
                self.fs.invalidate_cache()
                if self.fs.exists(place):  # by a worker that died before it could tell; renaming may not replace it
                    return
                beside = f"{self.folder}/{file.name}"
                self.fs.put_file(str(file), beside)
                self.fs.mv(beside, place)
        except Exception as error:  # each driver has errors of its own
            raise Unreachable(f"{place} cannot be written: {error}") from error


class PartFile:
    """Rows of a part, written to a file that goes to its place at the end; used in a `with`, after whose failure nothing is left.

    Args:
        output: Where it is to be.
        number: Of the part.
        schema: Of the rows.
    """

    def __init__(self, output: Output, number: int, schema: pa.Schema) -> None:
        self.output, self.number, self.schema = output, number, schema
        self.held: list[pa.Table] = []

    def __enter__(self) -> "PartFile":
        folder = self.output.folder if is_local(self.output.fs) else tempfile.gettempdir()
        self.path = Path(folder, f"_part-{self.number:08}-{uuid4().hex}{UNFINISHED}")
        self.file = self.path.open("xb")
        self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd", use_dictionary=REPEATED)
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; columns that they lack are null."""
        self.held.append(pa.Table.from_pylist(rows, schema=self.schema))
        if sum(table.nbytes for table in self.held) > HELD:
            self._flush()

    def _flush(self) -> None:
        if self.held:
            self.writer.write_table(pa.concat_tables(self.held).combine_chunks())
        self.held = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self.file:
                if kind is None:
                    self._flush()
                self.writer.close()
                self.file.flush()
                os.fsync(self.file.fileno())
            if kind is None:
                self.output.put(self.path, self.number)
        finally:
            self.path.unlink(missing_ok=True)
