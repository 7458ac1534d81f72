"""The user's files on their way into a store or out of it: copied or linked, and what is there already trusted or verified.

A hard-linked file belongs to the user and to the store: its permissions stay as they are, and who writes to it damages
the buffer, which every reader notices.  Sidecars are written when what they name is stored.
"""
import functools
import io
import os
import stat
import typing as _t

from . import compressed
from .checksum import Checksum
from .compressed import split_compression
from .durable import in_use, remove_file, set_mode, sync_folder
from .errors import CorruptBufferError, SeamlessError
from .inputs import Inputs, parse_index, read_checksum_file, readable
from .outputs import aside_name, named, write_aside
from .storing import BUFFER_MODE

LINK_TOGETHER = 1000        # linked files that are published together


class Source(_t.NamedTuple):
    """A file as it was read.  ``signature`` is None if its time stamp cannot be trusted."""
    path: str
    suffix: str
    checksum: Checksum
    signature: _t.Any

    def changed(self) -> bool:
        """True if the content is not (or no longer readable as) what it was."""
        try:
            if self.signature is not None and self.signature == _signature(os.stat(self.path)):
                return False
            return compressed.hash_pieces(compressed.pieces(self.path, self.suffix)) != self.checksum
        except (OSError, SeamlessError):
            return True


def _signature(status: os.stat_result):
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns     # a link changes st_ctime


class Sources(Inputs):
    """Files and directories to be stored.  ``read`` has each file that was read, by its path.

    ``linked``: a folder; what shares its inode with a buffer there, and was not modified since its sidecar was written,
    is not read again.
    """

    def __init__(self, linked=None):
        super().__init__()
        self.read: _t.Dict[str, Source] = {}
        self._linked = linked
        self._named: _t.Dict[str, _t.Tuple[Checksum, int]] = {}     # what sidecars say, and since when

    def add_top(self, path: str, is_directory: bool) -> Checksum:
        """Read a file or directory.  Raises ``SeamlessError``, ``OSError``."""
        if self._linked is not None:
            self._read_sidecars(path, is_directory)
        return self.add_directory(path) if is_directory else self.add_file(path)

    def _read_sidecars(self, path: str, is_directory: bool) -> None:
        name = path + ".INDEX" if is_directory else split_compression(path)[0] + ".CHECKSUM"
        try:
            since = os.stat(name).st_mtime_ns
            if not is_directory:
                self._named[split_compression(path)[0]] = read_checksum_file(name), since
                return
            with open(name, "rb") as file:
                index = parse_index(file.read(), name)
            self._named.update((os.path.join(path, relative), (checksum, since)) for relative, checksum in index.items())
        except (OSError, SeamlessError):
            pass                            # then everything is read

    def _hash(self, path: str, name: str):
        base, suffix = split_compression(path)
        found = self._known(path, base, suffix)
        if found is None:
            found = super()._hash(path, name)
        else:
            (self.packed if suffix else self.files)[found[0]] = path
        checksum, signature = found
        self.read[path] = Source(path, suffix, checksum, signature and signature[:4])
        return found

    def _known(self, path: str, base: str, suffix: str):
        checksum, since = self._named.get(base, (None, 0))
        if checksum is None:
            return None
        status = os.stat(path)
        stored = self._linked.forms(checksum).get(suffix)
        if stored is None or status.st_mtime_ns > since or not os.path.samestat(status, os.stat(stored)):
            return None
        return checksum, _signature(status)


def is_directory(path: str) -> bool:
    """True for a directory, False for a file.  Raises ``SeamlessError`` for anything else."""
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise SeamlessError("'%s' cannot be read: %s" % (readable(path), exc.strerror)) from exc
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise SeamlessError("'%s' is neither a file nor a directory" % readable(path))
    return stat.S_ISDIR(mode)


# --- into a folder ----------------------------------------------------------------------------------------

def is_folder(store) -> bool:
    """True if what is stored lies in a directory that this process writes to by itself."""
    return hasattr(store, "directory")


def link(folder, sources: _t.Iterable[Source], symbolic: bool, taken: bool, stored: _t.Callable[[Source], None]) -> None:
    """Let the files be the buffers of ``folder``; compressed ones keep their suffix.  ``taken``: they are the store's alone.

    Raises ``CorruptBufferError`` if one has changed, ``SeamlessError`` if one cannot be linked.
    """
    waiting = list(sources)
    for start in range(0, len(waiting), LINK_TOGETHER):
        batch = waiting[start:start + LINK_TOGETHER]
        folder.put_made((name, make) for source in batch for name, make in _parts(source, symbolic, taken))
        for source in batch:
            stored(source)


def _parts(source: Source, symbolic: bool, taken: bool):
    yield source.checksum + source.suffix, functools.partial(_link, source, symbolic, taken)
    if source.suffix:
        length = sum(map(len, compressed.pieces(source.path, source.suffix)))
        yield source.checksum + ".BUFFERLENGTH", functools.partial(_write, b"%d" % length)


def _write(data: bytes, path: str) -> None:
    write_aside(path, io.BytesIO(data), sync=True)
    set_mode(path, BUFFER_MODE)


