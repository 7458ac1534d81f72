"""Reading files that may be compressed: the buffers ``<checksum>.zst`` and ``<checksum>.gz``, and the user's files.

gzip is in the standard library, zstd takes the program ``zstd``.  We never compress by ourselves.
"""
import hashlib
import os
import typing as _t

from .checksum import CHUNK, Checksum
from .errors import CacheMissError, CorruptBufferError, SeamlessError

#: suffix of the stored form -> its name in HTTP (Content-Encoding)
ENCODINGS = {".zst": "zstd", ".gz": "gzip"}


def pieces(path: str, suffix: str = "") -> _t.Iterator[bytes]:
    """The content of ``path``, piece by piece; decompressed if ``suffix`` is ".zst" or ".gz".

    Raises ``CorruptBufferError`` if it is not (whole) compressed data, ``CacheMissError`` if nothing on
    this machine can read zstd, and ``OSError`` if the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        if suffix == ".zst":
            yield from _run_zstd(file, path)
        elif suffix == ".gz":
            import gzip         # few stores hold compressed buffers
            import zlib
            reader = gzip.GzipFile(fileobj=file)
            try:
                yield from iter(lambda: reader.read(CHUNK), b"")
            except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
                raise CorruptBufferError("%s is not whole gzip data (%s)" % (path, exc)) from exc
        else:
            yield from iter(lambda: file.read(CHUNK), b"")


def _run_zstd(file, path):
    import subprocess       # few stores hold compressed buffers
    try:
        process = subprocess.Popen(["zstd", "-dcq"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise CacheMissError("%s is compressed with zstd, which nothing here can read: install the program zstd"
                             % path) from None
    with process:
        try:
            yield from iter(lambda: process.stdout.read(CHUNK), b"")
        finally:
            process.stdout.close()      # a reader that stops early: zstd gets a broken pipe and ends
    if process.returncode != 0:
        raise CorruptBufferError("%s is not whole zstd data" % path)


def identify(path, wanted=None) -> _t.Tuple[Checksum, str]:
    """(checksum of the content of ``path``, "" or the suffix if that is the decompressed content).

    Raises ``CorruptBufferError`` if ``wanted`` is a checksum and the content has another one.
    """
    found = hash_pieces(read_source(path))
    if wanted is None or found == Checksum(wanted):
        return found, ""
    suffix = os.path.splitext(path)[1]
    if suffix in ENCODINGS and hash_pieces(read_source(path, suffix)) == Checksum(wanted):
        return Checksum(wanted), suffix
    raise CorruptBufferError("the file %s does not hash to %s (but to %s): it has changed" % (path, wanted, found))


def read_source(path, suffix: str = "") -> _t.Iterator[bytes]:
    """The content of the user's file ``path`` in pieces, as ``pieces``; raises only ``SeamlessError``."""
    try:
        yield from pieces(path, suffix)
    except OSError as exc:
        raise SeamlessError("the file %s cannot be read: %s" % (path, exc.strerror)) from exc


def source_size(path) -> int:
    """Bytes of the user's file ``path``; raises ``SeamlessError``."""
    try:
        return os.stat(path).st_size
    except OSError as exc:
        raise SeamlessError("the file %s cannot be read: %s" % (path, exc.strerror)) from exc


def hash_pieces(parts: _t.Iterable[bytes]) -> Checksum:
    """The checksum of ``parts`` put together."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return Checksum(sha.hexdigest())


def is_whole(path: str, suffix: str, checksum: Checksum) -> bool:
    """Whether ``path`` has the content of ``checksum``."""
    try:
        return hash_pieces(pieces(path, suffix)) == checksum
    except CorruptBufferError:
        return False


def load(path: str, suffix: str, checksum: Checksum) -> _t.Optional[bytes]:
    """The content of ``path``, or None if it is not that of ``checksum``."""
    try:
        if suffix:
            data = b"".join(pieces(path, suffix))
        else:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
    except CorruptBufferError:
        return None
    return data if Checksum.of(data) == checksum else None


def _tee(parts: _t.Iterable[bytes], file) -> _t.Iterator[bytes]:
    for part in parts:
        file.write(part)
        yield part


def expand(path: str, suffix: str, checksum: Checksum) -> _t.Optional[_t.BinaryIO]:
    """A temporary file with the decompressed content of ``path``, or None if it is not that of ``checksum``."""
    import tempfile         # slow to import, and few stores hold compressed buffers
    file = tempfile.TemporaryFile()
    try:
        if hash_pieces(_tee(pieces(path, suffix), file)) == checksum:
            file.seek(0)
            return file
    except CorruptBufferError:
        pass                # as good as another content
    except BaseException:
        file.close()
        raise
    file.close()
    return None
