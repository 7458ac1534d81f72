"""What the handlers of a service take and give: ``Request``, ``Reply``, ``HttpError``.

A body is read through the request, which compares it with the digest that the sender signed; an answer
is made from bytes, text, JSON-able values or a file, signed if the request was, and sent.
"""
import hashlib
import io
import json
import os
import typing as _t

from .errors import SeamlessError, ServiceError, error_to_dict
from .httpwire import PIECE, Body, Disconnected, Wire
from .signing import sign_answer

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
    """One request.  ``path`` is decoded, ``headers`` have lower-case names, ``length`` is None if unknown.

    ``digest``: the SHA-256 that the sender signed for the body, None without signatures.  ``read`` and
    ``stream`` raise ``HttpError`` at the end of a body that has another one; so a handler that has seen
    the end knows the digest without computing it.
    """

    def __init__(self, method: str, target: str, headers: _t.Mapping[str, str], body: Body, digest: _t.Optional[str] = None):
        self.method, self.target, self.headers = method, target, headers
        path, _, self._query = target.partition("?")
        self.path = _unquote(path) if "%" in path else path
        self.length, self.digest = body.length, digest
        self._body = body
        self._data: _t.Optional[bytes] = None

    @property
    def query(self) -> _t.Dict[str, str]:
        """The parameters after ``?``; of a repeated one the last."""
        from urllib.parse import parse_qsl      # few requests have a query
        return dict(parse_qsl(self._query, keep_blank_values=True))

    def stream(self, chunk: int = PIECE) -> _t.Iterator[bytes]:
        """The body in pieces of at most ``chunk`` bytes, however long it is; once only."""
        if self._data is not None:
            yield self._data
            return
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
        """The whole body; ``HttpError(413)`` if it is longer than ``limit`` bytes.  May be called again."""
        if self._data is None:
            pieces, total = [], 0
            if (self.length or 0) <= limit:
                for piece in self.stream():
                    pieces.append(piece)
                    total += len(piece)
                    if total > limit:
                        break
            if max(total, self.length or 0) > limit:
                raise HttpError(413, "the body is longer than %d bytes" % limit)
            self._data = b"".join(pieces)
        return self._data

    def json(self, limit: int = JSON_BYTES):
        """The body as JSON; ``HttpError(400)`` if it is none."""
        try:
            return json.loads(self.read(limit))
        except (ValueError, RecursionError) as exc:
            raise HttpError(400, "the body is not JSON: %s" % exc) from None


class Reply:
    """An answer.  ``body``: bytes, str, dict, list, None, or a binary file (closed afterwards), of which
    ``length`` bytes are sent from its position (None: to its end).  ``digest``: the SHA-256 of what is
    sent, if it is known; it saves reading a file twice."""

    def __init__(self, body=b"", status: int = 200, headers: _t.Optional[_t.Mapping[str, str]] = None,
                 length: _t.Optional[int] = None, digest: _t.Optional[str] = None):
        self.status, self.headers, self.digest = status, dict(headers or {}), digest
        self.file, self.data, kind = None, b"", None
        if body is None:
            pass
        elif isinstance(body, str):
            self.data, kind = body.encode("utf-8"), "text/plain; charset=utf-8"
        elif isinstance(body, (dict, list)):
            self.data, kind = json.dumps(body, separators=(",", ":")).encode("utf-8"), "application/json"
        elif hasattr(body, "read"):
            self.file, kind = body, "application/octet-stream"
        else:
            self.data, kind = body, "application/octet-stream"
        if kind and not any(name.lower() == "content-type" for name in self.headers):
            self.headers["Content-Type"] = kind
        self.length = length if self.file and length is not None else _rest(self.file) if self.file else len(self.data)

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
        if self.digest is None:
            digest = hashlib.sha256(self.data)
            if self.file:
                start = self.file.tell()
                for piece in _pieces(self.file, self.length):
                    digest.update(piece)
                self.file.seek(start)
            self.digest = digest.hexdigest()
        self.headers["Seamless-Signature"] = sign_answer(secret, nonce, self.status, str(self.digest))

    def send(self, wire: Wire, keep: bool, without_body: bool = False):
        """Write the answer: head and small bodies at once, so that no packet waits for another."""
        lines = ["HTTP/1.1 %d %s" % (self.status, _REASONS.get(self.status, "Unknown"))]
        lines += ["%s: %s" % item for item in self.headers.items()]
        lines += ["Content-Length: %d" % self.length, "Connection: %s\r\n\r\n" % ("keep-alive" if keep else "close")]
        head = "\r\n".join(lines).encode("latin-1", "replace")
        if without_body:
            wire.send(head)
        elif self.file is None:
            wire.send(head + self.data)
        else:
            wire.send(head)
            if isinstance(getattr(self.file, "raw", self.file), io.FileIO):     # not a decompressor: that has a fileno too
                wire.send_file(self.file, self.length)
            else:
                for piece in _pieces(self.file, self.length):
                    wire.send(piece)

    def close(self):
        """Close the file, if any."""
        if self.file is not None:
            self.file.close()


def _unquote(path: str) -> str:
    from urllib.parse import unquote        # hardly ever needed
    return unquote(path)


def _rest(file) -> int:
    """Bytes from the position of ``file`` to its end."""
    start = file.tell()
    length = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    return length


def _pieces(file, length: int) -> _t.Iterator[bytes]:
    while length:
        piece = file.read(min(PIECE, length))
        if not piece:
            raise Disconnected("the file ended %d bytes too early" % length)
        length -= len(piece)
        yield piece
