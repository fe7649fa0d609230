"""The images of a part: read one after the other from files, tar shards and Parquet, decoded a few ahead of their use."""

import errno
import io
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image

from ..data.images import FORMATS, UnreadableImage, decode_image, is_image
from .sources import Part, is_damaged
from .storage import Unreachable, connect, is_local

ROWS = 64  # of a Parquet file that are held at a time, beside what its row group takes
BLOCK = 2**20  # bytes of a shard that are asked for at a time
OWN = {errno.EACCES, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM}  # of a file, not of its disk

Given = TypeVar("Given")
Made = TypeVar("Made")


class Item(NamedTuple):
    """An image of a part: its name, and its bytes, unless they are still to be fetched, or why there are none."""

    name: str
    content: bytes | None = None
    error: str | None = None


def read(part: Part, column: str) -> Iterator[Item]:
    """The images of a part, in order; of what is torn, an item with the error, behind the images before the tear.

    Args:
        part: A part.
        column: Of Parquet files that holds the images.

    Raises:
        Unreachable: If the disk or the store does not answer.
    """
    if part.kind == "images":
        yield from map(Item, part.files)
        return
    (name,) = part.files
    try:
        yield from read_shard(name) if part.kind == "tar" else read_rows(part, column)
    except FileNotFoundError:
        yield Item(name, error="no such file")
    except Exception as error:  # each driver has errors of its own
        raise Unreachable(f"{name} cannot be read: {error}") from error


class Header(tarfile.TarInfo):
    """A header that is whole: tarfile itself takes a damaged one, or none, for the end of the archive, and says nothing."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "Header":
        """The next header; raises ReadError where there is none and the archive's end is not marked."""
        try:
            return super().fromtarfile(archive)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def read_shard(name: str) -> Iterator[Item]:
    """The images of a tar shard, by their names in it."""
    fs, path = connect(name)
    try:
        with fs.open(path) as file, tarfile.open(fileobj=file, mode="r|*", bufsize=BLOCK, tarinfo=Header) as shard:
            for member in shard:
                shard.members.clear()  # type: ignore[attr-defined]  # they would grow with the shard
                if member.isfile() and is_image(member.name):
                    content = shard.extractfile(member)
                    assert content is not None
                    yield Item(f"{name}#{member.name}", content.read())
    except (tarfile.ReadError, EOFError, zlib.error) as error:
        yield Item(name, error=f"the shard is torn, or no tar, and what follows is not read: {error}")


def read_rows(part: Part, column: str) -> Iterator[Item]:
    """The images of a part of a Parquet file, by their row in it, from 0."""
    (name,) = part.files
    fs, path = connect(name)
    row = part.first
    try:
        with fs.open(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(ROWS, part.groups, [column]):
                for value in batch.column(0).to_pylist():
                    content = value["bytes"] if isinstance(value, dict) else value
                    yield Item(f"{name}#{row}", content, None if content is not None else "the row holds no bytes")
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        if not is_damaged(error):
            raise
        for rest in range(row, part.first + part.images):
            yield Item(f"{name}#{rest}", error=f"the row group is damaged: {error}")


def load(item: Item) -> Image:
    """The image of an item, fetched if need be.

    Raises:
        UnreadableImage: If there is none, or it is not whole.
        Unreachable: If the disk or the store does not answer.
    """
    if item.error is not None:
        raise UnreadableImage(item.error)
    content = fetch(item.name) if item.content is None else item.content
    return decode_image(io.BytesIO(content), item.name, FORMATS)


def fetch(name: str) -> bytes:
    """The bytes of a file; raises what `load` raises."""
    fs, path = connect(name)
    try:
        return fs.cat_file(path)
    except FileNotFoundError as error:
        raise UnreadableImage(f"{name}: no such file") from error
    except Exception as error:  # each driver has errors of its own
        if is_local(fs) and getattr(error, "errno", None) in OWN:
            raise UnreadableImage(f"{name}: {error}") from error
        raise Unreachable(f"{name} cannot be read: {error}") from error


def ahead(pool: Executor, function: Callable[[Given], Made], given: Iterable[Given], most: int) -> Iterator[Made]:
    """What a function makes of each, in order, with at most so many begun that are not yet asked for."""
    begun: deque[Future[Made]] = deque()
    for one in given:
        begun.append(pool.submit(function, one))
        if len(begun) > most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
