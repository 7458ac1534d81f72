"""The client of every service: one kept connection per thread, deadlines, signatures, errors as exceptions.

A request whose connection broke is sent again, because everything that services do may be repeated:
names are contents.  A client survives a fork (the child connects anew) and may be used by many threads.
"""
import contextlib
import hashlib
import json as _json
import os
import socket
import threading
import time
import typing as _t
import weakref

from .errors import CorruptBufferError, DeadlineError, SeamlessError, ServiceError, error_from_dict
from .httpmessage import Payload
from .httpwire import Body, Disconnected, Malformed, TimedOut, Wire
from .signing import SignatureError, check_answer, sign_request

_PAUSES_S = (0.0, 0.05, 0.3)        # before the second, third and fourth attempt
_MENDS = 5                          # a request that breaks so many mended connections is given up
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
#: A host that falls silent is noticed after about 20 s.  Not every system has all of them.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPALIVE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20000))


class Answer:
    """An answer.  ``headers`` have lower-case names; ``body`` is b"" if it went ``into`` a file; ``signed`` says
    whether its digest was checked."""

    def __init__(self, status: int, headers: _t.Dict[str, str], body: bytes, signed: bool, address: str):
        self.status, self.headers, self.body, self.signed, self._address = status, headers, body, signed, address

    def json(self):
        """The body as JSON; ``ServiceError`` if it is none."""
        try:
            return _json.loads(self.body)
        except ValueError:
            raise ServiceError("%s answered %.60r, which is not JSON: it is not one of our services"
                               % (self._address, self.body)) from None

    def expect(self, *statuses: int) -> "Answer":
        """The answer itself if it has one of ``statuses``; otherwise ``ServiceError`` with what it says."""
        if self.status in statuses:
            return self
        text = self.body[:500].decode("utf-8", "replace").strip() or "nothing"
        raise ServiceError("%s answered %d: %s" % (self._address, self.status, text))


class _Again(Exception):
    """Send the request once more: our clock was corrected."""


class _Unreachable(ServiceError):
    """No connection was made."""


