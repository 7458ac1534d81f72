"""Buffer stores without HTTP: ``Folder`` (a directory, the one that Seamless 1.x uses) and ``MemoryBuffers``.

Both, and ``hashserver.HashserverClient``, have the same methods; ``MemoryBuffers`` documents them.

A folder holds ``ab/abcdef...`` (layout "prefix", marked by the file ``.HASHSERVER_PREFIX``) or ``abcdef...``
(layout "flat"); readers look in both places.  A buffer may also be stored compressed, as ``.zst`` or ``.gz``,
with its length in ``.BUFFERLENGTH``.  Temporary files are called ``<name>-XXXXXXXX`` and lie in the folder
where the file will be; only whole, verified and synced files get their final name.

What is read is verified: ``get`` always, ``open`` and ``path`` when this process reads the file for the first
time; it then remembers device, inode, time and size.  A damaged file is moved aside to ``<name>.CORRUPT``; in ``extra_dirs`` it is
ignored until it changes, by every process that writes the same folder (``IGNORED``).
"""
import contextlib
import io
import os
import re
import time
import typing as _t

from . import compressed
from .checksum import CHUNK, Checksum, is_checksum
from .compressed import expand, hash_pieces, identify, is_whole, load, read_source, source_size
from .durable import MISSING, in_use, make_folders
from .errors import CorruptBufferError, SeamlessError
from .storing import MARKER, Batch

