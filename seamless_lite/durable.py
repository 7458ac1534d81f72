"""Folders and names that survive a crash, and the last use of files: what the stores share about files."""
import errno
import os
import time

FOLDER_MODE, PRIVATE_FOLDER_MODE = 0o3775, 0o700
MISSING = (FileNotFoundError, NotADirectoryError)
#: The last use of a buffer is the access time of its file, which is set at most once in so long.
NOTED_S = 600.0
#: path of somebody else's file, whose last use cannot be set -> when to try that again; on the clock ``time.monotonic``
_refused: dict = {}
_MOST_REFUSED = 10000


def make_folders(directory: str) -> None:
    """Make ``directory`` and its missing parents, durably.

    They are private (0700), unless they are made in a folder that is meant for a group (writable for it, and
    set-group-id): then they get the same mode as the folders inside a store, 03775.
    """
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    shared = missing and os.stat(directory).st_mode & 0o2020 == 0o2020
    for folder in reversed(missing):
        if make_folder(folder, FOLDER_MODE if shared else PRIVATE_FOLDER_MODE):
            sync_folder(os.path.dirname(folder))


def make_folder(path: str, mode: int) -> bool:
    """Make one folder; False if it was there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    set_mode(path, mode)        # mkdir's own mode is cut by the umask
    return True


def set_mode(path, mode: int) -> None:
    """chmod of a path or descriptor of our own, where the file system has modes at all."""
    try:
        os.chmod(path, mode)
    except PermissionError:
        pass                    # it is ours, so this is a file system that has no modes (some network shares)


def sync_folder(path: str) -> None:
    """Make the names in the folder ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:       # some network shares do not sync folders
            raise
    finally:
        os.close(fd)


def sync_and_close(file) -> None:
    """Make the content of a written file durable."""
    os.fsync(file.fileno())
    file.close()


def remove_file(path: str) -> None:
    """Remove ``path`` if it is there."""
    try:
        os.unlink(path)
    except MISSING:
        pass


def last_use(status: os.stat_result) -> float:
    """When a buffer was last used or written, in seconds since 1970."""
    return max(status.st_atime, status.st_mtime)


def open_unnoticed(path: str):
    """Open the file for reading; its access time, which tells when a buffer was used, stays as it is if it can."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOATIME", 0))
    except PermissionError:                 # somebody else's
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return open(fd, "rb", buffering=0)


def in_use(path: str) -> bool:
    """Note that the file is used now; False if it is not there."""
    try:
        status = os.stat(path)
        if time.time() - last_use(status) > NOTED_S and _refused.get(path, 0.0) <= time.monotonic():
            try:
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
            except PermissionError:             # somebody else's: then the system notes, once a day, that it is read
                if len(_refused) >= _MOST_REFUSED:
                    _refused.clear()
                _refused[path] = time.monotonic() + NOTED_S
                with open(path, "rb", buffering=0) as file:
                    file.read(1)
    except OSError as exc:
        return not isinstance(exc, MISSING) and os.path.exists(path)
    return True
