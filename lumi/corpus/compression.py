"""Files that may be compressed: which way, by name and by first bytes, and their content."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import pyarrow as pa

from lumi.config import UserError


def _open_zstd(path: str) -> io.BufferedReader:
    # pyarrow notices that the end of a file is missing; the package zstandard does not.
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path, "rb"), "zstd"))


READERS: dict[str, Callable[[str], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstd": _open_zstd,
}
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # of a file that is damaged
NAMES = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".zip": "zip",
    ".7z": "7z",
    ".br": "brotli",
    ".lz4": "lz4",
    ".rar": "rar",
    ".sz": "snappy",
    ".snappy": "snappy",
    ".z": "compress",
    ".tar": "tar",
    ".tgz": "tar",
    ".tbz2": "tar",
    ".txz": "tar",
}
MAGIC = (
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (4, b"1AY&SY", "bzip2"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"Rar!\x1a\x07", "rar"),
    (0, b"\xff\x06\x00\x00sNaPpY", "snappy"),
    (0, b"\x1f\x9d", "compress"),
    (257, b"ustar\x00", "tar"),
    (257, b"ustar  \x00", "tar"),
)
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # no UTF-8 begins so; all of such a file would be lost
MAGIC_BYTES = 265  # the end of the last one


def open_file(path: str) -> BinaryIO:
    """A file for reading, decompressed. One of ERRORS tells, here or while it is read, that it is damaged.

    Raises:
        UserError: it is compressed in another way than those of READERS, or an archive.
    """
    how = find_compression(path)
    if how is None:
        return open(path, "rb")
    file = READERS[how](path)
    if (inner := _recognize(file.peek(MAGIC_BYTES))) is not None:
        file.close()
        raise _refusal(path, f"{inner} inside {how}")
    return cast(BinaryIO, file)


def find_compression(path: str) -> str | None:
    """The key of READERS for a file, or None.

    Raises:
        UserError: it is compressed in another way, an archive, or not UTF-8 by its first bytes.
    """
    with open(path, "rb") as file:
        start = file.read(MAGIC_BYTES)
    if start.startswith(UTF_16):
        raise UserError(path, "must be UTF-8", got="UTF-16", remedy="convert it: iconv -f UTF-16 -t UTF-8")
    how = _recognize(start)
    stem, ending = os.path.splitext(path.lower())
    named = "tar" if stem.endswith(".tar") else NAMES.get(ending)
    for name in (how, named):
        if name not in (None, *READERS):
            raise _refusal(path, name)
    return how or named


def _recognize(start: bytes) -> str | None:
    return next((name for offset, mark, name in MAGIC if start.startswith(mark, offset)), None)


def _refusal(path: str, got: str | None) -> UserError:
    known = ", ".join(READERS)
    return UserError(path, f"must be plain, or one file in {known}", got=got, remedy="unpack it first")
