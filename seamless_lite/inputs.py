"""Input files and directories of a command: their checksums, what must be uploaded, and whether they changed.

``Inputs.add(path)`` is the one entry.  It looks for sidecars (``x.CHECKSUM``, ``x.INDEX``: then the content
need not be there at all), hashes files and directories, and remembers

    buffers   small things made here (directory indices), by checksum
    files     plain files whose content is an input, by checksum
    packed    ``.gz``/``.zst`` files: the checksum is that of the decompressed content
    seen      an ``Input`` per file or directory that was read, with which ``changed()`` looks again
    dropped   links to directories that are no part of a directory that was read

A file that is written to while it is being read is read again; one that never comes to rest is refused.
"""
import errno
import os
import stat
import time
import typing as _t

from . import compressed
from .celltypes import plain_dumps, plain_loads
from .checksum import Checksum
from .compressed import split_compression
from .errors import ChecksumError, SeamlessError

FUTURE_STALE_S = 120.0      # the job that makes the file touches its .FUTURE every 30 s
FUTURE_POLL_S = 0.1
FRESH_NS = 50_000_000       # a file written that recently may be written again without a new time stamp
READ_ATTEMPTS = 3
SMALL = 1 << 16
LARGEST_SIDECAR = 1 << 16     # characters of a .CHECKSUM file


class Input(_t.NamedTuple):
    """A file or directory as it was read.  ``signature`` is None if its time stamps cannot be trusted."""
    path: str
    checksum: Checksum
    is_directory: bool
    signature: _t.Any

    def changed(self) -> bool:
        """True if the content is not (or no longer readable as) what it was."""
        again = Inputs()
        try:
            if self.signature is not None and self.signature == _signature(self.path, self.is_directory):
                return False
            read = again.add_directory if self.is_directory else again.add_file
            return read(self.path) != self.checksum
        except (OSError, SeamlessError):
            return True