SUFFIXES = ("",) + tuple(compressed.ENCODINGS)
POLL_S = 0.05
STALE_S = 24 * 3600.0
_GROUP = 16         # so many are looked for before it is asked whether ``seamless-gc`` is there, which stays 0.1 s at least
#: While this file is there, ``seamless-gc`` deletes: what it renames to ``ASIDE`` may be taken back (see gc.py).
COLLECTING, ASIDE = ".COLLECTING", ".GC"
#: Lines of ``_state`` and path of what is damaged or cannot be read in ``extra_dirs``; looked at once in so long, for hits to stay fast.
IGNORED, LEARN_S = ".IGNORED", 0.001

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

    peek = get

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
        self._ignored: _t.Dict[str, str] = {}           # path -> ``_state``
        self._ignored_file, self._learned_s = os.path.join(self.directory, IGNORED), -LEARN_S

    # ---- reading

    def get(self, checksum) -> _t.Optional[bytes]:
        return self._find(Checksum(checksum), load)

    def peek(self, checksum) -> _t.Optional[bytes]:
        """As ``get``, but without a trace: no use is noted, nothing is moved aside; None also for what cannot be read."""
        for suffix, path in self.forms(checksum).items():
            with contextlib.suppress(OSError, SeamlessError):
                data = b"".join(compressed.pieces(path, suffix))
                if Checksum.of(data) == checksum:
                    return data
        return None

    def open(self, checksum) -> _t.Optional[_t.BinaryIO]:
        """As ``MemoryBuffers.open``; a compressed buffer is expanded into a nameless temporary file."""
        return self._find(Checksum(checksum), self._open)

    def path(self, checksum) -> _t.Optional[str]:
        """As ``MemoryBuffers.path``; None for a buffer that is only there compressed."""
        return self._find(Checksum(checksum), self._path, suffixes=("",))

    def has(self, checksums: _t.Iterable) -> _t.List[bool]:
        """As ``MemoryBuffers.has``: whether a file is there, unread.  One that is there is in use now: it stays for a while."""
        names, found = list(map(Checksum, checksums)), []
        self._learn()
        look = in_use if not self._ignored else lambda path: not self._is_ignored(path) and in_use(path)
        for start in range(0, len(names), _GROUP):
            part = names[start:start + _GROUP]
            there = [any(map(look, self._paths(name))) for name in part]
            if not all(there) and self._is_collecting():
                there = [known or self._rescue(name) and any(map(look, self._paths(name))) for known, name in zip(there, part)]
            found += there
        return found

    def forms(self, checksum) -> _t.Dict[str, str]:
        """suffix ("", ".zst", ".gz") -> path of the forms in which the buffer is stored."""
        forms: _t.Dict[str, str] = {}
        for path in filter(os.path.exists, self._paths(Checksum(checksum))):
            forms.setdefault(os.path.splitext(path)[1], path)
        return forms

    def length(self, checksum) -> _t.Optional[int]:
        self._learn()
        return self._find(Checksum(checksum), self._length, wait=False)

    remote, close = False, MemoryBuffers.close
    get_small, lengths = MemoryBuffers.get_small, MemoryBuffers.lengths

    def _paths(self, checksum, suffixes=SUFFIXES):
        """Where the buffer may be, in the order in which it is looked for."""
        for suffix in suffixes:
            for directory in self._directories:
                yield "%s/%s/%s%s" % (directory, checksum[:2], checksum, suffix)
                yield "%s/%s%s" % (directory, checksum, suffix)

    def _find(self, checksum, use, suffixes=SUFFIXES, wait: bool = True):
        """``use(path, suffix, checksum)`` of the first stored form for which it is not None; else None.

        ``use`` returns None when the content is not that of ``checksum``.  Waits while there is a lock, unless told not to.
        """
        deadline, rescued = time.monotonic() + self.lock_timeout_s, False
        while True:
            damaged, unreadable = [], None
            for path in self._paths(checksum, suffixes):
                if self._is_ignored(path):
                    continue
                try:
                    found = use(path, os.path.splitext(path)[1], checksum)
                except MISSING:
                    continue
                except OSError as exc:      # another folder may have it
                    if path.startswith(self.directory + os.sep):
                        unreadable = unreadable or SeamlessError("the buffer %s cannot be read: %s" % (path, exc.strerror))
                        continue
                    found = None
                if found is not None and (in_use(path) or found != path):   # a path must be there still
                    return found
                if found is None:
                    damaged.append(path)
            if unreadable is not None:
                raise unreadable
            if not (rescued or damaged) and self._rescue(checksum):
                rescued = True
                continue
            if not wait or not self._locked(checksum) or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        for path in damaged:
            self._set_aside(path, checksum)
        return None

    def _is_collecting(self) -> bool:
        return os.path.exists("%s/%s" % (self.directory, COLLECTING))

    def _rescue(self, checksum) -> bool:
        """If the buffer is missing because ``seamless-gc`` is about to delete it, take it back; then it must be looked for again."""
        if not self._is_collecting():
            return False
        for path in self._paths(checksum):
            if path.startswith(self.directory + os.sep):
                with contextlib.suppress(OSError):
                    os.rename(path + ASIDE, path)
        return True                             # it may have been put back by the other side

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
                self.remember(status, checksum)
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

    @staticmethod
    def _length(path, suffix, checksum):
        status = os.stat(path)
        if not suffix:
            return status.st_size
        try:
            with open(path[:-len(suffix)] + ".BUFFERLENGTH", "rb") as file:
                return int(file.read(32))
        except (*MISSING, ValueError):
            return sum(map(len, compressed.pieces(path, suffix)))

    def remember(self, status, checksum) -> None:
        """Note that the file with this ``os.stat`` result was verified."""
        if len(self._verified) >= 10000:        # about 2 MB; forgetting costs one more verification
            self._verified.clear()
        self._verified[status.st_dev, status.st_ino] = (status.st_mtime_ns, status.st_size, checksum)

    def _set_aside(self, path, checksum) -> None:
        """Rename a damaged file, so that the buffer can be stored again; one that is not ours is ignored from now on, by all."""
        self._learn()
        if self._is_ignored(path):
            return                              # another process has said so
        state, problem, is_ours = _state(path), "is damaged", self.writable and path.startswith(self.directory + os.sep)
        try:
            if is_whole(path, os.path.splitext(path)[1], checksum):
                return                          # somebody has repaired it meanwhile
            if is_ours:
                os.replace(path, path + ".CORRUPT")
                log().warning("the stored buffer %s was damaged; it is now %s.CORRUPT", path, path)
                return
        except MISSING:
            return
        except OSError as exc:
            problem = "is damaged or cannot be read (%s)" % exc.strerror
        log().warning("the stored buffer %s %s; it is ignored", path, problem)
        if not is_ours:                         # ours, if it cannot be renamed, cannot be replaced either: it counts as stored
            self._ignored[path] = state
            with contextlib.suppress(OSError, SeamlessError):
                self.prepare()
                with open(self._ignored_file, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write("%s %s\n" % (state, path))

    def _is_ignored(self, path) -> bool:
        return path in self._ignored and self._ignored[path] == _state(path)

    def _learn(self) -> None:
        """Read what other processes ignore, unless that was done just now."""
        if len(self._directories) > 1 and time.monotonic() - self._learned_s >= LEARN_S:
            self._learned_s = time.monotonic()
            with contextlib.suppress(OSError), open(self._ignored_file, encoding="utf-8", errors="surrogateescape") as file:
                self._ignored.update(line.rstrip("\n").partition(" ")[::-2] for line in file)

    # ---- writing

    def put(self, data: bytes) -> Checksum:
        """As ``MemoryBuffers.put``.  Raises ``SeamlessError``, a sentence, if the disk is full or not writable."""
        return self.put_many([data])[0]

    def put_many(self, datas: _t.Iterable[bytes]) -> _t.List[Checksum]:
        """As ``MemoryBuffers.put_many``: all are synced, then all renamed, then each folder is synced once."""
        checksums = []
        with Batch(self) as batch:
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
            with Batch(self) as batch:
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
        with Batch(self) as batch:
            batch.write(checksum, pieces, suffix)
        return True

    def put_made(self, files: _t.Iterable[_t.Tuple[str, _t.Callable[[str], None]]]) -> None:
        """Store what ``make(path)`` makes, synced and verified, for each (name in the folder, such as ``<checksum>.gz``, make)."""
        with Batch(self) as batch:
            for name, make in files:
                batch.make(name, make)

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
                    return in_use(path)
        return False

    def prepare(self) -> None:
        """Make the folder and its marker if they are not there.  Raises ``SeamlessError``, as ``put`` does."""
        with Batch(self) as batch:
            batch.prepare()

    def find_layout(self) -> str:
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


def _state(path) -> str:
    """It changes when somebody repairs the file, or lets us read it."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return "%d-%d-%d-%o" % (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
    return "-"


def log():
    """The logger of the buffer stores."""
    import logging          # a tenth of a cached run, and there is hardly ever something to say
    return logging.getLogger(__name__)
