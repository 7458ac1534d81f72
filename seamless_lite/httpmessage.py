"""What the handlers of a service take and give: ``Request``, ``Reply``, ``HttpError``; and what both sides send.

A body is read through the request, which compares it with the digest that the sender signed; an answer
is made from bytes, text, JSON-able values or a file, signed if the request was, and sent.
"""
import hashlib
import io
import json
import os
import typing as _t

from .errors import CorruptBufferError, SeamlessError, ServiceError, error_to_dict
from .httpwire import PIECE, Body, Wire
from .signing import EMPTY, sign_answer

JSON_BYTES = 64 << 20       # the longest body that is read into memory
_REASONS = {200: "OK", 201: "Created", 202: "Accepted", 206: "Partial Content", 304: "Not Modified", 400: "Bad Request",
            401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict",
            413: "Payload Too Large", 416: "Range Not Satisfiable", 500: "Internal Server Error", 503: "Service Unavailable"}


class HttpError(SeamlessError):
    """Answer with ``status``.  ``body`` (bytes, str, dict or list) replaces the usual JSON error."""

    def __init__(self, status: int, message: str = "", body=None, headers: _t.Optional[dict] = None):
        super().__init__(message or _REASONS.get(status, "error"))
        self.status, self.body, self.headers = status, body, headers


class Request:
    """One request.  ``path`` is without the query, ``headers`` have lower-case names, ``length`` is None if unknown.

    ``digest``: the SHA-256 that the sender signed for the body, None without signatures.  ``read`` and
    ``stream`` raise ``HttpError`` at the end of a body that has another one; so a handler that has seen
    the end knows the digest without computing it.
    """

    def __init__(self, method: str, target: str, headers: _t.Mapping[str, str], body: Body, digest: _t.Optional[str] = None):
        self.method, self.path, self.headers = method, target.partition("?")[0], headers
        self.length, self.digest, self._body = body.length, digest, body

    def stream(self, chunk: int = PIECE) -> _t.Iterator[bytes]:
        """The body in pieces of at most ``chunk`` bytes, however long it is; once only."""
        digest = hashlib.sha256() if self.digest else None
        while True:
            piece = self._body.read(chunk)
            if not piece:
                break
            if digest:
                digest.update(piece)
            yield piece
        if digest and digest.hexdigest() != self.digest:
            raise HttpError(400, "the body is not the one that was signed")

    def read(self, limit: int = JSON_BYTES) -> bytes:
        """The whole body, once only; ``HttpError(413)`` if it is longer than ``limit`` bytes."""
        pieces, total = [], self.length or 0
        for piece in self.stream() if total <= limit else ():
            pieces.append(piece)
            total += len(piece) if self.length is None else 0
            if total > limit:
                break
        if total > limit:
            raise HttpError(413, "the body is longer than %d bytes" % limit)
        return b"".join(pieces)

    def json(self, limit: int = JSON_BYTES):
        """The body as JSON; ``HttpError(400)`` if it is none."""
        try:
            return json.loads(self.read(limit))
        except (ValueError, RecursionError) as exc:
            raise HttpError(400, "the body is not JSON: %s" % exc) from None


class Payload:
    """What follows a head: ``data``, or ``length`` bytes of a binary ``file`` from its position (None: to its end).

    ``digest`` is its SHA-256 if that is known.  It can be sent several times.
    """

    def __init__(self, data: bytes = b"", file=None, length: _t.Optional[int] = None, digest: _t.Optional[str] = None):
        self.data, self.file, self._digest = data, file, digest
        if file is not None:
            self._start = file.tell()
            if length is None:
                length = file.seek(0, os.SEEK_END) - self._start
        self.length = len(data) if file is None else length

    @property
    def digest(self) -> str:
        if self._digest is None:
            digest = hashlib.sha256()
            for piece in self._pieces() if self.length else ():
                digest.update(piece)
            self._digest = digest.hexdigest() if self.length else EMPTY
        return str(self._digest)

    def send(self, wire: Wire, head: bytes):
        """Send ``head`` and this: small ones at once, so that no packet waits for another."""
        if self.file is None:
            wire.send(head + self.data)
            return
        wire.send(head)
        # not a decompressor: that has a fileno too; and the kernel knows of no deadline
        if wire.deadline is None and isinstance(getattr(self.file, "raw", self.file), io.FileIO):
            self.file.seek(self._start)
            self._check(self.length - wire.send_file(self.file, self.length))
        else:
            for piece in self._pieces():
                wire.send(piece)

    def _pieces(self) -> _t.Iterator[bytes]:
        if self.file is None:
            yield self.data
            return
        self.file.seek(self._start)
        left = self.length
        while left:
            piece = self.file.read(min(PIECE, left))
            self._check(0 if piece else left)
            left -= len(piece)
            yield piece

    def _check(self, missing: int):
        if missing:
            raise CorruptBufferError("the file ended %d bytes too early: it became shorter while it was sent" % missing)


class Reply:
    """An answer.  ``body``: bytes, str, dict, list, None, or a binary file, which is closed afterwards;
    ``length`` and ``digest`` are as in ``Payload``, and save reading a file twice."""

    def __init__(self, body=b"", status: int = 200, headers: _t.Optional[_t.Mapping[str, str]] = None,
                 length: _t.Optional[int] = None, digest: _t.Optional[str] = None):
        self.status, self.headers = status, dict(headers or {})
        data, file, kind = body or b"", None, "application/octet-stream" if body is not None else ""
        if isinstance(body, str):
            data, kind = body.encode("utf-8"), "text/plain; charset=utf-8"
        elif isinstance(body, (dict, list)):
            data, kind = json.dumps(body, separators=(",", ":")).encode("utf-8"), "application/json"
        elif hasattr(body, "read"):
            data, file = b"", body
        if kind:
            self.headers.setdefault("Content-Type", kind)
        self.payload = Payload(data, file, length, digest)

    @classmethod
    def of(cls, value) -> "Reply":
        """``value`` as a handler returned it."""
        return value if isinstance(value, Reply) else cls(value)

    @classmethod
    def of_error(cls, error: Exception) -> "Reply":
        """The answer that says ``error``: as JSON ``{"error": {...}}`` unless it brings its own body."""
        if isinstance(error, HttpError):
            kind = "ServiceError" if error.status in (401, 503) else "SeamlessError"
            body = error.body if error.body is not None else {"error": {"kind": kind, "message": str(error)}}
            return cls(body, error.status, error.headers)
        status = 404 if type(error).__name__ == "CacheMissError" else 503 if isinstance(error, ServiceError) else 400
        return cls({"error": error_to_dict(error)}, status)

    def sign(self, secret: bytes, nonce: str):
        """Add the signature for the request with ``nonce``."""
        self.headers["Seamless-Signature"] = sign_answer(secret, nonce, self.status, self.payload.digest)

    def send(self, wire: Wire, keep: bool, without_body: bool = False):
        """Write the answer."""
        lines = ["HTTP/1.1 %d %s" % (self.status, _REASONS.get(self.status, "Unknown"))]
        lines += ["%s: %s" % item for item in self.headers.items()]
        lines += ["Content-Length: %d" % self.payload.length,
                  "Connection: %s\r\n\r\n" % ("keep-alive" if keep else "close")]
        (Payload() if without_body else self.payload).send(wire, "\r\n".join(lines).encode("latin-1", "replace"))

    def close(self):
        """Close the file, if any."""
        if self.payload.file is not None:
            self.payload.file.close()