class Inputs:
    """What the inputs of one command consist of."""

    def __init__(self):
        self.buffers: _t.Dict[Checksum, bytes] = {}
        self.files: _t.Dict[Checksum, str] = {}
        self.packed: _t.Dict[Checksum, str] = {}
        self.seen: _t.List[Input] = []
        self.dropped: _t.Dict[str, _t.List[str]] = {}       # directory -> links in it that were left out
        self._found: _t.Dict[str, _t.Any] = {}

    def add(self, path: str, name: str) -> _t.Optional[_t.Tuple[bool, Checksum]]:
        """(whether it is a directory, checksum) of the input ``path``; None if there is no such file.

        ``name`` is how the user calls it.  Raises ``SeamlessError``, a sentence, if it cannot be an input.
        """
        if path not in self._found:
            self._found[path] = self._add(path, name)
        return self._found[path]

    def _add(self, path: str, name: str):
        mode = _mode(path)
        try:
            found = self._sidecar(path, name)
            if found is not None:
                return found
            if stat.S_ISDIR(mode):
                return True, self.add_directory(path, name)
            if stat.S_ISREG(mode):
                return False, self.add_file(path, name)
        except OSError as exc:
            raise SeamlessError("the input '%s' cannot be read: %s" % (name, exc.strerror)) from exc
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise SeamlessError("the input '%s' is a pipe, not a file; write its content to a file first" % name)
        return None                         # not there; or a device, such as /dev/null: the job has the same one

    def add_file(self, path: str, name: _t.Optional[str] = None) -> Checksum:
        """Hash one file.  Raises ``OSError``, ``SeamlessError``."""
        checksum, signature = self._hash(path, name or path)
        self.seen.append(Input(path, checksum, False, signature))
        return checksum

    def add_directory(self, path: str, name: _t.Optional[str] = None) -> Checksum:
        """Hash all files below a directory; the result is the checksum of the index.

        Links to files are followed, links to directories are not; what is neither is left out.
        """
        index: _t.Dict[str, str] = {}
        signatures: _t.Dict[str, _t.Any] = {}
        for relative, file in _walk(path, dropped=self.dropped.setdefault(path, [])):
            checksum, signatures[relative] = self._hash(file, file)
            key = split_compression(relative)[0]
            if index.setdefault(key, checksum) != checksum:
                raise SeamlessError("the directory '%s' holds '%s' both plain and compressed, with different content; "
                                    "remove one of the two" % (name or path, key))
            check_text(key, "the file name '%s' in the directory '%s'" % (readable(key), readable(name or path)))
        checksum = self._add_index(plain_dumps(index))
        trusted = None not in signatures.values()
        self.seen.append(Input(path, checksum, True, signatures if trusted else None))
        return checksum

    def _add_index(self, data: bytes) -> Checksum:
        checksum = Checksum.of(data)
        self.buffers[checksum] = data
        return checksum

    def _hash(self, path: str, name: str):
        """(checksum of the decompressed content, signature) of a file that stood still meanwhile."""
        suffix = split_compression(path)[1]
        for _ in range(READ_ATTEMPTS):
            before = _stat_signature(os.stat(path))
            if suffix:
                checksum = compressed.hash_pieces(compressed.pieces(path, suffix))
            else:
                checksum = _hash_plain(path)
            after = os.stat(path)
            if _stat_signature(after) == before:
                break
        else:
            raise SeamlessError("the input '%s' is being written to; run the command again when that is done" % name)
        (self.packed if suffix else self.files)[checksum] = path
        return checksum, _trusted(after)

    # --- sidecars -------------------------------------------------------------------------------------

    def has_sidecar(self, path: str) -> bool:
        """True if a ``.CHECKSUM`` file stands for the content of ``path``."""
        return not path.endswith((".CHECKSUM", ".INDEX")) and stat.S_ISREG(_mode(_sidecar_base(path) + ".CHECKSUM"))

    def _sidecar(self, path: str, name: str):
        if not self.has_sidecar(path):
            return None
        base = _sidecar_base(path)
        checksum = read_checksum_file(base + ".CHECKSUM")
        if os.path.exists(base + ".INDEX"):
            self._add_sidecar_index(base, checksum, name)
            return True, checksum
        if os.path.isdir(path):
            raise SeamlessError("'%s' is a directory, and %s.CHECKSUM exists but %s.INDEX does not; remove the former "
                                "to use the directory as it is" % (name, base, base))
        if os.path.isfile(path) and self.add_file(path, name) != checksum:
            raise SeamlessError("the content of '%s' is not what %s.CHECKSUM says; if the file is right, remove "
                                "the .CHECKSUM file" % (name, base))
        return False, checksum

    def _add_sidecar_index(self, base: str, checksum: Checksum, name: str) -> None:
        """The index, and those of its files that lie here, can be uploaded if the store has lost them."""
        with open(base + ".INDEX", "rb") as file:
            data = file.read()
        if Checksum.of(data) != checksum:
            raise SeamlessError("%s.INDEX is not the index that %s.CHECKSUM names; remove both to use the directory "
                                "'%s' as it is" % (base, base, name))
        self._add_index(data)
        for relative, member in parse_index(data, base + ".INDEX").items():
            file = os.path.join(base, relative)
            if os.path.isfile(file):
                self.files[member] = file


