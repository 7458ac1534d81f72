"""``Progress``: one line on stderr about a transfer that takes a while, if stderr is a terminal and a person looks.

    seamless_lite: upload 12.3 MB of 40 MB, about 5 s left
"""
import os
import sys
import threading
import time
import typing as _t

#: Smaller transfers are over before anybody could read about them.
SHOWN_BYTES = 4_000_000
_EVERY_S = 0.2


class Progress:
    """A transfer of ``total`` bytes.  ``with Progress("upload", n, who) as progress: progress.add(...)``.

    ``who`` begins the line; None: nothing is ever shown.  Safe from several threads.
    """

    def __init__(self, what: str, total: int, who: _t.Optional[str]):
        self._what, self._total, self._who = what, total, who
        self._shows = who is not None and total >= SHOWN_BYTES and is_watched()
        self._done = 0
        self._began = time.monotonic()
        self._shown = self._began
        self._lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        """So many bytes more have been transferred; negative if they must be again."""
        with self._lock:
            self._done += n_bytes
            now = time.monotonic()
            if not self._shows or now - self._shown < _EVERY_S or self._done <= 0:
                return
            self._shown = now
            left_s = (now - self._began) / self._done * max(0, self._total - self._done)
            sys.stderr.write("\r%s: %s %s of %s, about %d s left \033[K" % (
                self._who, self._what, size_text(self._done), size_text(self._total), left_s + 0.5))
            sys.stderr.flush()

    def reading(self, file: _t.BinaryIO) -> _t.Any:
        """``file``, of which is counted what was read from it."""
        return _Counted(file, self.add, True) if self._shows else file

    def writing(self, file: _t.BinaryIO) -> _t.Any:
        """``file``, of which is counted what was written to it."""
        return _Counted(file, self.add, False) if self._shows else file

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        if self._shows and self._shown > self._began:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


class _Counted:
    """A binary file that tells how far it is: what is sent again after a cut does not count twice."""
    raw = None                      # or the kernel would send the file, and nobody count

    def __init__(self, file: _t.BinaryIO, add: _t.Callable[[int], None], reads: bool):
        self._file, self._add, self._reads, self._at = file, add, reads, file.tell()

    def read(self, n: int = -1) -> bytes:
        data = self._file.read(n)
        if self._reads:
            self._move(self._at + len(data))
        return data

    def write(self, data) -> int:
        self._move(self._at + len(data))
        return self._file.write(data)

    def truncate(self) -> int:
        self._move(self._file.tell())
        return self._file.truncate()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = self._file.seek(offset, whence)
        if self._reads and whence == os.SEEK_SET:
            self._move(position)
        return position

    def _move(self, position: int) -> None:
        self._add(position - self._at)
        self._at = position

    def __getattr__(self, name):
        return getattr(self._file, name)


def is_watched() -> bool:
    """True if a person sees what is written to stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


def line(text: str) -> None:
    """A line of its own, also if another one is being rewritten there."""
    sys.stderr.write("\r\033[K%s\n" % text)
    sys.stderr.flush()


def size_text(size: float) -> str:
    """12345678 -> "12.35 MB"."""
    value, unit = float(size), ""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return "%.4g %s" % (value, unit)
