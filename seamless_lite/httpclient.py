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
from .httpwire import PIECE, Body, Disconnected, Malformed, TimedOut, Wire, WireError
from .signing import EMPTY, SignatureError, check_answer, sign_request

_PAUSES_S = (0.0, 0.05, 0.3)        # before the second, third and fourth attempt


class Answer:
    """An answer.  ``headers`` have lower-case names; ``body`` is b"" if it went ``into`` a file; ``length``
    counts its bytes; ``signed`` says whether its digest was checked."""

    def __init__(self, status: int, headers: _t.Dict[str, str], body: bytes, length: int, signed: bool, address: str):
        self.status, self.headers, self.body, self.length = status, headers, body, length
        self.signed, self._address = signed, address

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


class HttpClient:
    """Talks to the service at ``address`` (``unix:///path`` or ``http://host:port``).

    With a ``secret`` every request is signed and an answer that is not signed is refused.
    ``read_timeout_s``: how long the service may be silent.
    """

    def __init__(self, address: str, secret: _t.Optional[bytes] = None, connect_timeout_s: float = 10.0,
                 read_timeout_s: float = 1200.0):
        self.address, self._secret = address, secret
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

    def request(self, method: str, target: str, body=None, json=None, file=None, headers: _t.Optional[_t.Mapping[str, str]] = None,
                timeout_s: _t.Optional[float] = None, into=None, retry: bool = True, digest: _t.Optional[str] = None) -> Answer:
        """Send one request and read its answer.

        The body is ``body`` (bytes), ``json`` (a value) or ``file`` (a path, or a binary file that can
        seek, from its position to its end); ``digest`` is its SHA-256 if that is known.  ``timeout_s``
        bounds the whole.  A 2xx body is written to the binary file ``into`` instead of memory.
        ``retry=False`` for a request that must not be repeated when its connection breaks.

        Raises the exception that the answer describes (``{"error": {...}}``), ``ServiceError`` if the
        service cannot be reached or breaks off, ``DeadlineError`` when the time is over, and
        ``CorruptBufferError`` if the body is not the one that was signed.  Other answers, whatever
        their status, are returned.
        """
        if json is not None:
            body = _json.dumps(json, separators=(",", ":")).encode("utf-8")
            headers = {"Content-Type": "application/json", **(headers or {})}
        with contextlib.ExitStack() as stack:
            if isinstance(file, (str, os.PathLike)):
                file = stack.enter_context(open(file, "rb"))
            upload = _Upload(b"" if body is None else body, file, digest, bool(self._secret))
            start = into.tell() if into is not None and into.seekable() else None
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            call = lambda fresh: self._once(method, target, upload, headers or {}, deadline, into, fresh)
            try:
                return self._attempts(call, retry, deadline, into, start)
            except TimedOut as exc:
                limit = timeout_s if timeout_s is not None else self._read_timeout_s
                raise DeadlineError("%s did not answer %s %.80s within %g s (%s)" % (self.address, method, target, limit, exc)) from None
            except Malformed as exc:
                raise ServiceError("%s does not speak HTTP (%s): something else listens there" % (self.address, exc)) from None
            except WireError as exc:
                raise ServiceError("%s broke off (%s) in %s %.80s: the service died or was stopped; run again, or look into its log"
                                   % (self.address, exc, method, target)) from None

    def _attempts(self, call, retry: bool, deadline, into, start) -> Answer:
        """Repeat ``call`` while connections break; a kept one may have been closed while we did not look."""
        corrected, n_closed = False, self._n_closed
        pauses = iter(_PAUSES_S if retry else ())
        fresh = not retry
        while True:
            try:
                return call(fresh)
            except _Again:
                if corrected:
                    raise ServiceError("%s refuses our clock, although we took its time" % self.address) from None
                corrected = True
            except Disconnected:
                pause = next(pauses, None)
                left = None if deadline is None else deadline - time.monotonic()
                if pause is None or (left is not None and left <= pause) or n_closed != self._n_closed:
                    raise
                if into is not None and start is None:
                    raise                       # what was written cannot be taken back
                fresh = True
                time.sleep(pause)
            if start is not None:
                into.seek(start)
                into.truncate()

    def _once(self, method: str, target: str, upload: "_Upload", headers, deadline, into, fresh: bool) -> Answer:
        wire = self._wire(fresh, deadline)
        wire.deadline, wire.pause_s = deadline, self._read_timeout_s
        nonce = None
        lines = ["%s %s HTTP/1.1" % (method, target), "Host: " + self._host, "Content-Length: %d" % upload.length]
        if self._secret:
            value, nonce = sign_request(self._secret, method, target, upload.digest, self._offset_s)
            lines.append("Authorization: " + value)
        lines += ["%s: %s" % item for item in headers.items()]
        try:
            refused = self._send(wire, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), upload)
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

    @staticmethod
    def _send(wire: Wire, head: bytes, upload: "_Upload") -> _t.Optional[Disconnected]:
        """Send everything.  A server that refuses a body closes before it has all of it, but may have said why: the error is returned."""
        try:
            if upload.file is None:
                wire.send(head + upload.data)
            else:
                wire.send(head)
                upload.send(wire)
        except Disconnected as exc:
            return exc
        return None

    def _receive(self, wire: Wire, method: str, nonce: _t.Optional[str], into) -> Answer:
        while True:
            head = wire.head(self._read_timeout_s)
            if head is None:
                raise Disconnected("it closed the connection")
            first, headers = head
            status = _status(first)
            if status >= 200:
                break
        digest = self._proven(nonce, status, headers)
        if method == "HEAD" or status in (204, 304):
            headers, digest = {**headers, "content-length": "0"}, None      # they describe a body that is not sent
        body = Body(wire, headers, until_close=True)
        data, length = self._read(body, digest, into if 200 <= status < 300 else None)
        if "close" in headers.get("connection", "").lower() or first.startswith("HTTP/1.0") or body.length is None and not body.chunked:
            wire.close()
        answer = Answer(status, headers, data, length, digest is not None, self.address)
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

    def _read(self, body: Body, digest: _t.Optional[str], into) -> _t.Tuple[bytes, int]:
        pieces, length, found = [], 0, hashlib.sha256() if digest else None
        while True:
            piece = body.read(PIECE)
            if not piece:
                break
            length += len(piece)
            if found:
                found.update(piece)
            if into is None:
                pieces.append(piece)
            else:
                into.write(piece)
        if found and found.hexdigest() != digest:
            raise CorruptBufferError("what %s sent is not what it signed: the stored file is damaged, or the connection is" % self.address)
        return b"".join(pieces), length

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

    def _wire(self, fresh: bool, deadline) -> "_ClientWire":
        """The connection of this thread, opened if there is none or it belongs to the process that we were forked from."""
        wire = getattr(self._local, "wire", None)
        if wire is not None and not (fresh or wire.closed or wire.pid != os.getpid()):
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
                raise ServiceError("%s did not accept a connection within %g s: its host is down, or it is overloaded"
                                   % (self.address, self._connect_timeout_s))
            try:
                return self._open(left)
            except (BlockingIOError, InterruptedError):     # the backlog of a Unix socket is full
                time.sleep(min(0.02, max(left, 0)))
            except socket.timeout:
                pass                                        # the loop says it
            except OSError as exc:
                raise ServiceError("nothing answers at %s (%s): the service is not running; run again to start it, or look into its log"
                                   % (self.address, exc.strerror or exc)) from None

    def _open(self, timeout_s: float) -> socket.socket:
        if isinstance(self._where, tuple):
            sock = socket.create_connection(self._where, timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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


class _Upload:
    """The body of a request: bytes, or a file from its position on, sent as often as needed."""

    def __init__(self, data: bytes, file, digest: _t.Optional[str], signed: bool):
        self.data, self.file = data, file
        if file is not None:
            self._start = file.tell()
            self.length = file.seek(0, os.SEEK_END) - self._start
        else:
            self.length = len(data)
        self.digest = str(digest) if digest else self._hash() if signed else EMPTY

    def _hash(self) -> str:
        if self.file is None:
            return hashlib.sha256(self.data).hexdigest() if self.data else EMPTY
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self) -> _t.Iterator[bytes]:
        self.file.seek(self._start)
        left = self.length
        while left:
            piece = self.file.read(min(PIECE, left))
            if not piece:
                raise CorruptBufferError("the file became shorter while it was sent")
            left -= len(piece)
            yield piece

    def send(self, wire: Wire):
        """Send the file."""
        for piece in self._pieces():
            wire.send(piece)


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
