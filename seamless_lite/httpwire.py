"""HTTP/1.1 messages on a socket: what server and client have in common.

``Wire`` reads heads and sends bytes under a deadline; ``Body`` reads the body that a head announces,
by length or in chunks.  Small and strict on purpose: parsing headers
through the ``email`` package costs more than the rest of a small request together.
"""
import re
import socket
import time
import typing as _t

HEAD_BYTES = 1 << 16        # request or status line, and all headers
PIECE = 1 << 20
_BLANK, _LINE = re.compile(rb"\r?\n\r?\n"), re.compile(rb"\r?\n")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class WireError(Exception):
    """Base class of what can go wrong with a connection."""


class Disconnected(WireError):
    """The other side is gone, in the middle of a message."""


class TimedOut(WireError):
    """The other side was silent for too long, or the deadline passed."""


class Malformed(WireError):
    """What the other side sent is not HTTP/1.x."""


class Wire:
    """One end of a connection.  ``pause_s``: how long the other side may be silent; ``deadline``: ``time.monotonic()`` value or None."""

    def __init__(self, sock: socket.socket, pause_s: float = 30.0):
        self.sock, self.pause_s = sock, pause_s
        self.deadline: _t.Optional[float] = None
        self._buffer = b""

    def _call(self, function, *args):
        """A socket call within what is left of the time."""
        wait = self.pause_s
        if self.deadline is not None:
            wait = min(wait, self.deadline - time.monotonic())
            if wait <= 0:
                raise TimedOut("the deadline passed")
        try:
            self.sock.settimeout(wait)          # another thread may have closed it, which is a lost connection too
            return function(*args)
        except socket.timeout:
            raise TimedOut("the other side did nothing for %.0f s" % wait) from None
        except OSError as exc:
            raise Disconnected(exc.strerror or str(exc)) from None

    def receive(self, n: int) -> bytes:
        """Between 1 and ``n`` bytes; b"" when the other side closed."""
        if self._buffer:
            data, self._buffer = self._buffer[:n], self._buffer[n:]
            return data
        return self._call(self.sock.recv, n)

    def send(self, data):
        """Send all of ``data`` (bytes-like); large data in pieces, so that slow is not the same as dead."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            self._call(self.sock.sendall, view[start:start + PIECE])

    def send_file(self, file, length: int) -> int:
        """Send ``length`` bytes of a plain file from its position, in the kernel where possible; returns how many."""
        return self._call(self.sock.sendfile, file, file.tell(), length) if length else 0

    def head(self, within_s: float = 30.0) -> _t.Optional[_t.Tuple[str, _t.Dict[str, str]]]:
        """The first line and the headers (names in lower case) of the next message.

        None if the other side closed before it.  The first byte may take ``pause_s``, the rest ``within_s``.
        """
        data, deadline = self.receive(HEAD_BYTES), self.deadline
        if not data:
            return None
        self._buffer = data.lstrip(b"\r\n") + self._buffer
        limit = time.monotonic() + within_s
        self.deadline = limit if deadline is None else min(limit, deadline)
        try:
            return _parse(self._until(_BLANK, "the headers").decode("latin-1"))
        finally:
            self.deadline = deadline

    def line(self) -> bytes:
        """The next line without its end (sizes of chunks, trailers)."""
        return self._until(_LINE, "a chunk")

    def _until(self, end: "re.Pattern", what: str) -> bytes:
        data = b""
        while True:
            match = end.search(data, 0, HEAD_BYTES)
            if match:
                self._buffer = data[match.end():] + self._buffer
                return data[:match.start()]
            if len(data) >= HEAD_BYTES:
                raise Malformed("%s: longer than %d bytes" % (what, HEAD_BYTES))
            more = self.receive(4096)
            if not more:
                raise Disconnected("the connection closed in the middle of " + what)
            data += more

    def close(self):
        """Close the socket; never fails."""
        self.sock.close()


def _parse(text: str) -> _t.Tuple[str, _t.Dict[str, str]]:
    first, *lines = text.replace("\r\n", "\n").split("\n")
    headers: _t.Dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise Malformed("%.60r is not a header" % line)
        name, value = name.lower(), value.strip()
        if name in headers:
            if name == "content-length" and headers[name] != value:
                raise Malformed("two lengths")
            value = value if name == "content-length" else headers[name] + ", " + value
        headers[name] = value
    return first, headers


class Body:
    """The body that belongs to ``headers``.  ``length``: bytes, None if it is not known beforehand."""

    def __init__(self, wire: Wire, headers: _t.Mapping[str, str]):
        self._wire = wire
        coding = headers.get("transfer-encoding", "identity").lower()
        length = headers.get("content-length")
        if coding not in ("identity", "chunked"):
            raise Malformed("transfer coding %.40r is not supported" % coding)
        if length is not None and (coding == "chunked" or not (length.isascii() and length.isdigit() and len(length) < 19)):
            raise Malformed("the length of the body is not clear")
        self.chunked = coding == "chunked"
        self.length = None if self.chunked else int(length or 0)
        self._left = self.length or 0       # bytes left of the body, or of the chunk
        self.ended = self.length == 0
        #: True while the sender waits to be told whether we want the body at all.
        self.awaited = not self.ended and headers.get("expect", "").lower() == "100-continue"

    def read(self, n: int = PIECE) -> bytes:
        """Between 1 and ``n`` bytes; b"" at the end of the body, which is checked to be its real end."""
        if self.ended:
            return b""
        if self.awaited:
            self.awaited = False
            self._wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.chunked and not self._left and not self._next_chunk():
            return b""
        data = self._wire.receive(min(n, self._left))
        if not data:
            raise Disconnected("the connection closed in the middle of the body")
        self._left -= len(data)
        if self._left:
            return data
        self.ended = not self.chunked
        if self.chunked and self._wire.line():
            raise Malformed("a chunk is longer than it says")
        return data

    def drain(self, limit: int) -> bool:
        """Read and forget the rest; False, after ``limit`` bytes at the latest, if the end was not reached."""
        if self.awaited or (not self.chunked and self._left > limit):
            return False
        while not self.ended and limit > 0:
            limit -= len(self.read())
        return self.ended

    def _next_chunk(self) -> bool:
        size = self._wire.line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise Malformed("%.40r is not the size of a chunk" % size)
        self._left = int(size, 16)
        if self._left:
            return True
        for _ in range(100):                # trailers, which nobody needs
            if not self._wire.line():
                self.ended = True
                return False
        raise Malformed("too many trailers")
