"""Python's own writers, and Arrow's for zstd, make the files; names and first bytes disagree on purpose."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pytest

from lumi.config import UserError
from lumi.corpus.compression import ERRORS, find_compression, open_file

TEXT = b'{"text": "Gr\xc3\xbc\xc3\x9fe"}\n' * 9000


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


WRITERS = {
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "zstd": (".zst", zstd),
}


def tar(name="a.txt"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


def read(path):
    with open_file(str(path)) as file:
        return file.readline(), file.read()


@pytest.mark.parametrize("how", WRITERS)
def test_a_file_is_unpacked_by_its_name_or_its_first_bytes(tmp_path, how):
    ending, compress = WRITERS[how]
    for name in (f"a{ending}", f"a{ending.upper()}", "plain.jsonl"):
        path = tmp_path / name
        path.write_bytes(compress(TEXT) + compress(TEXT))  # two in a row, as parallel programs write them
        assert find_compression(str(path)) == how
        line, rest = read(path)
        assert line + rest == 2 * TEXT


@pytest.mark.parametrize("how", WRITERS)
def test_a_file_that_is_cut_or_is_not_what_its_name_says_fails_while_it_is_read(tmp_path, how):
    ending, compress = WRITERS[how]
    path = tmp_path / f"a{ending}"
    for data in (compress(TEXT)[:-5], b"no such thing " * 9):
        path.write_bytes(data)
        with pytest.raises(ERRORS):
            read(path)


@pytest.mark.parametrize(
    ("name", "data", "got"),
    [
        ("a.zip", zipped(), "zip"),
        ("a.jsonl", zipped(), "zip"),
        ("a.jsonl.br", b"\x1b\x02", "brotli"),
        ("a.lz4", b"\x04\x22\x4d\x18", "lz4"),
        ("a", b"\x04\x22\x4d\x18", "lz4"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "7z"),
        ("a.tar", tar(), "tar"),
        ("a.jsonl", tar(), "tar"),
        ("a.tar.gz", gzip.compress(tar()), "tar"),
        ("a.tgz", gzip.compress(tar()), "tar"),
        ("a.gz", gzip.compress(tar()), "tar inside gzip"),
        ("a.zst", zstd(tar()), "tar inside zstd"),
        ("a.gz", gzip.compress(gzip.compress(TEXT)), "gzip inside gzip"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else value,  # compressed bytes hold the time
)
def test_other_archives_are_refused_by_name(tmp_path, name, data, got):
    path = tmp_path / name
    path.write_bytes(data)
    expected = rf"{name} must be plain, or one file in gzip, bzip2, xz, zstd, got {got}; unpack it first$"
    with pytest.raises(UserError, match=expected):
        open_file(str(path))


def test_plain_text_stays_plain(tmp_path):
    for data in (b"", b"BZh is not bzip2", b"PK and more", TEXT):
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        assert find_compression(str(path)) is None
        assert b"".join(read(path)) == data


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_refused_and_not_lost_line_by_line(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff{}".encode(encoding) if encoding == "utf-16-be" else "{}".encode(encoding))
    with pytest.raises(UserError, match=r"a.jsonl must be UTF-8, got UTF-16; convert it: iconv"):
        open_file(str(path))