def read_checksum_file(path: str) -> Checksum:
    """The checksum in a ``.CHECKSUM`` file; lines that begin with ``#`` are comments.

    Raises ``OSError``, and ``SeamlessError`` if it holds anything else.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = "".join(line for line in file.read(LARGEST_SIDECAR).splitlines(True) if not line.startswith("#")).strip()
    try:
        return Checksum(text)
    except ChecksumError:
        raise SeamlessError("the file %s does not hold a checksum, which is 64 hexadecimal digits; remove it, or make "
                            "it again" % path) from None


def parse_index(data: bytes, where: str) -> _t.Dict[str, Checksum]:
    """The index of a directory: relative path -> checksum.  Raises ``SeamlessError`` for a path that leads outside."""
    value = plain_loads(data)
    if not isinstance(value, dict):
        raise SeamlessError("%s is not the index of a directory" % where)
    for name in value:
        parts = name.split("/")
        if "\0" in name or {"", ".", ".."} & set(parts):
            raise SeamlessError("%s names the file '%s', which would lie outside the directory; it is not used"
                                % (where, readable(name)))
        check_text(name, "the file name '%s' in %s" % (readable(name), where))
        for n in range(1, len(parts)):
            if "/".join(parts[:n]) in value:
                raise SeamlessError("%s names '%s' as a file and as a directory; it is not used" % (where, readable("/".join(parts[:n]))))
    return {name: Checksum(checksum) for name, checksum in value.items()}


def wait_for_future(path: str, say: _t.Callable[[str], None]) -> None:
    """Wait while another command is making the file ``path``, which it shows by ``path.FUTURE``.

    Raises ``SeamlessError`` if nobody has touched that for two minutes.
    """
    marker, told = path.rstrip("/") + ".FUTURE", False
    while True:
        try:
            age_s = time.time() - os.stat(marker).st_mtime
        except OSError:
            return                          # it is there now, or will not be: the caller looks
        if age_s > FUTURE_STALE_S:
            raise SeamlessError("another command should make '%s', but has not been heard of for %d s; if it is dead, "
                                "remove %s" % (path, age_s, marker))
        if not told:
            say("waiting for '%s', which another command is making" % path)
            told = True
        time.sleep(FUTURE_POLL_S)


def _sidecar_base(path: str) -> str:
    return split_compression(path.rstrip("/") or "/")[0]


def check_text(text: str, what: str) -> None:
    """Raise ``SeamlessError`` unless ``text`` can be written as UTF-8; ``what`` names it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SeamlessError("%s is not UTF-8, and cannot be written in a transformation; rename it" % what) from None


def readable(name: str) -> str:
    """``name`` on one line; bytes that are not UTF-8, and what cannot be printed, as escapes."""
    return "".join(char if char.isprintable() else "\\x%02x" % (ord(char) - 0xdc00) if "\udc80" <= char <= "\udcff" else repr(char)[1:-1]
                   for char in name)


def _walk(path: str, prefix: str = "", dropped: _t.Optional[_t.List[str]] = None) -> _t.Iterator[_t.Tuple[str, str]]:
    """(relative path, path) of every file below ``path`` but markers; links to directories go to ``dropped``."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, prefix + entry.name + "/", dropped)
            elif entry.is_symlink() and _dangles(entry.path):
                continue
            elif entry.is_file():           # not a pipe
                if not entry.name.endswith(".FUTURE"):      # comes and goes with every command that has results
                    yield prefix + entry.name, entry.path
            elif dropped is not None and entry.is_dir():
                dropped.append(prefix + entry.name)


def _dangles(link: str) -> bool:
    """True if the link leads nowhere, or to itself."""
    try:
        os.stat(link)
        return False
    except OSError as exc:
        return exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def _mode(path: str) -> int:
    """The type of the file; 0 if there is none, also if the name is too long to be one."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _stat_signature(status: os.stat_result):
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _trusted(status: os.stat_result):
    """The signature, or None if a change right now could leave it as it is."""
    return _stat_signature(status) if time.time_ns() - status.st_mtime_ns > FRESH_NS else None


def _signature(path: str, is_directory: bool):
    """What differs after a change.  Raises ``OSError``."""
    if is_directory:
        return {relative: _signature(file, False) for relative, file in _walk(path)}
    return _trusted(os.stat(path))


def _hash_plain(path: str) -> Checksum:
    with open(path, "rb", buffering=0) as file:
        data = file.read(SMALL)             # most files are small, and need no large buffer
        if len(data) < SMALL and not file.read(1):
            return Checksum.of(data)
    return Checksum.of_file(path)
