"""Worker processes seen from outside: messages to them, and the end of all that they started.

A message is its length (8 bytes, big-endian) and its bytes.  Ending a worker means its whole family:
its descendants, its session, and whatever carries its mark in the environment (a shell job has a session
of its own, and is nobody's child once the worker is dead).  What has left all three is still a descendant
while the worker lives and adopts orphans.
"""
import os
import signal
import socket
import struct
import sys
import time
import typing as _t

#: The environment variable that marks a worker and all that it starts.
MARK = "SEAMLESS_WORKER"
_LENGTH = struct.Struct(">Q")
_PR_SET_CHILD_SUBREAPER = 36
_END_S = 5.0                # a killed process is gone within this, or hangs in the kernel


def package_root() -> str:
    """The folder, or the zip, from which this package is imported: where a new process must look for it."""
    root = os.path.dirname(os.path.abspath(__file__))
    for _ in __package__.split("."):
        root = os.path.dirname(root)
    return root


def send_message(sock: socket.socket, data: bytes) -> None:
    """Send one message.  Raises ``OSError`` if the other side is gone."""
    if len(data) < 1 << 16:
        sock.sendall(_LENGTH.pack(len(data)) + data)
    else:
        sock.sendall(_LENGTH.pack(len(data)))
        sock.sendall(data)


def receive_message(sock: socket.socket) -> bytes:
    """The next message.  Raises ``EOFError`` if the other side closed, ``OSError`` if it is gone or silent."""
    return _receive(sock, _LENGTH.unpack(_receive(sock, _LENGTH.size))[0])


def _receive(sock: socket.socket, n: int) -> bytes:
    data = sock.recv(n)
    if len(data) == n:
        return data
    pieces = [data]
    while data and n > len(data):
        n -= len(data)
        data = sock.recv(min(n, 1 << 20))
        pieces.append(data)
    if not data and n:
        raise EOFError("the other side closed")
    return b"".join(pieces)


class _Row(_t.NamedTuple):
    pid: int
    parent: int
    session: int            # where the system does not tell: the process group


def _table() -> _t.Iterator[_Row]:
    """All living processes."""
    if not sys.platform.startswith("linux"):
        yield from _table_of_ps()
        return
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:             # it ended meanwhile
                continue
            if fields and fields[0] not in (b"Z", b"X"):
                yield _Row(int(name), int(fields[1]), int(fields[3]))


def _table_of_ps() -> _t.Iterator[_Row]:
    import subprocess                   # only where there is no /proc
    done = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], stdout=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, timeout=10)
    for line in done.stdout.decode("ascii", "replace").splitlines():
        pid, parent, group, state = line.split()[:4]
        if not state.startswith("Z"):
            yield _Row(int(pid), int(parent), int(group))


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        with open("/proc/%d/environ" % pid, "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:                     # ended, not ours, or no /proc
        return False


def family(root: int, mark: str = "") -> _t.Set[int]:
    """``root`` (a leader of its session), its living descendants, their sessions, and all that carry ``mark``."""
    rows = list(_table())
    marked = ("%s=%s" % (MARK, mark)).encode()
    found = {row.pid for row in rows if row.pid == root or row.session == root}
    if mark:
        found |= {row.pid for row in rows if row.pid not in found and _is_marked(row.pid, marked)}
    own = {row.pid for row in rows if row.pid == os.getpid()}
    while True:
        leaders = {row.session for row in rows if row.pid in found and row.session in found}
        more = {row.pid for row in rows if row.parent in found or row.session in leaders} - found - own
        if not more:
            return found - own
        found |= more


def kill_family(root: int, mark: str = "", spare_root: bool = False) -> bool:
    """Kill the family of ``root`` until nothing of it is left; ``spare_root``: all but ``root``.

    False if something outlived it for 5 s.  ``root`` must be a child that the caller reaps, or the caller.
    """
    deadline = time.monotonic() + _END_S
    while True:
        victims = family(root, mark) - ({root} if spare_root else set())
        if not victims:
            return True
        for pid in victims:             # again and again: a process may fork while we look
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass                    # it ended by itself
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def adopt_orphans() -> None:
    """From now on a descendant that loses its parent becomes a child of this process (Linux; elsewhere nothing happens)."""
    if sys.platform.startswith("linux"):
        try:
            import ctypes                   # 0.3 MB of memory
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        except (ImportError, OSError, AttributeError):      # a Python or a libc without it
            pass


def describe_exit(returncode: _t.Optional[int]) -> str:
    """How a process ended, in words."""
    if returncode is None:
        return "did not end"
    if returncode >= 0:
        return "ended with exit code %d" % returncode
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "signal %d" % -returncode
    hint = ": out of memory?" if name == "SIGKILL" else ""
    return "was killed by %s%s" % (name, hint)
