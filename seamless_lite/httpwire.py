"""HTTP/1.1 messages on a socket: what server and client have in common.

``Wire`` reads heads and sends bytes under a deadline; ``Body`` reads the body that a head announces,
by length, in chunks, or until the connection closes.  Small and strict on purpose: parsing headers
through the ``email`` package costs more than the rest of a small request together.
"""
import re
import socket
import time
import typing as _t

HEAD_BYTES = 1 << 16        # request or status line, and all headers
PIECE = 1 << 20
_BLANK = re.compile(rb"\r?\n\r?\n")
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

    def _arm(self):
        """Give the next socket call what is left of the time."""
        wait = self.pause_s
        if self.deadline is not None:
            wait = min(wait, self.deadline - time.monotonic())
            if wait <= 0:
                raise TimedOut("the deadline passed")
        self.sock.settimeout(wait)

    def receive(self, n: int) -> bytes:
        """Between 1 and ``n`` bytes; b"" when the other side closed."""
        if self._buffer:
            data, self._buffer = self._buffer[:n], self._buffer[n:]
            return data
        self._arm()
        try:
            return self.sock.recv(n)
        except socket.timeout:
            raise TimedOut("no data for %.0f s" % (self.sock.gettimeout() or 0)) from None
        except OSError as exc:
            raise Disconnected(exc.strerror or str(exc)) from None

    def send(self, data):
        """Send all of ``data`` (bytes-like); large data in pieces, so that slow is not the same as dead."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), PIECE):
                self._arm()
                self.sock.sendall(view[start:start + PIECE])
        except socket.timeout:
            raise TimedOut("the other side does not read") from None
        except OSError as exc:
            raise Disconnected(exc.strerror or str(exc)) from None

    def send_file(self, file, length: int):
        """Send ``length`` bytes of a plain file from its position, inside the kernel where possible."""
        self._arm()
        try:
            sent = self.sock.sendfile(file, file.tell(), length) if length else 0
        except socket.timeout:
            raise TimedOut("the other side does not read") from None
        except OSError as exc:
            raise Disconnected(exc.strerror or str(exc)) from None
        if sent != length:
            raise Disconnected("the file ended after %d of %d bytes" % (sent, length))

    def head(self, within_s: float = 30.0) -> _t.Optional[_t.Tuple[str, _t.Dict[str, str]]]:
        """The first line and the headers (names in lower case) of the next message.

        None if the other side closed before it.  The first byte may take ``pause_s``, the rest ``within_s``.
        """
        data, deadline = self.receive(HEAD_BYTES), self.deadline
        if not data:
            return None
        limit = time.monotonic() + within_s
        self.deadline = limit if deadline is None else min(limit, deadline)
        try:
            data = data.lstrip(b"\r\n")
            while not _BLANK.search(data) and len(data) <= HEAD_BYTES:
                more = self.receive(HEAD_BYTES)
                if not more:
                    raise Disconnected("the connection closed in the middle of the headers")
                data += more
        finally:
            self.deadline = deadline
        end = _BLANK.search(data, 0, HEAD_BYTES)
        if not end:
            raise Malformed("the headers are longer than %d bytes" % HEAD_BYTES)
        head, self._buffer = data[:end.start()], data[end.end():] + self._buffer
        return _parse(head.decode("latin-1"))

    def line(self) -> bytes:
        """The next line without its end (sizes of chunks, trailers)."""
        data = b""
        while b"\n" not in data:
            more = self.receive(4096)
            if not more:
                raise Disconnected("the connection closed in the middle of a chunk")
            data += more
            if len(data) > HEAD_BYTES:
                raise Malformed("a line is longer than %d bytes" % HEAD_BYTES)
        line, _, rest = data.partition(b"\n")
        self._buffer = rest + self._buffer
        return line.rstrip(b"\r")

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

    def __init__(self, wire: Wire, headers: _t.Mapping[str, str], until_close: bool = False):
        self._wire = wire
        coding = headers.get("transfer-encoding", "identity").lower()
        length = headers.get("content-length")
        if coding not in ("identity", "chunked"):
            raise Malformed("transfer coding %.40r is not supported" % coding)
        if length is not None and (coding == "chunked" or not (length.isascii() and length.isdigit() and len(length) < 19)):
            raise Malformed("the length of the body is not clear")
        self.chunked = coding == "chunked"
        self._endless = until_close and not self.chunked and length is None
        self.length = None if self.chunked or self._endless else int(length or 0)
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
        if self._endless:
            data = self._wire.receive(n)
            self.ended = not data
            return data
        if self.chunked and not self._left and not self._next_chunk():
            return b""
        data = self._wire.receive(min(n, self._left))
        if not data:
            raise Disconnected("the connection closed in the middle of the body")
        self._left -= len(data)
        if not self._left:
            if self.chunked:
                if self._wire.line():
                    raise Malformed("a chunk is longer than it says")
            else:
                self.ended = True
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
