"""``Batch``: files being written into a buffer folder.

    written aside (``<name>-XXXXXXXX``, where the file will be) -> verified -> synced, many at once -> renamed -> folders synced
"""
import contextlib
import errno
import hashlib
import os
import stat
import typing as _t

from . import compressed
from .checksum import is_checksum
from .durable import FOLDER_MODE, in_use, make_folder, remove_file, set_mode, sync_and_close, sync_folder
from .errors import CorruptBufferError, SeamlessError

MARKER = ".HASHSERVER_PREFIX"
BUFFER_MODE = 0o444
SYNC_TOGETHER = 64


class Batch:
    """Files on their way into ``folder`` (a ``Folder``): published together at the end of the ``with`` block, or all removed."""

    def __init__(self, folder):
        self._folder = folder
        self._temporaries: _t.Dict[str, str] = {}       # temporary path -> final path
        self._finals: _t.Set[str] = set()
        self._unsynced: _t.List[_t.BinaryIO] = []
        self._synced: _t.Dict[str, None] = {}           # folders to sync, in this order
        self._layout = ""

    def __enter__(self):
        if not self._folder.writable:
            raise SeamlessError("the buffer folder %s is open for reading only" % self._folder.directory)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self._publish()
        except OSError as exc:
            raise self._sentence(exc) from exc
        finally:
            for file in self._unsynced:     # only after an error
                with contextlib.suppress(OSError):
                    file.close()
            for temporary in self._temporaries:
                remove_file(temporary)
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise self._sentence(error) from error

    def write(self, checksum, pieces, suffix="") -> None:
        """Write one buffer aside, verified."""
        final = self._final(checksum) + suffix
        if final in self._finals:
            return
        sha = hashlib.sha256()

        def hashed():
            for piece in pieces:
                sha.update(piece)
                yield piece
        temporary, status = self._write_aside(final, hashed())
        if suffix:
            self._check_compressed(temporary, checksum, suffix)
        elif sha.hexdigest() != checksum:
            raise CorruptBufferError("the data does not hash to %s: it is incomplete, or changed while it was read"
                                     % checksum)
        else:
            self._folder.remember(status, checksum)

    def make(self, name: str, make: _t.Callable[[str], None]) -> None:
        """Let ``make(path)`` make the file ``name`` (such as ``<checksum>.gz``) aside, synced and verified."""
        final = self._final(name[:64]) + name[64:]
        temporary = "%s-%s" % (final, os.urandom(4).hex())
        self._temporaries[temporary] = final
        make(temporary)

    def adopt(self, path, checksum) -> bool:
        """Rename the file ``path``, which has been verified, into the store; False if that is not safe to do."""
        final = self._final(checksum)
        status = os.lstat(path)
        if (not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid()
                or status.st_dev != os.stat(os.path.dirname(final)).st_dev):
            return False
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.replace(path, final)
            set_mode(fd, BUFFER_MODE)
        except OSError as exc:
            if exc.errno != errno.EXDEV:        # a bind mount: the same device, and yet no rename
                raise
            return False
        finally:
            os.close(fd)
        in_use(final)                           # the file itself may be old
        self._folder.remember(status, checksum)
        return True

    def prepare(self) -> None:
        """Find out where to write, making what is missing."""
        self._layout = self._folder.find_layout()
        marker = os.path.join(self._folder.directory, MARKER)
        if self._layout == "prefix" and not os.path.exists(marker):
            self._write_aside(marker, (b"1\n",))
            self._synced[self._folder.directory] = None

    def _final(self, checksum) -> str:
        if not self._layout:
            self.prepare()
        folder = self._folder.directory
        if self._layout == "prefix":
            folder = os.path.join(folder, checksum[:2])
            if folder not in self._synced and make_folder(folder, FOLDER_MODE):
                self._synced[self._folder.directory] = None
        self._synced.setdefault(folder)
        return os.path.join(folder, checksum)

    def _write_aside(self, final, pieces):
        """(path, status) of a temporary file with this content; it is synced later, together with others."""
        temporary = "%s-%s" % (final, os.urandom(4).hex())
        self._finals.add(final)
        self._temporaries[temporary] = final            # known before the first byte, so that it is always removed
        file = open(temporary, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))
        self._unsynced.append(file)
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[file.write(left):]
        set_mode(file.fileno(), BUFFER_MODE)
        status = os.fstat(file.fileno())
        if len(self._unsynced) >= SYNC_TOGETHER:
            self._sync()
        return temporary, status

    def _sync(self) -> None:
        """Sync what is written.  A disk syncs many files at once about three times as fast as one by one."""
        if len(self._unsynced) < 4:
            for file in self._unsynced:
                sync_and_close(file)
        else:
            from concurrent.futures import ThreadPoolExecutor      # slow to import, and most batches are small
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(sync_and_close, self._unsynced))
        self._unsynced.clear()

    def _check_compressed(self, path, checksum, suffix) -> None:
        sha, length = hashlib.sha256(), 0
        for piece in compressed.pieces(path, suffix):
            sha.update(piece)
            length += len(piece)
        if sha.hexdigest() != checksum:
            raise CorruptBufferError("the compressed data does not expand to %s" % checksum)
        self._write_aside(self._final(checksum) + ".BUFFERLENGTH", (b"%d" % length,))

    def _publish(self) -> None:
        self._sync()
        for temporary, final in list(self._temporaries.items()):
            os.replace(temporary, final)
            del self._temporaries[temporary]
            if is_checksum(os.path.basename(final)):
                remove_file(final + ".BUFFERLENGTH")    # which only belongs to a compressed form without a plain one
        for folder in self._synced:
            sync_folder(folder)

    def _sentence(self, exc: OSError) -> SeamlessError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "free some space there, or choose another folder"
        elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            cure = "ask its owner for write permission, or choose another folder"
        else:
            cure = "look at the folder"
        return SeamlessError("the buffer folder %s cannot be written (%s): %s" % (self._folder.directory, exc.strerror, cure))
