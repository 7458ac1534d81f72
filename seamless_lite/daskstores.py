"""The stores of a daskserver for Dask workers on other hosts.

The daskserver serves them itself, over TCP, on the address on which the workers find their scheduler, with a secret that was
made for this cluster and goes to the workers with their plugin, which travels as all that Dask sends: encrypted.  So SQLite
files are opened by one process on one host only.  A worker that sees the folder of buffers, which it knows by a mark,
reads it directly; every buffer that is read is verified, so a wrong folder would cost time and nothing else.
"""
import os
import tempfile
import typing as _t

from .database import DatabaseService
from .hashserver import HashService
from .httpbase import Listen, Running, start
from .stores import Stores

MARKER = ".seamless-folder"
_SPOOL_BYTES = 8 << 20


class NodeStores:
    """Serves ``stores`` on ``host``; ``directory`` is the folder of buffers, if they are in one.

    ``spec`` and ``secret`` are what the workers need.  Raises ``ServiceError`` if no port of the range is free.
    """

    def __init__(self, stores: Stores, directory: _t.Optional[str], host: str, port_range: _t.Optional[_t.Tuple[int, int]] = None):
        self.secret = os.urandom(32)
        listen = Listen(None, host, None if port_range else 0, tuple(port_range) if port_range else None)
        self._running: _t.List[Running] = []
        try:
            for service in (HashService(Buffers(stores.buffers)), DatabaseService(_Results(stores.results))):
                self._running.append(start(service, listen, secret=self.secret))
        except BaseException:
            self.close()
            raise
        buffers, results = ({"address": running.address, "auth": True} for running in self._running)
        if directory is not None:
            buffers.update(near=directory, mark=mark(directory))
        self.spec = {"buffers": buffers, "results": results}

    def close(self) -> None:
        """Stop serving; the stores stay open."""
        for running in self._running:
            running.stop()


def on_node(spec: _t.Mapping) -> dict:
    """``NodeStores.spec`` as it is good for this host: with the folder of buffers only if it is here."""
    buffers = dict(spec.get("buffers") or {})
    word = buffers.pop("mark", None)
    if "near" in buffers and (word is None or read_mark(buffers["near"]) != word):
        del buffers["near"]
    return {**spec, "buffers": buffers}


def mark(directory: str) -> _t.Optional[str]:
    """The word that tells this folder from all others, which is written into it if need be; None if that is not possible."""
    path = os.path.join(directory, MARKER)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        aside = "%s.%d" % (path, os.getpid())
        if not os.path.exists(path):
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "w") as file:
                file.write(os.urandom(16).hex())
            try:
                os.link(aside, path)        # unlike a rename, it leaves one that somebody else has just made
            finally:
                os.unlink(aside)
    except FileExistsError:
        pass
    except OSError:
        return None
    return read_mark(directory)


def read_mark(directory: str) -> _t.Optional[str]:
    """The word in the folder; None if there is none."""
    try:
        with open(os.path.join(directory, MARKER)) as file:
            return file.read(100) or None
    except (OSError, UnicodeDecodeError):
        return None


class _Served:
    """A store that somebody else closes, with what a service expects of one in files."""
    writable, directory, path = True, None, None

    def __init__(self, base):
        self._base = base

    def __getattr__(self, name: str):
        return getattr(self._base, name)

    def close(self) -> None:
        """Whoever opened it closes it."""


class _Results(_Served):
    """For a ``DatabaseService``."""


class Buffers(_Served):
    """For a ``HashService``."""

    def forms(self, checksum) -> dict:
        """No compressed ones: the network within a cluster is fast."""
        return {}

    def put_stream(self, checksum, pieces: _t.Iterable[bytes], suffix: str = "") -> bool:
        """As ``Folder.put_stream``."""
        stream = getattr(self._base, "put_stream", None)
        if stream is not None:
            return stream(checksum, pieces, suffix)
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as file:
            for piece in pieces:
                file.write(piece)
            file.seek(0)
            self._base.put_open(checksum, file)
        return True
