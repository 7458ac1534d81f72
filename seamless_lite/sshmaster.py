"""The one authenticated connection to a host that all processes of a user share (ssh's ControlMaster).

It is started by whoever needs it first, under a lock, and ends ``PERSIST_S`` after its last use.  Everything else
(commands, forwards) goes through its socket with ``ssh -F /dev/null -S SOCKET``, which can not make a
connection of its own: so nobody is asked twice, and a lost master is noticed.

If the user's configuration has a shared connection to the host that lives, that one is used.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
import typing as _t

from . import hostside
from .errors import ServiceError
from .sshadvice import failure, hung_up, settings

PERSIST_S = 600
CONNECT_S = 15              # until the host answers at all
LOGIN_S = 60                # until a log-in that asks nobody is done
TERMINAL_S = 300            # the same, when a person may have to type something
PROBE_S = 8                 # a connection that is silent for so long is not worth keeping
_RESETS_S = (0.5, 1.5, 4.0)     # pauses after a log-in that was cut off
_PATH_BYTES = 88            # ssh adds 17 to a path while it makes the socket
#: Where a forward leads.
TARGET = re.compile(r"(unix)://(/.+)|(http|tcp)://(\[[^\]]+\]|[^:/]+):(\d+)/?")
#: A silent peer is noticed after 15 s.  lowdelay switches Nagle's algorithm off also where nothing but forwards use a connection.
OPTIONS = ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=%d" % CONNECT_S,
           "-o", "ClearAllForwardings=yes", "-o", "IPQoS=lowdelay", "-o", "LogLevel=ERROR"]


class Impossible(ServiceError):
    """Connections cannot be shared here."""


class Master:
    """The shared connection to ``host``.  Not thread-safe: ``Host`` has the lock for threads, ``locked`` is for processes."""

    def __init__(self, host: str):
        self.host = host
        self.folder = _folder()
        self.name = hashlib.sha256(("%s %s" % (os.uname().nodename, host)).encode()).hexdigest()[:8]
        self.path = os.path.join(self.folder, self.name)        # its control socket
        self._own, self._log = self.path, self.path + ".log"
        self._lost: _t.Optional[int] = None         # the process of a connection of the user's that is dead or hangs

    def locked(self):
        """The lock of everything that changes about this host."""
        return hostside.locked(self.folder, self.name, TERMINAL_S + LOGIN_S)

    def identity(self) -> _t.Optional[str]:
        """The process that is the shared connection, as text that no later one has; None if there is none."""
        pid = _answering(self.path)
        return "%d %s %s" % (pid, hostside.identity(pid), self.path) if pid else None

    def connect(self) -> str:
        """Log in if there is no connection; under ``locked``.  Its identity.  Raises ``ServiceError``, or ``Impossible``."""
        found = self.identity()
        if found:
            return found
        users = settings(self.host).get("controlpath", ["none"])[0]
        self.path = users if users != "none" and _answering(users) not in (None, self._lost) else self._own
        if self.path == self._own:
            if os.path.exists(self._own):
                self.end()
            self._start()
        found = self.identity()
        if not found:
            raise Impossible("the connection to a host cannot be shared by processes here")
        return found

    def _start(self):
        terminal = has_terminal()
        for pause in _RESETS_S + (None,):
            argv = ["ssh", "-f", "-N", "-T", "-S", self._own, "-E", self._log, "-o", "ControlMaster=yes",
                    "-o", "ControlPersist=%d" % PERSIST_S] + OPTIONS + batch(terminal) + [self.host]
            with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), "ab") as log:
                code = run(argv, TERMINAL_S if terminal else LOGIN_S, None if terminal and os.isatty(2) else log)
            with open(self._log, encoding="utf-8", errors="replace") as file:
                words = file.read()
            if code == 0:
                return
            if "unix_listener" in words or "mux listener" in words:
                raise Impossible("the connection to a host cannot be shared by processes here")
            if not hung_up(words) or pause is None:
                raise failure(self.host, "the log-in timed out; " + words if code is None else words, code)
            time.sleep(pause * random.uniform(0.7, 1.3))

    def argv(self, *options: str) -> _t.List[str]:
        """The ssh command that goes through the shared connection or fails; a remote command may be appended."""
        return ["ssh", "-F", "/dev/null", "-S", self.path, "-o", "ControlMaster=no", "-o", "ProxyCommand=false",
                "-o", "LogLevel=ERROR", "-T", *options, self.host]

    def alive(self) -> bool:
        """Whether the other end answers, not only the process here: sshd says yes or no to a connection that nobody uses."""
        if self.identity() is None:
            return False
        with tempfile.TemporaryFile() as errors:
            code = run(self.argv("-W", "127.0.0.1:1"), PROBE_S, errors)
            errors.seek(0)
            return code is not None and b"kex_exchange" not in errors.read()        # that would be a connection of its own

    def end(self):
        """End the connection, if it is ours; the user's own is only used no more."""
        if self.path == self._own:
            run(self.argv("-O", "exit"), 5)
            known = str(self.read_state().get("master"))        # one that hangs, and does not hear us
            pid = known.partition(" ")[0]
            if pid.isdigit() and known == "%s %s %s" % (pid, hostside.identity(int(pid)), self._own):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            remove(self._own)
        else:
            for listen, target, live in self.read_state().get("forwards", {}).values():
                if live:
                    self.cancel(listen, target)
            self._lost, self.path = _answering(self.path), self._own

    def forward(self, listen: str, target: str) -> bool:
        """Forward connections to ``listen`` (the path of a socket, or host:port) to ``target`` there; False if it cannot be done."""
        return run(self.argv("-O", "forward", "-L", "%s:%s" % (listen, _spec(target))), PROBE_S) == 0

    def cancel(self, listen: str, target: str):
        """Undo ``forward``."""
        run(self.argv("-O", "cancel", "-L", "%s:%s" % (listen, _spec(target))), PROBE_S)

    def read_state(self) -> dict:
        """What processes tell each other about this host: {"master": identity, "forwards": {label: [listen, target, live]},
        "forbidden": kinds of targets}."""
        try:
            with open(self.path_of(".json"), encoding="utf-8") as file:
                state = json.load(file)
        except (OSError, ValueError):
            state = {}
        return state if isinstance(state, dict) else {}

    def write_state(self, state: dict):
        """Under ``locked``."""
        aside = self.path_of(".tmp")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.replace(aside, self.path_of(".json"))

    def private_path(self, label: str) -> str:
        """A path for a socket of this process alone; those that dead processes left are removed."""
        for name in os.listdir(self.folder):
            left = re.fullmatch(self.name + r"-\w+-(\d+)-\w+\.sock", name)
            if left and hostside.identity(int(left.group(1))) is None:
                remove(os.path.join(self.folder, name))
        return self.path_of("-%s-%d-%s.sock" % (label, os.getpid(), os.urandom(2).hex()))

    def path_of(self, ending: str) -> str:
        """A file of this host in the private folder."""
        return self._own + ending


