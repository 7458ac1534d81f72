"""A buffer store behind a service, some of whose buffers can also be read here, from a folder.

Used on the nodes of a cluster that see the folder of buffers: what is read comes from the folder, or, where that is not (yet)
there, from the service; what is written goes to the service.  Every buffer that is read is verified, so a folder
that is out of date or somebody else's costs time and nothing else.
"""
import os
import typing as _t

from .folder import Folder

MARKER = ".seamless-folder"


class NearBuffers:
    """``near`` is a folder, ``base`` the store itself; see ``MemoryBuffers`` for what each method promises."""

    def __init__(self, near: Folder, base):
        self._near, self._base = near, base

    def __getattr__(self, name: str):
        return getattr(self._base, name)

    def _first(self, method: str, checksum):
        found = getattr(self._near, method)(checksum)
        return getattr(self._base, method)(checksum) if found is None else found

    def get(self, checksum):
        return self._first("get", checksum)

    def open(self, checksum):
        return self._first("open", checksum)

    def path(self, checksum):
        return self._first("path", checksum)

    def length(self, checksum):
        return self._first("length", checksum)

    def has(self, checksums):
        return self._filled("has", checksums, False)

    def lengths(self, checksums):
        return self._filled("lengths", checksums, None)

    def _filled(self, method: str, checksums, nothing) -> list:
        """The answers of the folder, and where it says ``nothing``, those of the service."""
        names = list(checksums)
        found = list(getattr(self._near, method)(names))
        missing = [n for n, answer in enumerate(found) if answer is nothing]
        if missing:
            for n, answer in zip(missing, getattr(self._base, method)([names[n] for n in missing])):
                found[n] = answer
        return found

    def get_small(self, checksums, largest, total):
        names = list(checksums)
        found = dict(self._near.get_small(names, largest, total))
        missing = [name for name in names if name not in found]
        if missing:
            found.update(self._base.get_small(missing, largest, total - sum(len(data or b"") for data in found.values())))
        return found

    def close(self) -> None:
        """Close both."""
        self._near.close()
        self._base.close()


def mark(directory: str) -> _t.Optional[str]:
    """The word that tells this folder from all others, which is written into it if need be; None if that is not possible."""
    path = os.path.join(directory, MARKER)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        aside = "%s.%d" % (path, os.getpid())
        if not os.path.exists(path):
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "w") as file:
                file.write(os.urandom(16).hex())
            try:
                os.link(aside, path)        # unlike a rename, it leaves one that somebody else has just made
            finally:
                os.unlink(aside)
    except FileExistsError:
        pass
    except OSError:
        return None
    return read_mark(directory)


def read_mark(directory: str) -> _t.Optional[str]:
    """The word in the folder; None if there is none."""
    try:
        with open(os.path.join(directory, MARKER)) as file:
            return file.read(100) or None
    except (OSError, UnicodeDecodeError):
        return None
