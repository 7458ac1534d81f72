"""The output of a job as a file: reading it piece by piece or only its end, and removing it."""
import contextlib
import os
import typing as _t

#: So much of the end of a job's output goes into its outcome.
TAIL_BYTES = 1 << 16
PIECE = 1 << 20


def read_log(path: _t.Optional[str], offset: int) -> _t.Tuple[int, bytes, int]:
    """(new offset, data from ``offset`` on, size); a log that is shorter was begun anew.  No file: an empty log."""
    if path is None:
        return offset, b"", 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = offset if offset <= size else 0
            file.seek(start)
            data = file.read(PIECE)
            return start + len(data), data, size
    except OSError:                         # removed: nothing more will come
        return offset, b"", 0


def tail(path: _t.Optional[str], n: int = TAIL_BYTES) -> str:
    """The last ``n`` bytes of a job's output as text; "" if there is no file."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - n))
            return file.read(n).decode("utf-8", "replace")
    except OSError:
        return ""


def remove_file(path: str) -> None:
    """Remove a file; somebody may have done so already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