def _link(source: Source, symbolic: bool, taken: bool, path: str) -> None:
    make_link(os.path.realpath(source.path), path, symbolic)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if source._replace(path=path).changed():
            raise CorruptBufferError("the file '%s' changed while it was stored; upload it again" % source.path)
        in_use(path)
        if taken and os.fstat(fd).st_nlink == 2:
            set_mode(fd, BUFFER_MODE)
    finally:
        os.close(fd)


def make_link(path: str, name: str, symbolic: bool) -> None:
    """Let ``name`` be a link to the file ``path``.  Raises ``SeamlessError``."""
    try:
        (os.symlink if symbolic else os.link)(path, name)
    except OSError as exc:
        raise SeamlessError("'%s' cannot be linked to from %s (%s); use --copy" % (path, os.path.dirname(name) or "here",
                                                                                  exc.strerror)) from exc


def copy_packed(folder, source: Source) -> None:
    """Store a compressed file as it is, or decompressed if Seamless 1.x could not read it: it takes the first frame of zstd
    data, which must announce its size."""
    if source.suffix == ".zst":
        length = sum(map(len, compressed.pieces(source.path, source.suffix)))
        if compressed.zstd_size(source.path) != length:
            folder.put_file(source.path, source.checksum)
            return
    folder.put_stream(source.checksum, compressed.read_source(source.path), source.suffix)


def damaged(store, checksum: Checksum) -> _t.List[str]:
    """Where the store has something else under this name: paths, or the address of a service.  Raises ``SeamlessError``."""
    if is_folder(store):
        try:
            return [path for suffix, path in store.forms(checksum).items() if not compressed.is_whole(path, suffix, checksum)]
        except OSError as exc:
            raise SeamlessError("the stored buffer %s cannot be read: %s" % (checksum, exc.strerror)) from exc
    try:
        file = store.open(checksum)
    except CorruptBufferError:
        file = None
    if file is None:
        return [store.address]
    file.close()
    return []


def drop_links(folder, checksum: Checksum) -> bool:
    """Remove what ``--symlink`` made: it may point to the file that is about to be deleted.  True if the buffer must be stored again."""
    forms = folder.forms(checksum)
    links = [path for path in forms.values() if os.path.islink(path) and path.startswith(folder.directory + os.sep)]
    for path in links:
        remove_file(path)
    return bool(links) and len(links) == len(forms)


def set_aside(path: str) -> None:
    """Rename a damaged buffer of a folder, durably."""
    os.replace(path, path + ".CORRUPT")
    sync_folder(os.path.dirname(path))


def sidecar_base(path: str) -> str:
    """The name to which ``.CHECKSUM`` is added: without a last "/", compression or ``.INDEX``."""
    if os.path.isdir(path):
        path = path.rstrip("/")
        return path if os.path.basename(path) not in ("", ".", "..") else os.path.abspath(path)
    base = split_compression(path)[0]
    return base[:-len(".INDEX")] if base.endswith(".INDEX") and not base.endswith("/.INDEX") else base


# --- out of a store, and sidecars ---------------------------------------------------------------------------

def form(store, checksum: Checksum, suffix: str) -> _t.Optional[str]:
    """The path of the buffer with this suffix, unread; None if there is none."""
    if not hasattr(store, "forms"):         # several folders, which are only read
        return None if suffix else store.path(checksum)
    return store.forms(checksum).get(suffix)


def link_out(store, checksum: Checksum, suffix: str, target: str, symbolic: bool) -> bool:
    """Let the file ``target`` be a link to the stored buffer, or to its compressed form; False if there is no such form."""
    path = form(store, checksum, suffix) if suffix else store.path(checksum)
    if path is None or suffix and not compressed.is_whole(path, suffix, checksum):
        return False
    aside = aside_name(target)
    try:
        make_link(os.path.realpath(path), aside, symbolic)
        os.replace(aside, target)
    finally:
        remove_file(aside)                  # still there if both were links to one file
    return True


def is_same(path: str, suffix: str, checksum: Checksum) -> bool:
    """True if the user's file has this content (compressed, if ``suffix`` says so); False if there is none."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode) and compressed.is_whole(path, suffix, checksum)
    except FileNotFoundError:
        return False


def write_sidecars(base: str, checksum: Checksum, index: _t.Optional[bytes] = None, keep_index: bool = False,
                   sync: bool = True) -> None:
    """``BASE.CHECKSUM``, and ``BASE.INDEX`` or none; durable on return if ``sync``.  Raises ``SeamlessError``."""
    name = base + ".CHECKSUM"
    try:
        if named(base) != checksum:
            remove_file(name)               # it must not stand beside another index, not even for a moment
        if index is not None:
            write_aside(base + ".INDEX", io.BytesIO(index), sync=sync)
        elif not keep_index:
            remove_file(base + ".INDEX")
        write_aside(name, io.BytesIO(checksum.encode("ascii") + b"\n"), sync=sync)
    except OSError as exc:
        if isinstance(exc, PermissionError) and named(base) == checksum and (keep_index or _content(base + ".INDEX") == index):
            return                              # nothing may be written here, and all is right already
        raise SeamlessError("%s cannot be written: %s" % (name, exc.strerror)) from exc


def _content(path: str) -> _t.Optional[bytes]:
    """None if there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
