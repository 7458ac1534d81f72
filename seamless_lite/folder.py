"""Buffer stores without HTTP: ``Folder`` (a directory, the one that Seamless 1.x uses) and ``MemoryBuffers``.

Both, and ``hashserver.HashserverClient``, have the same methods; ``MemoryBuffers`` documents them.

A folder holds ``ab/abcdef...`` (layout "prefix", marked by the file ``.HASHSERVER_PREFIX``) or ``abcdef...``
(layout "flat"); readers look in both places.  A buffer may also be stored compressed, as ``.zst`` or ``.gz``,
with its length in ``.BUFFERLENGTH``.  Temporary files are called ``<name>-XXXXXXXX`` and lie in the folder
where the file will be; only whole, verified and synced files get their final name.

What is read is verified: ``get`` always, ``open`` and ``path`` when this process reads the file for the first
time; it then remembers device, inode, time and size.  A damaged file is moved aside to ``<name>.CORRUPT``.
"""
import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import time
import typing as _t

from . import compressed
from .checksum import CHUNK, Checksum, is_checksum
from .compressed import expand, hash_pieces, identify, is_whole, load, read_source, source_size
from .durable import FOLDER_MODE, MISSING, make_folder, make_folders, remove_file, set_mode, sync_and_close, sync_folder
from .errors import CorruptBufferError, SeamlessError

MARKER = ".HASHSERVER_PREFIX"
BUFFER_MODE = 0o444
SUFFIXES = ("",) + tuple(compressed.ENCODINGS)
POLL_S = 0.05
STALE_S = 24 * 3600.0
SYNC_TOGETHER = 64

_TEMPORARY = re.compile(r"[0-9a-f]{64}(\.zst|\.gz|\.BUFFERLENGTH)?-[0-9a-f]{8}\Z|\.HASHSERVER_PREFIX-[0-9a-f]{8}\Z")


class MemoryBuffers:
    """Buffers in the memory of this process.  Safe from several threads, as all stores are."""
    #: True if each call is a message to another process, perhaps far away: then ask for many at once.
    remote = False

    def __init__(self):
        self._buffers: _t.Dict[str, bytes] = {}

    def get(self, checksum) -> _t.Optional[bytes]:
        """The buffer, verified; None if it is not there (a damaged one is not there)."""
        return self._buffers.get(Checksum(checksum))

    def put(self, data: bytes) -> Checksum:
        """Store ``data``; durable on return.  What is already there is not written again."""
        checksum = Checksum.of(data)
        self._buffers.setdefault(checksum, bytes(data))
        return checksum

    def put_many(self, datas: _t.Iterable[bytes]) -> _t.List[Checksum]:
        """Store all; durable on return, and cheaper than one by one."""
        return [self.put(data) for data in datas]

    def put_file(self, path, checksum=None, move: bool = False) -> Checksum:
        """Store the content of the file ``path``, in pieces; durable on return.

        ``checksum`` is what the content is expected to hash to; for a ``.gz`` or ``.zst`` file it may also be
        that of the decompressed content, which is then what is stored.  ``move``: the file may be renamed
        into the store.  Raises ``CorruptBufferError`` if what is read does not hash to ``checksum``.
        """
        checksum, suffix = identify(path, checksum)
        data = b"".join(read_source(path, suffix))
        if Checksum.of(data) != checksum:
            raise CorruptBufferError("the file %s changed while it was read" % path)
        return self.put(data)

    def put_open(self, checksum, file: _t.BinaryIO) -> None:
        """Store the rest of the open ``file``, in pieces, without asking first whether it is there.

        Raises ``CorruptBufferError`` if that does not hash to ``checksum``.
        """
        data = file.read()
        if Checksum.of(data) != Checksum(checksum):
            raise CorruptBufferError("the data does not hash to %s" % checksum)
        self.put(data)

    def has(self, checksums: _t.Iterable) -> _t.List[bool]:
        """For each checksum, whether it is there."""
        return [Checksum(checksum) in self._buffers for checksum in checksums]

    def get_small(self, checksums: _t.Iterable, largest: int, total: int) -> _t.Dict[Checksum, _t.Optional[bytes]]:
        """Those that are there: with their bytes, or None if these are more than ``largest``, or do not fit into ``total``."""
        found: _t.Dict[Checksum, _t.Optional[bytes]] = {}
        for checksum in dict.fromkeys(map(Checksum, checksums)):
            length = self.length(checksum)
            fits = length is not None and length <= min(largest, total)
            data = self.get(checksum) if fits else None
            total -= len(data or b"")
            if data is not None or length is not None and not fits:     # else it is damaged
                found[checksum] = data
        return found

    def open(self, checksum) -> _t.Optional[_t.BinaryIO]:
        """A seekable binary file with the (uncompressed) content, for the caller to close; None if not there."""
        data = self.get(checksum)
        return None if data is None else io.BytesIO(data)

    def path(self, checksum) -> _t.Optional[str]:
        """A plain file on this machine with exactly this content, to be read only; None if there is no such file."""
        return None

    def length(self, checksum) -> _t.Optional[int]:
        """The number of bytes; None if not there."""
        data = self.get(checksum)
        return None if data is None else len(data)

    def lengths(self, checksums: _t.Iterable) -> _t.List[_t.Optional[int]]:
        """``length`` of each."""
        return [self.length(checksum) for checksum in checksums]

    def close(self) -> None:
        """Give back what is held open."""


