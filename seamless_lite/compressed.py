"""Files that may be compressed: the buffers ``<checksum>.zst`` and ``<checksum>.gz``, and the user's files.

gzip is in the standard library; for zstd there is a module (``compression.zstd`` of Python 3.14, ``backports.zstd``
or ``zstandard``), or else the program ``zstd``.
"""
import hashlib
import importlib
import os
import typing as _t

from .checksum import CHUNK, Checksum
from .durable import open_unnoticed
from .errors import CacheMissError, CorruptBufferError, SeamlessError

#: suffix of the stored form -> its name in HTTP (Content-Encoding)
ENCODINGS = {".zst": "zstd", ".gz": "gzip"}
ZSTD_MODULES = ("compression.zstd", "backports.zstd", "zstandard")
_PIECE = 4096       # of zstd data: that can stand for 100 MB


def pieces(path: str, suffix: str = "") -> _t.Iterator[bytes]:
    """The content of ``path``, piece by piece; decompressed if ``suffix`` is ".zst" or ".gz".

    Raises ``CorruptBufferError`` if it is not (whole) compressed data, ``CacheMissError`` if nothing on
    this machine can read zstd, and ``OSError`` if the file cannot be read.
    """
    with open_unnoticed(path) as file:
        if suffix == ".zst":
            yield from _unzstd(file, path)
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


def _zstd_module():
    """A module for zstd, or None.  All have the same ``ZstdDecompressor`` (for one frame) or ``decompressobj``."""
    for name in ZSTD_MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            pass                # the next one may be there
    return None


def _unzstd(file, path) -> _t.Iterator[bytes]:
    module = _zstd_module()
    if module is None:
        yield from _run_unzstd(file, path)
        return

    def frame():
        decompressor = module.ZstdDecompressor()
        return decompressor.decompressobj() if hasattr(decompressor, "decompressobj") else decompressor
    reader, empty = None, True
    try:
        for data in iter(lambda: file.read(_PIECE), b""):
            empty = False
            while data:
                reader = reader or frame()
                yield reader.decompress(data)
                data, reader = reader.unused_data, None if reader.eof else reader
    except module.ZstdError as exc:
        raise CorruptBufferError("%s is not whole zstd data (%s)" % (path, exc)) from exc
    if reader is not None or empty:
        raise CorruptBufferError("%s is not whole zstd data" % path)


def _run_unzstd(file, path) -> _t.Iterator[bytes]:
    process = _start_zstd(CacheMissError("%s is compressed with zstd, which nothing here can read: install the program zstd, or "
                                         "the Python module zstandard" % path), "-dcq", file, None)
    with process:
        try:
            yield from iter(lambda: process.stdout.read(CHUNK), b"")
        finally:
            process.stdout.close()      # a reader that stops early: zstd gets a broken pipe and ends
    if process.returncode != 0:
        raise CorruptBufferError("%s is not whole zstd data" % path)


def _start_zstd(missing: SeamlessError, options: str, source, out):
    import subprocess       # few files are compressed
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(["zstd", *options.split()], stdin=source or pipe, stdout=out or pipe, stderr=subprocess.DEVNULL)
    except OSError:
        raise missing from None


def compress(source: _t.BinaryIO, out: _t.BinaryIO, suffix: str) -> None:
    """Write the whole file ``source`` to ``out`` as ".zst" or ".gz"; plain if ``suffix`` is "".

    Neither a time nor a name gets into it.  Raises ``SeamlessError`` if nothing here can write zstd.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    parts = iter(lambda: source.read(CHUNK), b"")
    if suffix == ".gz":
        import gzip             # few files are compressed
        with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=6, mtime=0) as packed:
            for part in parts:
                packed.write(part)
    elif suffix == ".zst":
        _zstd(parts, out, size)     # Seamless 1.x only reads zstd data that announces its size
    else:
        for part in parts:
            out.write(part)


def _zstd(parts: _t.Iterable[bytes], out: _t.BinaryIO, size: int) -> None:
    module = _zstd_module()
    if module is not None:
        packer = module.ZstdCompressor()
        if hasattr(packer, "compressobj"):
            packer = packer.compressobj(size=size)
        else:
            packer.set_pledged_input_size(size)
        for part in parts:
            out.write(packer.compress(part))
        out.write(packer.flush())
        return
    out.flush()
    process = _start_zstd(SeamlessError("nothing here can write zstd: install the program zstd or the Python module zstandard, or "
                                        "do without .zst"), "-qc --stream-size=%d" % size, None, out)
    with process:
        try:
            for part in parts:
                process.stdin.write(part)
        except BrokenPipeError:
            pass                # its exit code says more
        finally:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass            # as above
    if process.returncode:
        raise SeamlessError("the program zstd failed (exit code %d)" % process.returncode)


def zstd_size(path: str) -> _t.Optional[int]:
    """The size of the content that the (first) zstd frame of the file announces; None if it does not."""
    with open(path, "rb") as file:
        head = file.read(18)
    if len(head) < 5 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags, single = head[4] >> 6, head[4] >> 5 & 1
    if not flags and not single:
        return None
    start, length = 5 + (1 - single) + (0, 1, 2, 4)[head[4] & 3], (1, 2, 4, 8)[flags]
    return int.from_bytes(head[start:start + length], "little") + (256 if flags == 1 else 0)


def split_compression(path: str) -> _t.Tuple[str, str]:
    """(path without a compression suffix, the suffix)."""
    for suffix in ENCODINGS:
        if path.endswith(suffix) and not path.endswith("/" + suffix) and path != suffix:
            return path[:-len(suffix)], suffix
    return path, ""


def expand_to(path: str, target: str, checksum: Checksum) -> None:
    """Write the decompressed content of ``path`` to ``target``.

    Raises ``CorruptBufferError`` if that is no longer the content named ``checksum``, ``OSError``.
    """
    with open(target, "wb") as file:
        if hash_pieces(_tee(pieces(path, split_compression(path)[1]), file)) != checksum:
            raise CorruptBufferError("the file '%s' has changed since it was read; run the command again" % path)


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
