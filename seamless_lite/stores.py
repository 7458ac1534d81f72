"""``open_stores``: from a description that can travel as JSON to a buffer store and a result store.

    {"buffers": {"directory": "/abs" or None, "address": A or None, "auth": True},
     "results": {"file": "/abs/seamless.db" or None, "address": A or None, "auth": True}}

A directory or file is opened directly, without HTTP, and with it those in ``"extra": [...]``, to be read only; else the service at the address is asked; with neither,
things stay in memory.  Either part may have ``"read": [...]``, more descriptions of the same form, which are asked
for what the first one lacks and never written.  Only on a network file system, where SQLite's locks cannot be trusted, an address is
preferred to the file.

An address that leads to another host may come with ``"secret_file"``, the secret of the account there, and with
``"patient": True``: another process looks after that connection, and a lost one will come back.
"""
import functools
import os
import time
import typing as _t

from .errors import DeadlineError, ServiceError
from .folder import Folder, MemoryBuffers
from .resulttable import MemoryResults, ResultTable

#: Longer than the one who looks after a connection has patience; and how often is tried meanwhile.
PATIENCE_S, PAUSE_S, PROBE_S = 660.0, 1.0, 10.0
NETWORK_FILE_SYSTEMS = frozenset((
    "nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "smbfs", "beegfs", "ceph", "afs", "glusterfs", "panfs", "pvfs2", "orangefs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.davfs", "davfs"))


class Stores(_t.NamedTuple):
    """Where buffers and results are; see ``MemoryBuffers`` and ``MemoryResults`` for what they can do."""
    buffers: _t.Any
    results: _t.Any

    def close(self) -> None:
        """Close both."""
        self.buffers.close()
        self.results.close()


def open_stores(spec: _t.Mapping, secret: _t.Optional[bytes] = None) -> Stores:
    """The stores that ``spec`` describes.  Nothing is made or connected to before the first use."""
    return Stores(_layered("buffers", _open_buffers, spec, secret), _layered("results", _open_results, spec, secret))


def _layered(kind, opener, spec, secret):
    spec = spec.get(kind) or {}
    top = opener(spec, secret)
    if not spec.get("read"):
        return top
    from .layers import LayeredBuffers, LayeredResults      # few need more than one store
    return (LayeredBuffers if kind == "buffers" else LayeredResults)(
        top, [opener({**layer, "readonly": True}, secret) for layer in spec["read"]])


def _open_buffers(spec, secret):
    if spec.get("directory"):
        return Folder(spec["directory"], extra_dirs=spec.get("extra") or (), writable=not spec.get("readonly"))
    if spec.get("address"):
        from .hashserver import HashserverClient        # HTTP is slow to import, and a local hit needs none
        client = HashserverClient(spec["address"], _secret(spec, secret), mend=_mend(spec))
        if spec.get("near"):                            # only on the nodes of a cluster
            from .layers import LayeredBuffers
            return LayeredBuffers(client, near=[Folder(spec["near"], writable=False)])
        return client
    return MemoryBuffers()


def _open_results(spec, secret):
    path, address = spec.get("file"), spec.get("address")
    if path and not (address and is_on_network(path)):
        table = ResultTable(path, writable=not spec.get("readonly"))
        if not spec.get("extra"):
            return table
        from .layers import LayeredResults
        return LayeredResults(table, [ResultTable(extra, writable=False) for extra in spec["extra"]])
    if address:
        from .database import DatabaseClient            # as above
        return DatabaseClient(address, _secret(spec, secret), mend=_mend(spec))
    return MemoryResults()


def _secret(spec, secret) -> _t.Optional[bytes]:
    if spec.get("secret_file"):
        from .signing import load_secret                # only workers with stores on another host need it
        secret = load_secret(spec["secret_file"])
    return secret if spec.get("auth", True) else None


def _mend(spec) -> _t.Optional[_t.Callable[[], None]]:
    return functools.partial(_await_other, spec["address"]) if spec.get("patient") else None


def _await_other(address: str) -> None:
    """Wait until another process has brought the connection back.  Raises ``ServiceError`` when that takes too long."""
    from .httpclient import HttpClient
    end = time.monotonic() + PATIENCE_S
    while True:
        client = HttpClient(address)
        try:
            client.request("GET", "/healthcheck", timeout_s=PROBE_S)
            return
        except (ServiceError, DeadlineError):
            if time.monotonic() > end:
                raise ServiceError("nothing has answered at %s for %d s: its host is down or cannot be reached; run again later"
                                   % (address, PATIENCE_S)) from None
        finally:
            client.close()
        time.sleep(PAUSE_S)


def is_on_network(path: str, mounts: str = "/proc/mounts") -> bool:
    """Whether ``path`` (which need not exist) is on a network file system; False where that cannot be told."""
    try:
        with open(mounts, "rb") as file:
            lines = [line.split(b" ") for line in file]
    except OSError:
        return False                                    # not Linux
    place, best, kind = os.fsencode(os.path.realpath(path)) + b"/", b"", b""
    for fields in lines:
        # the file writes a space, tab, newline or backslash as \040, \011, \012, \134
        point = fields[1].replace(b"\\040", b" ").replace(b"\\011", b"\t").replace(b"\\012", b"\n").replace(b"\\134", b"\\")
        point = point.rstrip(b"/") + b"/"
        if place.startswith(point) and len(point) >= len(best):     # of two on one point the last is on top
            best, kind = point, fields[2]
    return kind.decode("ascii", "replace") in NETWORK_FILE_SYSTEMS
