"""The near end of ``relay``: a thread, one ssh, and listening sockets here that lead to sockets there.

``Tunnel`` begins when the far end has said that it runs, and is over for good when ssh ends: then its
listening sockets and connections close, so that whoever uses them notices.
"""
import collections
import contextlib
import itertools
import os
import socket
import subprocess
import tempfile
import threading
import time
import typing as _t

from . import relay
from .sshadvice import failure
from .sshmaster import no_program

Target = _t.Dict[str, object]       # {"unix": path} or {"tcp": [host, port]}


class Tunnel(relay.Link):
    """Starts ``argv``, whose far end reads a Python program from its input.  Safe from several threads.

    ``terminal``: it may ask there.  Raises the ``ServiceError`` of ``sshadvice`` if the far end does not run within ``limit_s``.
    """

    def __init__(self, host: str, argv: _t.List[str], limit_s: float, terminal: bool = False):
        self._host = host
        self._numbers = itertools.count(1)
        self._todo: "collections.deque[_t.Callable]" = collections.deque()
        self._listening: _t.Dict[str, socket.socket] = {}
        self._leads: _t.Dict[str, Target] = {}      # where a local address leads
        self.reasons: _t.Dict[str, str] = {}        # target, as text -> why it could not be connected
        self._wanted: _t.Dict[int, str] = {}
        self._errors = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._ssh = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=self._errors,
                                             start_new_session=not terminal)        # a Ctrl-C here is none there
            except FileNotFoundError:
                ours.close()
                raise no_program() from None
        self._pipe = ours
        try:
            self._greet(limit_s)
        except BaseException:
            self._ssh.kill()
            self._ssh.wait()
            ours.close()
            self._errors.close()
            raise
        super().__init__(ours.fileno(), ours.fileno())
        self._posting, self._over = threading.Lock(), False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.watched[self._wake_out.fileno()] = self._woken
        self._thread = threading.Thread(target=self._carry, name="ssh-" + host, daemon=True)
        self._thread.start()

    def _greet(self, limit_s: float):
        source = relay.__loader__.get_source(relay.__name__).encode("utf-8")
        end, heard = time.monotonic() + limit_s, b""
        self._pipe.settimeout(limit_s)
        try:
            self._pipe.sendall(b"%d\n%s" % (len(source), source))
            while relay.MARK not in heard:
                self._pipe.settimeout(max(0.01, end - time.monotonic()))
                piece = self._pipe.recv(1)          # what follows the mark is not for us
                if not piece:
                    break
                heard = (heard + piece)[-4000:]
            else:
                return
            code = self._ssh.wait(10)
        except (socket.timeout, subprocess.TimeoutExpired):
            code = None
        except OSError:
            code = self._ssh.wait(10)
        raise failure(self._host, ("the log-in timed out; " if code is None else "") + self.words()
                      + ("\n" + heard.decode("utf-8", "replace") if code != 255 else ""), code)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._ssh.poll() is None

    def words(self) -> str:
        """What ssh and the far end wrote on their standard error."""
        if self._errors.closed:                     # by another thread, which noticed first that all is over
            return ""
        self._errors.seek(max(0, os.fstat(self._errors.fileno()).st_size - 4000))
        return self._errors.read().decode("utf-8", "replace")

    def open(self, target: Target) -> socket.socket:
        """A connection to ``target`` there; {"run": []} is a new Python that reads its program from it."""
        ours, theirs = socket.socketpair()
        self._post(lambda: self._connect(theirs, target))
        return ours

    def listen(self, local: str, target: Target):
        """Listen at ``local``, the path of a socket or host:port; raises ``OSError`` if it cannot be had.

        An address that is listened at already leads to ``target`` from now on.
        """
        self._leads[local] = target
        if local in self._listening:
            return
        if local.startswith("/"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(local)
            sock.bind(local)                        # in a folder that is ours alone
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            host, _, port = local.rpartition(":")
            sock.bind((host, int(port)))
        sock.listen(128)
        sock.setblocking(False)
        self._listening[local] = sock
        self._post(lambda: self._watch(local, sock))

    def ignore(self, local: str):
        """Listen there no more."""
        self._post(lambda: self._unwatch(local))

    def listens(self, local: str) -> bool:
        """Whether ``local`` leads anywhere."""
        return self.alive and local in self._listening

    def answers(self, limit_s: float) -> bool:
        """Whether the far end is there: it says that a socket without a name does not exist."""
        with self.open({"unix": "/"}) as sock:
            sock.settimeout(limit_s)
            try:
                sock.recv(1)
            except socket.timeout:
                return False
        return self.alive

    def close(self):
        """End ssh and everything that goes through it."""
        with contextlib.suppress(OSError):
            self._pipe.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._errors.close()

    # --- in the thread ---

    def _carry(self):
        try:
            self.run()
        finally:
            with self._posting:
                self._over = True
            self._woken()
            for local in list(self._listening):
                self._unwatch(local)
            self._pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._ssh.wait(2)
            self._ssh.kill()
            self._ssh.wait()
            self._wake_in.close()
            self._wake_out.close()

    def _post(self, action: _t.Callable):
        """Have the thread do it; if the thread is over, the action closes what it was given."""
        with self._posting:
            if not self._over:
                self._todo.append(action)
                with contextlib.suppress(BlockingIOError):      # full, so it is awake
                    self._wake_in.send(b"x")
                return
        action()

    def _woken(self):
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)
        while self._todo:
            self._todo.popleft()()

    def _connect(self, sock: socket.socket, target: Target):
        if self._over:
            sock.close()
            return
        number = next(self._numbers)
        self._wanted[number] = str(target)
        self.add(number, sock, target)

    def refused(self, number: int, reason: str):
        self.reasons[self._wanted.get(number, "")] = reason

    def _drop(self, channel):
        self._wanted.pop(channel.number, None)
        super()._drop(channel)

    def _watch(self, local: str, sock: socket.socket):
        if self._over:
            self._unwatch(local)
            return

        def accept():
            with contextlib.suppress(OSError):
                self._connect(sock.accept()[0], self._leads[local])

        self.watched[sock.fileno()] = accept

    def _unwatch(self, local: str):
        sock = self._listening.pop(local, None)
        if sock is not None:
            self.watched.pop(sock.fileno(), None)
            sock.close()
            if local.startswith("/"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(local)
