"""A program of ours that runs on another host: it gets requests on its standard input and answers on its output.

A request is one line of JSON, perhaps followed by bytes (``"bytes"`` in the request says how many); the answer is a line
with ``hostside.MARKER`` and ``{"ok": VALUE}`` or ``{"error": SENTENCE}``.  Whatever start-up files print is skipped.
"""
import contextlib
import json
import os
import select
import socket
import subprocess
import tempfile
import threading
import time
import typing as _t

from . import hostside
from .errors import DeadlineError, ServiceError
from .sshadvice import failure
from .sshmaster import no_program

_MARK = hostside.MARKER.encode("ascii")
_ending: _t.List[subprocess.Popen] = []      # forgetting a child before it has ended would warn


class Conversation:
    """``source`` runs on ``host``, and is asked; safe from several threads, which wait for each other.

    ``open_stream(alone)`` gives a stream that a Python there reads its program from; ``alone``: not in a
    session of a shared connection, because that refuses more sessions.
    """

    def __init__(self, host: str, open_stream: "_t.Callable[[bool], Stream]", source: str):
        self._host, self._open, self._lock = host, open_stream, threading.Lock()
        program = source.encode("utf-8")
        self._unanswered = b"%d\n%s" % (len(program), program)      # sent again if the first attempt fails
        self._heard = b""
        self._answered = self.closed = False
        self._stream = open_stream(False)

    def ask(self, request: dict, data: bytes = b"", timeout_s: float = 120.0):
        """The "ok" of the answer; ``data`` follows the request, which tells its length as "bytes".

        Raises ``ServiceError`` for its "error" and if the connection fails, ``DeadlineError`` after ``timeout_s``.
        """
        if data:
            request = dict(request, bytes=len(data))
        end = time.monotonic() + timeout_s
        with self._lock:
            if self.closed:
                raise ServiceError("the conversation with %s is over" % self._host)
            self._unanswered += json.dumps(request).encode("ascii") + b"\n" + data
            try:
                answer = self._exchange(end, timeout_s)
            except _Lost as lost:
                if self._answered or lost.code not in (255, None):
                    self.close()
                    raise failure(self._host, lost.words, lost.code) from None
                self._stream.close()                    # what was shared is lost: once more, on another connection
                self._stream = self._open("refused by peer" in lost.words)
                try:
                    answer = self._exchange(end, timeout_s)
                except _Lost as again:
                    self.close()
                    raise failure(self._host, again.words, again.code) from None
            self._answered, self._unanswered = True, b""
        if "ok" not in answer:
            error = ServiceError("%s: %s" % (self._host, answer.get("error", "an answer that says nothing")))
            error.final = True          # type: ignore[attr-defined]
            raise error
        return answer["ok"]

    def _exchange(self, end: float, limit_s: float) -> dict:
        sock, view, poll = self._stream.sock, memoryview(self._unanswered), select.poll()
        while True:
            start = self._heard.find(_MARK)
            line, newline, rest = self._heard[max(start, 0):].partition(b"\n")
            if start >= 0 and newline:
                self._heard = rest
                try:
                    return json.loads(line[len(_MARK):].decode("utf-8"))
                except ValueError:
                    raise ServiceError("%s answered %.80r" % (self._host, line)) from None
            if start < 0:
                self._heard = self._heard[-4000:]       # noise, of which only an error message may want to know
            poll.register(sock, select.POLLIN | (select.POLLOUT if view else 0))
            left = end - time.monotonic()
            events = poll.poll(left * 1000) if left > 0 else []
            if not events:
                self.close()
                raise DeadlineError("%s did not answer within %g s" % (self._host, limit_s))
            try:
                if events[0][1] & select.POLLOUT:
                    view = view[sock.send(view[:1 << 18], socket.MSG_DONTWAIT):]
                if events[0][1] & ~select.POLLOUT:
                    data = sock.recv(1 << 18, socket.MSG_DONTWAIT)
                    if not data:
                        raise BrokenPipeError
                    self._heard += data
            except BlockingIOError:
                pass
            except OSError:
                code = self._stream.wait()
                # not what follows a mark: half an answer, which may hold a secret
                noise = "" if code == 255 else self._heard.partition(_MARK)[0].decode("utf-8", "replace")
                self._heard = b""
                raise _Lost(self._stream.words() + noise, code) from None

    def close(self):
        """The program there sees the end of its input."""
        self.closed = True
        self._stream.close()


class _Lost(Exception):
    def __init__(self, words: str, code: _t.Optional[int]):
        self.words, self.code = words, code


class Stream:
    """A socket to the standard input and output of a program there, and the ssh that carries it."""

    def __init__(self, sock: socket.socket, words: _t.Callable[[], str], ssh: _t.Optional[subprocess.Popen] = None, errors=None):
        self.sock, self.words, self._ssh, self._errors = sock, words, ssh, errors

    @classmethod
    def start(cls, argv: _t.List[str]) -> "Stream":
        """In a session of the shared connection."""
        _ending[:] = [child for child in _ending if child.poll() is None]
        ours, theirs = socket.socketpair()
        errors = tempfile.TemporaryFile()
        with theirs:
            try:                                        # a session of its own: a Ctrl-C here is none there
                ssh = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=errors, start_new_session=True)
            except FileNotFoundError:
                ours.close()
                raise no_program() from None

        def words() -> str:
            errors.seek(max(0, os.fstat(errors.fileno()).st_size - 4000))
            return errors.read().decode("utf-8", "replace")

        return cls(ours, words, ssh, errors)

    def wait(self) -> _t.Optional[int]:
        """The exit code of ssh, whose output has ended; None if there is none."""
        if self._ssh is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._ssh.wait(5)
        return None

    def close(self):
        """The other end sees the end of its input; nobody waits until it has gone."""
        self.sock.close()
        if self._ssh is not None:
            if self._ssh.poll() is None:
                _ending.append(self._ssh)
            self._ssh = None
            self._errors.close()