class HttpClient:
    """Talks to the service at ``address`` (``unix:///path`` or ``http://host:port``).

    With a ``secret`` every request is signed and an answer that is not signed is refused.
    ``read_timeout_s``: how long the service may be silent.  ``mend`` is called, outside of locks, when no
    connection can be made or one breaks again and again: it makes the service reachable at the same address
    again, or raises ``ServiceError``; then the request is repeated.
    """

    def __init__(self, address: str, secret: _t.Optional[bytes] = None, connect_timeout_s: float = 10.0,
                 read_timeout_s: float = 1200.0, mend: _t.Optional[_t.Callable[[], object]] = None):
        self.address, self._secret, self._mend = address, secret, mend
        self._where, self._host = _parse_address(address)
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        self._offset_s = 0.0                                # how far the server's clock is ahead of ours
        self._n_closed = 0
        self._local = threading.local()
        self._wires: _t.Dict[int, "weakref.ref[_ClientWire]"] = {}      # by thread; no lock, which a fork could leave locked

    def __repr__(self):
        return "HttpClient(%r)" % self.address

    def close(self):
        """Close the connections of all threads; a request that waits on one fails with ``ServiceError``.

        A later request opens a new connection.
        """
        self._n_closed += 1
        for ref in list(self._wires.values()):
            wire = ref()
            if wire is not None:
                wire.cut()

    def request(self, method: str, target: str, body: bytes = b"", json=None, file=None,
                timeout_s: _t.Optional[float] = None, into=None, digest: _t.Optional[str] = None, repeat: bool = True) -> Answer:
        """Send one request, which may be repeated (``repeat``) if the connection breaks, and read its answer.

        The body is ``body``, ``json`` (a value) or ``file`` (a binary file that can seek, from its position to
        its end); ``digest`` is its SHA-256 if that is known.  ``timeout_s`` bounds the whole, but for mending.  A 2xx body is
        written to the binary file ``into``, which can seek, instead of memory.

        Raises the exception that the answer describes (``{"error": {...}}``), ``ServiceError`` if the
        service cannot be reached or breaks off, ``DeadlineError`` when the time is over, and
        ``CorruptBufferError`` if the body is not the one that was signed.  Other answers, whatever
        their status, are returned.
        """
        kind = []
        if json is not None:
            body, kind = _json.dumps(json, separators=(",", ":")).encode("utf-8"), ["Content-Type: application/json"]
        payload = Payload(body, file, digest=digest)
        start = into.tell() if into is not None else 0
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        corrected, n_closed, pauses, mends = False, self._n_closed, iter(_PAUSES_S if repeat else ()), _MENDS if self._mend else 0
        while True:
            try:
                return self._once(method, target, payload, kind, deadline, into)
            except _Again:
                if corrected:
                    raise ServiceError("%s refuses our clock, although we took its time" % self.address) from None
                corrected = True
            except TimedOut as exc:
                limit = timeout_s if timeout_s is not None else self._read_timeout_s
                raise DeadlineError("%s did not answer %s %.80s within %g s (%s)"
                                    % (self.address, method, target, limit, exc)) from None
            except Malformed as exc:
                raise ServiceError("%s does not speak HTTP (%s): something else listens there"
                                   % (self.address, exc)) from None
            except (Disconnected, _Unreachable) as exc:     # a kept connection may have been closed while we did not look
                pause = next(pauses, None) if isinstance(exc, Disconnected) else None
                late = pause is not None and deadline is not None and time.monotonic() + pause >= deadline
                if n_closed != self._n_closed or late or pause is None and not mends:
                    raise self._given_up(exc, method, target) from None
                if pause is None:
                    mends, pauses, begun = mends - 1, iter(_PAUSES_S), time.monotonic()
                    self._mend()
                    deadline = None if deadline is None else deadline + time.monotonic() - begun
                else:
                    time.sleep(pause)
            if into is not None:
                into.seek(start)
                into.truncate()

    def _given_up(self, exc: Exception, method: str, target: str) -> ServiceError:
        if isinstance(exc, _Unreachable):
            return ServiceError(str(exc))
        return ServiceError("%s broke off (%s) in %s %.80s: the service died or was stopped; run again, or look into its log"
                            % (self.address, exc, method, target))

    def _once(self, method: str, target: str, payload: Payload, headers: _t.List[str], deadline, into) -> Answer:
        wire = self._wire(deadline)
        wire.deadline, wire.pause_s = deadline, self._read_timeout_s
        nonce, refused = None, None
        lines = ["%s %s HTTP/1.1" % (method, target), "Host: " + self._host, *headers,
                 "Content-Length: %d" % payload.length]
        if self._secret:
            value, nonce = sign_request(self._secret, method, target, payload.digest, self._offset_s)
            lines.append("Authorization: " + value)
        try:
            try:
                payload.send(wire, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            except Disconnected as exc:     # who refuses a body closes before it has all of it, but may have said why
                refused = exc
            try:
                answer = self._receive(wire, method, nonce, into)
            except Disconnected:
                raise refused or Disconnected("it closed the connection")
            if refused:
                wire.close()
            return answer
        except BaseException:
            wire.close()            # what is left on it belongs to this request
            raise

    def _receive(self, wire: Wire, method: str, nonce: _t.Optional[str], into) -> Answer:
        status = 100
        while status < 200:
            head = wire.head(self._read_timeout_s)
            if head is None:
                raise Disconnected("it closed the connection")
            first, headers = head
            status = _status(first)
        digest = self._proven(nonce, status, headers)
        if method == "HEAD" or status in (204, 304):
            headers, digest = {**headers, "content-length": "0"}, None      # they describe a body that is not sent
        body = Body(wire, headers)
        if not headers.keys() & {"content-length", "transfer-encoding"}:
            raise Malformed("the answer does not say how long it is")
        data = self._read(body, digest, into if 200 <= status < 300 else None)
        if "close" in headers.get("connection", "").lower() or first.startswith("HTTP/1.0"):
            wire.close()
        answer = Answer(status, headers, data, digest is not None, self.address)
        if status >= 400:
            self._raise_error(answer)
        return answer

    def _proven(self, nonce: _t.Optional[str], status: int, headers) -> _t.Optional[str]:
        """The digest that the answer's signature promises; None if we have no secret."""
        if not self._secret:
            return None
        try:
            return check_answer(self._secret, str(nonce), status, headers.get("seamless-signature"))
        except SignatureError:
            if status == 503:
                raise ServiceError("%s has too many connections, or is stopping: try again" % self.address) from None
            if status == 401:
                raise ServiceError("%s does not accept our secret: it belongs to somebody else, or was started with"
                                   " another secret file; stop it and start it again" % self.address) from None
            raise ServiceError("%s answers without the signature of our secret: it was started with 'auth: none', or something"
                               " else listens there; stop it, or write 'auth: none' in the cluster file" % self.address) from None

    def _read(self, body: Body, digest: _t.Optional[str], into) -> bytes:
        pieces, found = [], hashlib.sha256() if digest else None
        keep = pieces.append if into is None else into.write
        for piece in iter(body.read, b""):
            if found:
                found.update(piece)
            keep(piece)
        if found and found.hexdigest() != digest:
            raise CorruptBufferError("what %s sent is not what it signed: the stored file is damaged, or the connection is"
                                     % self.address)
        return b"".join(pieces)

    def _raise_error(self, answer: Answer):
        """Raise what the answer describes, if it is one of our error objects."""
        if not answer.body.startswith(b"{"):
            return
        try:
            value = _json.loads(answer.body)
        except ValueError:
            return
        if answer.status == 401 and answer.signed and isinstance(value.get("time"), (int, float)):
            self._offset_s = value["time"] - time.time()
            raise _Again
        if isinstance(value.get("error"), dict):
            error = error_from_dict(value["error"])
            if type(error) is SeamlessError or isinstance(error, ServiceError):
                error = type(error)("%s: %s" % (self.address, error))
            raise error

    def _wire(self, deadline) -> "_ClientWire":
        """The connection of this thread, opened if there is none or it belongs to the process that we were forked from."""
        wire = getattr(self._local, "wire", None)
        if wire is not None and not (wire.closed or wire.pid != os.getpid()):
            return wire
        if wire is not None:
            wire.close()
        wire = self._local.wire = _ClientWire(self._connect(deadline))
        self._wires[threading.get_ident()] = weakref.ref(wire)
        return wire

    def _connect(self, deadline) -> socket.socket:
        end = time.monotonic() + self._connect_timeout_s
        if deadline is not None:
            end = min(end, deadline)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                if deadline is not None and end == deadline:
                    raise TimedOut("no connection")
                raise _Unreachable("%s did not accept a connection within %g s: its host is down, or it is overloaded"
                                   % (self.address, self._connect_timeout_s))
            try:
                return self._open(left)
            except (BlockingIOError, InterruptedError):     # the backlog of a Unix socket is full
                time.sleep(min(0.02, max(left, 0)))
            except socket.timeout:
                pass                                        # the loop says it
            except OSError as exc:
                raise _Unreachable("nothing answers at %s (%s): the service is not running; run again to start it, or look into its log"
                                   % (self.address, exc.strerror or exc)) from None

    def _open(self, timeout_s: float) -> socket.socket:
        if isinstance(self._where, tuple):
            sock = socket.create_connection(self._where, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._where[0] not in _LOOPBACK:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEP_ALIVE:
                    if hasattr(socket, name):
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self._where)
        except BaseException:
            sock.close()
            raise
        return sock


class _ClientWire(Wire):
    """A connection that knows the process that opened it."""

    def __init__(self, sock: socket.socket):
        super().__init__(sock)
        self.pid, self.closed = os.getpid(), False

    def close(self):
        self.closed = True
        super().close()

    def cut(self):
        """Close, and wake the thread that waits for an answer; in a forked child the connection stays the parent's."""
        if self.pid == os.getpid():
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def __del__(self):
        self.sock.close()


def _parse_address(address: str):
    """(path of a Unix socket, "localhost") or ((host, port), "host:port")."""
    if address.startswith("unix://"):
        return address[len("unix://"):], "localhost"
    host, colon, port = address[len("http://"):].rstrip("/").rpartition(":")
    if not address.startswith("http://") or not (colon and port.isdigit()):
        raise ServiceError("%r is not an address of a service: it should be unix:///path or http://host:port" % address)
    return (host.strip("[]"), int(port)), "%s:%s" % (host, port)


def _status(first: str) -> int:
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
        raise Malformed("%.60r is not the first line of an answer" % first)
    return int(rest[:3])
