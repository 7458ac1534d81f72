"""Other hosts, through the user's own ``ssh`` and its configuration.

``Host`` gives conversations (a program of ours runs there and answers requests on its standard output), and
forwards (an address here that leads to an address there).  Both go through one authenticated connection that all
processes of the user share (``sshmaster``); where sharing or forwarding is not possible, through one ssh of this
process whose far end carries everything (``tunnel`` and ``relay``).

``login shell -> LOADER -> python3 -> our source``: each step comes as one line that every login shell
understands, or through standard input, and nothing is installed there.
"""
import contextlib
import hashlib
import os
import re
import shlex
import socket
import threading
import time
import typing as _t

from . import hostside, relay
from .conversation import Conversation, Stream
from .errors import ConfigurationError, ServiceError
from .sshmaster import LOGIN_S, OPTIONS, PROBE_S, TARGET, TERMINAL_S, Impossible, Master, batch, has_terminal, remove
from .tunnel import Tunnel

PROOF_S = 10.0              # a service behind a new forward answers within this
QUIET_S = 0.5               # a forward to something that does not speak HTTP, and is not closed within this, works

_PLACES = ("$HOME/.local/bin", "$HOME/miniconda3/bin", "$HOME/miniforge3/bin", "$HOME/mambaforge/bin", "$HOME/anaconda3/bin",
           "/usr/bin", "/usr/local/bin", "/opt/conda/bin", "/opt/homebrew/bin")
#: For sh.  No quote ', no exclamation mark, no backslash, no newline: between '...' it means the same in every login shell.
_FIND = ("for p in \"$1\" python3 %s; do [ \"$p\" ] || continue; case \"$p\" in \"~/\"*) p=\"$HOME/${p#??}\";; esac; "
         "q=$(PATH=\"$PATH:%s\"; command -v \"$p\") || continue; "
         "\"$q\" -ISc \"import sys; sys.exit(sys.version_info < (3, 6))\" </dev/null >/dev/null 2>&1 && exec \"$q\" -ISc \"%s\"; f=\"$f $q\"; done; "
         "if [ \"$f\" ]; then echo \"seamless: too old to use:$f\"; else echo \"seamless: there is no python3\"; fi >&2; exit 93"
         % (" ".join("python3.%d" % n for n in range(16, 5, -1)), ":".join(_PLACES), relay.LOADER))


def loader(python: _t.Optional[str] = None) -> str:
    """The remote command that finds a Python of at least 3.6 (``python`` if that is one) and runs the source that comes
    on its standard input: a line with its length, and the source."""
    return "exec sh -c '%s' seamless %s" % (_FIND, shlex.quote(python or ""))