class Folder:
    """Buffers in the directory ``directory``, which need not exist yet: the first ``put`` makes it.

    ``layout`` is "prefix", "flat" or None (what is there already, else prefix); ``extra_dirs`` are read-only
    fallbacks; a reader that misses a buffer waits while a lock file younger than ``lock_timeout_s`` exists.
    There is no state that a fork or another thread could break.
    """

    def __init__(self, directory, writable: bool = True, layout: _t.Optional[str] = None, extra_dirs=(),
                 lock_timeout_s: float = 120.0):
        if layout not in (None, "prefix", "flat"):
            raise SeamlessError("the layout of a buffer folder is prefix or flat, not %r" % (layout,))
        self.directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
        self.writable = writable
        self.lock_timeout_s = lock_timeout_s
        self._layout = layout
        self._directories = [self.directory] + [os.path.abspath(os.path.expanduser(extra)) for extra in extra_dirs]
        self._verified: _t.Dict[_t.Tuple[int, int], tuple] = {}

    # ---- reading

    def get(self, checksum) -> _t.Optional[bytes]:
        return self._find(Checksum(checksum), load)

    def open(self, checksum) -> _t.Optional[_t.BinaryIO]:
        """As ``MemoryBuffers.open``; a compressed buffer is expanded into a nameless temporary file."""
        return self._find(Checksum(checksum), self._open)

    def path(self, checksum) -> _t.Optional[str]:
        """As ``MemoryBuffers.path``; None for a buffer that is only there compressed."""
        return self._find(Checksum(checksum), self._path, suffixes=("",))

    def has(self, checksums: _t.Iterable) -> _t.List[bool]:
        """As ``MemoryBuffers.has``: whether a file is there, unread."""
        return [any(map(os.path.exists, self._paths(Checksum(checksum)))) for checksum in checksums]

    def forms(self, checksum) -> _t.Dict[str, str]:
        """suffix ("", ".zst", ".gz") -> path of the forms in which the buffer is stored."""
        forms: _t.Dict[str, str] = {}
        for path in filter(os.path.exists, self._paths(Checksum(checksum))):
            forms.setdefault(os.path.splitext(path)[1], path)
        return forms

    def length(self, checksum) -> _t.Optional[int]:
        for suffix, path in self.forms(checksum).items():
            if not suffix:
                return os.stat(path).st_size
            try:
                with open(path[:-len(suffix)] + ".BUFFERLENGTH", "rb") as file:
                    return int(file.read(32))
            except (*MISSING, ValueError):
                return sum(map(len, compressed.pieces(path, suffix)))
        return None

    remote, close = False, MemoryBuffers.close
    get_small, lengths = MemoryBuffers.get_small, MemoryBuffers.lengths

    def _paths(self, checksum, suffixes=SUFFIXES):
        """Where the buffer may be, in the order in which it is looked for."""
        for suffix in suffixes:
            for directory in self._directories:
                yield "%s/%s/%s%s" % (directory, checksum[:2], checksum, suffix)
                yield "%s/%s%s" % (directory, checksum, suffix)

    def _find(self, checksum, use, suffixes=SUFFIXES):
        """``use(path, suffix, checksum)`` of the first stored form for which it is not None; else None.

        ``use`` returns None when the content is not that of ``checksum``.  Waits while there is a lock.
        """
        deadline = time.monotonic() + self.lock_timeout_s
        while True:
            damaged = []
            for path in self._paths(checksum, suffixes):
                try:
                    found = use(path, os.path.splitext(path)[1], checksum)
                except MISSING:
                    continue
                except OSError as exc:
                    raise SeamlessError("the buffer %s cannot be read: %s" % (path, exc.strerror)) from exc
                if found is not None:
                    return found
                damaged.append(path)
            if not self._locked(checksum) or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        for path in damaged:
            self._set_aside(path, checksum)
        return None

    def _locked(self, checksum) -> bool:
        for path in self._paths(checksum, ("",)):
            for name in (os.path.join(os.path.dirname(path), ".LOCK"), path + ".LOCK"):
                with contextlib.suppress(*MISSING):
                    if time.time() - os.stat(name).st_mtime < self.lock_timeout_s:
                        return True
        return False

    def _open(self, path, suffix, checksum):
        if suffix:
            return expand(path, suffix, checksum)
        file = open(path, "rb")
        try:
            status = os.fstat(file.fileno())
            if self._verified.get((status.st_dev, status.st_ino)) == (status.st_mtime_ns, status.st_size, checksum):
                return file
            if checksum == hash_pieces(iter(lambda: file.read(CHUNK), b"")):
                self._remember(status, checksum)
                file.seek(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _path(self, path, suffix, checksum):
        file = self._open(path, suffix, checksum)
        if file is None:
            return None
        file.close()
        return path

    def _remember(self, status, checksum) -> None:
        if len(self._verified) >= 10000:        # about 2 MB; forgetting costs one more verification
            self._verified.clear()
        self._verified[status.st_dev, status.st_ino] = (status.st_mtime_ns, status.st_size, checksum)

    def _set_aside(self, path, checksum) -> None:
        """Rename a damaged file, so that the buffer can be stored again."""
        try:
            if is_whole(path, os.path.splitext(path)[1], checksum):
                return                          # somebody has repaired it meanwhile
            if self.writable and path.startswith(self.directory + os.sep):
                os.replace(path, path + ".CORRUPT")
                log().warning("the stored buffer %s was damaged; it is now %s.CORRUPT", path, path)
                return
        except MISSING:
            return
        except OSError as exc:
            log().debug("%s cannot be moved aside: %s", path, exc)
        log().warning("the stored buffer %s is damaged; it is ignored", path)

    # ---- writing

    def put(self, data: bytes) -> Checksum:
        """As ``MemoryBuffers.put``.  Raises ``SeamlessError``, a sentence, if the disk is full or not writable."""
        return self.put_many([data])[0]

    def put_many(self, datas: _t.Iterable[bytes]) -> _t.List[Checksum]:
        """As ``MemoryBuffers.put_many``: all are synced, then all renamed, then each folder is synced once."""
        checksums = []
        with _Batch(self) as batch:
            for data in datas:
                checksums.append(Checksum.of(data))
                if not self._stored(checksums[-1], len(data)):
                    batch.write(checksums[-1], (data,))
        return checksums

    def put_file(self, path, checksum=None, move: bool = False) -> Checksum:
        """As ``MemoryBuffers.put_file``.  Without ``checksum`` the file is read twice: to name it, and to copy it."""
        suffix = ""
        if checksum is None or move or os.path.splitext(path)[1] in compressed.ENCODINGS:
            checksum, suffix = identify(path, checksum)
        checksum = Checksum(checksum)
        if not self._stored(checksum, None if suffix else source_size(path)):
            with _Batch(self) as batch:
                if suffix or not (move and batch.adopt(path, checksum)):
                    batch.write(checksum, read_source(path, suffix))
        return checksum

    def put_open(self, checksum, file: _t.BinaryIO) -> None:
        self.put_stream(checksum, iter(lambda: file.read(CHUNK), b""))

    def put_stream(self, checksum, pieces: _t.Iterable[bytes], suffix: str = "") -> bool:
        """Store the buffer ``checksum`` from ``pieces`` of its plain form, or of its compressed form.

        Durable on return; False if it was there already (then ``pieces`` is not read).
        Raises ``CorruptBufferError`` if the content does not hash to ``checksum``.
        """
        checksum = Checksum(checksum)
        if self._stored(checksum):
            return False
        with _Batch(self) as batch:
            batch.write(checksum, pieces, suffix)
        return True

    def remove_stale(self, older_than_s: float = STALE_S) -> int:
        """Remove temporary files that a killed writer left behind; says how many.  Reads every folder."""
        removed = 0
        for folder, subfolders, names in os.walk(self.directory):
            subfolders[:] = [name for name in subfolders if folder == self.directory and len(name) == 2]
            for name in filter(_TEMPORARY.match, names):
                path = os.path.join(folder, name)
                try:
                    if time.time() - os.stat(path).st_mtime > older_than_s:
                        os.unlink(path)
                        removed += 1
                except OSError as exc:
                    log().debug("the stale file %s cannot be removed: %s", path, exc)
        return removed

    def _stored(self, checksum, length=None) -> bool:
        """Whether the buffer is in the main directory; a plain file of another length than ``length`` does not count."""
        for path in self._paths(checksum):
            if path.startswith(self.directory + os.sep):
                try:
                    status = os.stat(path)
                except OSError:
                    continue                    # if it is not just missing, writing will say what is wrong
                if length is None or not path.endswith(checksum) or status.st_size == length:
                    return True
        return False

    def prepare(self) -> None:
        """Make the folder and its marker if they are not there.  Raises ``SeamlessError``, as ``put`` does."""
        with _Batch(self) as batch:
            batch.prepare()

    def _find_layout(self) -> str:
        """The layout in which to write; makes the folder."""
        if os.path.exists(os.path.join(self.directory, MARKER)):
            layout = "prefix"
        else:
            make_folders(self.directory)
            with os.scandir(self.directory) as entries:
                flat = any(is_checksum(entry.name[:64]) for entry in entries)
            layout = "flat" if flat else self._layout or "prefix"
        if self._layout not in (None, layout):
            raise SeamlessError("the buffer folder %s has the layout %s: it cannot be used with the layout %s"
                                % (self.directory, layout, self._layout))
        return layout


class _Batch:
    """Files on their way into a folder: published together at the end of the ``with`` block, or all removed."""

    def __init__(self, folder: Folder):
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
            self._folder._remember(status, checksum)

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
        self._folder._remember(status, checksum)
        return True

    def prepare(self) -> None:
        """Find out where to write, making what is missing."""
        self._layout = self._folder._find_layout()
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


def log():
    """The logger of the buffer stores."""
    import logging          # a tenth of a cached run, and there is hardly ever something to say
    return logging.getLogger(__name__)