def run(argv: _t.List[str], limit_s: float, errors=subprocess.DEVNULL) -> _t.Optional[int]:
    """The exit code of a local command; None if it took too long."""
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
    except FileNotFoundError:
        raise no_program() from None
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _spec(target: str) -> str:
    """The target as ``ssh -L`` writes it."""
    kind, path, _, host, port = TARGET.fullmatch(target).groups()
    return path.replace(":", "\\:") if kind else "%s:%s" % (host, port)


def remove(path: str):
    """Remove the file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def no_program() -> ServiceError:
    """The error for a machine without ssh."""
    error = ServiceError("there is no program 'ssh' on PATH: install the OpenSSH client")
    error.final = True              # type: ignore[attr-defined]
    return error


def has_terminal() -> bool:
    """Whether ssh can ask a person."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    except OSError:
        return False


def batch(terminal: bool) -> _t.List[str]:
    """Ask nobody if nobody is there."""
    askpass = os.environ.get("SSH_ASKPASS") and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return [] if terminal or askpass else ["-o", "BatchMode=yes"]


def _answering(path: str) -> _t.Optional[int]:
    """The number of the process behind a control socket, by ssh's own protocol (PROTOCOL.mux): a hello each, then "are you alive"."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError, struct.error):
        sock.settimeout(PROBE_S)
        sock.connect(path)
        sock.sendall(struct.pack(">3I", 8, 1, 4) + struct.pack(">3I", 8, 0x10000004, 0))
        with sock.makefile("rb") as file:
            kind, = struct.unpack(">I", file.read(struct.unpack(">I", file.read(4))[0])[:4])
            answer, _, pid = struct.unpack(">3I", file.read(struct.unpack(">I", file.read(4))[0]))
        if kind == 1 and answer == 0x80000005:
            return pid
    return None


def _folder() -> str:
    """A private folder with a short path that takes sockets.  Raises ``Impossible``."""
    try:
        first = hostside.private_folder(os.path.join(hostside.run_folder(), "ssh"))
    except hostside.HostError as exc:
        raise ServiceError(str(exc)) from None
    # the name of the other folder tells which $SEAMLESS_HOME it belongs to, as the first one does
    short = "/tmp/seamless-%d" % os.geteuid()
    for path in (first, os.path.join(short, hashlib.sha256(os.fsencode(first)).hexdigest()[:8])):
        with contextlib.suppress(OSError, hostside.HostError):
            if path != first:
                hostside.private_folder(short)
                hostside.private_folder(path)
            if len(os.fsencode(path)) + 22 <= _PATH_BYTES and _takes_sockets(path):
                return path
    raise Impossible("the connection to a host cannot be shared by processes here")


def _takes_sockets(folder: str) -> bool:
    """Some network file systems do not, or have no hard links, which ssh needs as well."""
    name = os.path.join(folder, "%s" % os.urandom(4).hex())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        try:
            sock.bind(name)
            os.link(name, name + "+")
            return True
        finally:
            remove(name)
            remove(name + "+")
    return False