class Host:
    """The host that ssh knows as ``name``; ``python`` is tried first for what runs there.  Nothing is connected yet.

    May be used by several threads; in a forked child it makes its own connections.
    """

    def __init__(self, name: str, python: _t.Optional[str] = None):
        if not re.fullmatch(r"[^\s-]\S*", name) or re.search(r"[\x00-\x1f'\"`$;&|<>\\]", name):
            raise ConfigurationError("%r is not the name of a host: look into the cluster file" % name)
        self.name = name
        self._loader = loader(python)
        self._fresh()

    def _fresh(self):
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._mended = 0                        # how often
        self._master: _t.Optional[Master] = None
        self._shared = True                     # whether connections can be shared
        self._tunnel: _t.Optional[Tunnel] = None
        self._talks: _t.List[Conversation] = []
        self._forwards: _t.Dict[str, _t.Tuple[str, bool, str, bool]] = {}   # label: target, tcp, local, through the tunnel

    @contextlib.contextmanager
    def _locked(self):
        if self._pid != os.getpid():            # forked: threads and pipes stayed in the parent
            self._fresh()
        with self._lock:
            yield

    def __repr__(self):
        return "Host(%r)" % self.name

    # --- conversations ---

    def converse(self, source: str) -> Conversation:
        """Run the Python program ``source`` there, to be asked."""
        talk = Conversation(self.name, self._stream, source)
        with self._locked():
            self._talks = [other for other in self._talks if not other.closed] + [talk]
        return talk

    def _stream(self, alone: bool) -> Stream:
        """A new Python there that reads its program from the stream.  ``alone``: not in a session of the shared connection."""
        with self._locked():
            if self._tunnel is not None and self._tunnel.alive:
                tunnel = self._tunnel
            elif not alone and self._connect():
                return Stream.start(self._master.argv() + [self._loader])
            else:
                tunnel = self._dig(alone=True)
            return Stream(tunnel.open({"run": []}), tunnel.words)

    def _connect(self) -> _t.Optional[str]:
        """The identity of the shared connection, made if there is none; None if there can be none."""
        try:
            self._master = self._master or Master(self.name)
            if self._shared:
                found = self._master.identity()
                if not found:
                    with _held(self._master):
                        found = self._master.connect()
                return found
        except Impossible:
            self._shared = False
        return None

    def _dig(self, alone: bool = False) -> Tunnel:
        """The ssh that carries everything; in the shared connection if there is one, and not ``alone``."""
        if self._tunnel is not None and self._tunnel.alive:
            return self._tunnel
        if not alone and self._connect():
            try:
                self._tunnel = Tunnel(self.name, self._master.argv() + [self._loader], LOGIN_S)
                return self._tunnel
            except ServiceError as exc:
                if "refused by peer" not in str(exc):
                    raise
        terminal = has_terminal()
        argv = ["ssh", "-T", "-S", "none", "-o", "ControlMaster=no"] + OPTIONS + batch(terminal) + [self.name, self._loader]
        if terminal:                    # ssh must be able to ask there, but a Ctrl-C there is not for it
            argv = ["sh", "-c", "trap '' INT; exec \"$0\" \"$@\""] + argv
        self._tunnel = Tunnel(self.name, argv, TERMINAL_S if terminal else LOGIN_S, terminal)
        return self._tunnel

    # --- forwards ---

    def forward(self, label: str, target: str, tcp: bool = False) -> str:
        """An address here that leads to ``target`` there (``unix:///path``, ``http://host:port``, or ``tcp://host:port`` if it
        does not speak HTTP).  The same label gives the same address, as long as it can be had; ``tcp`` makes it a port of the loopback
        interface instead of a socket.  Raises ``ServiceError`` if nothing answers there.
        """
        if not TARGET.fullmatch(target):
            raise ServiceError("%r is not an address on another host" % target)
        with self._locked():
            local, through = self._lead(label, target, tcp)
            self._forwards[label] = (target, tcp, local, through)
        return "unix://" + local if local.startswith("/") else "http://" + local

    def _lead(self, label: str, target: str, tcp: bool, prove: bool = True) -> _t.Tuple[str, bool]:
        """The local address, and whether it goes through the tunnel.  A label keeps its way and its address."""
        old, _, local, through = self._forwards.get(label, (None, None, None, False))
        if through and old == target and self._tunnel is not None and self._tunnel.listens(local):
            return local, True
        if not through and self._connect():
            found = self._by_master(label, target, tcp, prove)
            if found:
                return found, False
            local = None
        return self._by_tunnel(label, target, tcp, local, prove), True

    def _by_master(self, label: str, target: str, tcp: bool, prove: bool) -> _t.Optional[str]:
        """The local address; None if nothing comes through."""
        master, kind = self._master, target.partition(":")[0].replace("http", "tcp")
        state = master.read_state()
        local, old, live = state.get("forwards", {}).get(label, (None, None, False))
        if live and old == target and tcp != local.startswith("/") and state["master"] == master.identity():
            return local                                # most often, and without a lock
        with _held(master):
            state = _state(master)
            if kind in state["forbidden"]:
                return None
            local, old, live = state["forwards"].get(label, (None, None, False))
            if live:
                master.cancel(local, old)
            if local and tcp == local.startswith("/"):
                local = None
            local = self._place(label, target, tcp, local, label in self._forwards)
            state["forwards"][label] = [local, target, True]
            master.write_state(state)
        if not prove or _proven(local, target):
            return local
        self._undo(label)
        return None

    def _place(self, label: str, target: str, tcp: bool, local: _t.Optional[str], keep: bool) -> str:
        """Forward some local address to the target; ``keep``: no other than ``local``, which is in use."""
        master = self._master
        for _ in range(5):
            if not tcp:
                local = master.path_of("-%s.sock" % _short(label))
                remove(local)                           # it stays behind when a connection ends
            local = local or "127.0.0.1:%d" % _free_port()
            if master.forward(local, target):
                return local
            if tcp and not keep:
                local = None
            time.sleep(0.05)
        raise ServiceError("ssh %s: %s cannot be forwarded to %s: is that taken by another program here?" % (self.name, target, local))

    def _undo(self, label: str, forbidden: _t.Sequence[str] = ()):
        """Cancel a forward of the shared connection, and remember what kinds of forwards it does not let through."""
        with _held(self._master):
            state = _state(self._master)
            local, target, live = state["forwards"].pop(label, (None, None, False))
            if live:
                self._master.cancel(local, target)
                if local.startswith("/"):
                    remove(local)
            state["forbidden"] = sorted({*state["forbidden"], *forbidden})
            self._master.write_state(state)

    def _by_tunnel(self, label: str, target: str, tcp: bool, local: _t.Optional[str], prove: bool) -> str:
        kind, path, web, host, port = TARGET.fullmatch(target).groups()
        there = {"unix": path} if kind else {"tcp": [host.strip("[]"), int(port)]}
        new = self._tunnel is None or not self._tunnel.alive
        tunnel = self._dig()
        if local is None and not tcp and self._master is not None:
            local = self._master.private_path(_short(label))
        local = local or "127.0.0.1:%d" % _free_port()
        try:
            tunnel.listen(local, there)
        except OSError as exc:
            raise ServiceError("ssh %s: nothing can listen at %s (%s)" % (self.name, local, exc.strerror)) from None
        if prove and not _proven(local, target):
            reason = tunnel.reasons.get(str(there), "it does not speak")
            tunnel.ignore(local)
            if new:
                tunnel.close()
            raise ServiceError("nothing answers at %s on %s (%s): the service is not running" % (target, self.name, reason))
        if self._shared and prove:
            self._undo(label, [kind or "tcp"])
        return local

    # --- mending ---

    def mend(self):
        """Make a lost connection and its forwards again, at the same local addresses; next to nothing if nothing is lost.

        One attempt, which takes up to a minute where nobody answers: patience is the caller's.  Many threads may call it
        at once.  Raises ``ServiceError``; its ``final`` is True if trying again cannot help.
        """
        before = self._mended
        with self._locked():
            if self._mended == before:          # else another thread did it while we waited
                self._mend()
                self._mended += 1

    def _mend(self):
        if self._tunnel is not None and not (self._tunnel.alive and self._tunnel.answers(PROBE_S)):
            self._tunnel.close()
            self._tunnel = None
        if self._shared and self._master is not None and not self._master.alive():
            with _held(self._master):
                if not self._master.alive():            # else another process was quicker
                    self._master.end()
                self._master.connect()
        for label, (target, tcp, _, _) in list(self._forwards.items()):
            self._lead(label, target, tcp, prove=False)

    def close(self):
        """End what this process alone holds: conversations, and the ssh that carries everything if there is one."""
        with self._locked():
            for talk in self._talks:
                talk.close()
            if self._tunnel is not None:
                self._tunnel.close()
            self._talks, self._tunnel = [], None
            self._forwards = {label: entry for label, entry in self._forwards.items() if not entry[3]}

    def log_out(self):
        """Also end the connection that all processes of the user share, and leave nothing of it on this machine."""
        self.close()
        with self._locked():
            if self._master is not None:
                with _held(self._master):
                    self._master.end()
                    for name in os.listdir(self._master.folder):
                        if name.startswith(self._master.name) and not name.endswith(".lock"):
                            remove(os.path.join(self._master.folder, name))
            self._forwards = {}


@contextlib.contextmanager
def _held(master: Master):
    try:
        with master.locked():
            yield
    except hostside.HostError as exc:
        raise ServiceError(str(exc)) from None


def _state(master: Master) -> dict:
    """What is known about the shared connection that there is now; under its lock."""
    identity, state = master.connect(), master.read_state()
    if state.get("master") != identity:         # another one: its forwards went with it, their addresses stay
        state = {"master": identity, "forbidden": [],
                 "forwards": {label: [local, target, False] for label, (local, target, _) in state.get("forwards", {}).items()}}
    return state


def _short(label: str) -> str:
    return hashlib.sha256(label.encode("utf-8")).hexdigest()[:8]


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _proven(local: str, target: str) -> bool:
    """Whether something at the other end answers: the local end of a forward accepts in any case."""
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX if local.startswith("/") else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(PROOF_S)
            host, _, port = local.rpartition(":")
            sock.connect(local if local.startswith("/") else (host, int(port)))
            if not target.startswith("tcp:"):
                sock.sendall(b"GET /healthcheck HTTP/1.0\r\n\r\n")
                return bool(sock.recv(1))
            sock.settimeout(QUIET_S)
            with contextlib.suppress(socket.timeout):
                return bool(sock.recv(1))
            return True
    return False
