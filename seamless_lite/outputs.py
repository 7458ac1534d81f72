"""Results on their way to the user: standard output, files, directories, and the sidecars beside them.

``LOCAL.CHECKSUM`` names the content of a result file, or, together with ``LOCAL.INDEX``, that of a result
directory; later commands take it as an input without reading the content.  A sidecar is there only while
what it says is true: it goes before the content is replaced, and comes after.

Files appear under their names complete or not at all.  They are not synced: the store has the durable copy.
"""
import contextlib
import io
import os
import stat
import threading
import typing as _t

from .celltypes import plain_dumps
from .checksum import CHUNK, Checksum
from .compressed import compress
from .durable import remove_file, sync_folder
from .errors import CacheMissError, SeamlessError
from .inputs import parse_index, read_checksum_file
from .program import write_output
from .progress import Progress, is_watched
from .script import Target

TOUCH_S = 30.0          # how often a .FUTURE file is touched; readers give up after 120 s


class Results:
    """Reads the result of one command from the store of ``supply``; ``outcome`` may hold its bytes itself.

    ``who`` begins the lines that tell of large downloads; None: there are none.
    """

    def __init__(self, supply, outcome, who: _t.Optional[str] = None):
        self.supply = supply
        self.outcome = outcome
        self.who = who

    @property
    def store(self):
        return self.supply.store

    def open(self, checksum: Checksum, progress: _t.Optional[Progress] = None) -> _t.BinaryIO:
        """A binary file with this content.  Raises ``CacheMissError``."""
        data = self.outcome.buffer if checksum == self.outcome.result else None
        if data is None:
            data = self.supply.held(checksum)
        file = io.BytesIO(data) if data is not None else self.fetch(checksum, progress)
        if file is None:
            raise CacheMissError("the result %s is not in the store any more; run the command again" % checksum)
        return file

    def fetch(self, checksum: Checksum, progress: _t.Optional[Progress]) -> _t.Optional[_t.BinaryIO]:
        """The file in the store, or a nameless temporary one with what was downloaded; None if it is not there."""
        if not self.store.remote:
            return self.store.open(checksum)
        from .hashserver import nameless_file       # these are only for results that are far away
        from .transfer import download
        return nameless_file(lambda file: download(self.store, checksum, file, self.who, progress))

    def each(self, index: _t.Mapping[str, Checksum], progress: Progress) -> _t.Iterator[_t.Tuple[str, _t.BinaryIO]]:
        """(name, open file) for each entry, in any order; from far away small ones come in batches."""
        names: _t.Dict[Checksum, _t.List[str]] = {}
        for name, checksum in index.items():
            names.setdefault(checksum, []).append(name)
        contents: _t.Iterable = ((checksum, None) for checksum in names)
        if self.store.remote:
            from .transfer import read_many
            contents = read_many(self.store, names)
        for checksum, data in contents:
            progress.add(len(data or b""))
            for name in names[checksum]:
                with (self.open(checksum, progress) if data is None else io.BytesIO(data)) as file:
                    yield name, file

    def print(self) -> None:
        """Write the result to standard output, byte by byte.  Raises ``BrokenPipeError``, ``SeamlessError``."""
        with self.open(self.outcome.result) as file:
            self.copy(file)

    @staticmethod
    def copy(file: _t.BinaryIO) -> None:
        """Write the content of ``file`` to standard output."""
        for piece in iter(lambda: file.read(CHUNK), b""):
            write_output(piece)

    def contents(self, targets: _t.Sequence[Target]) -> _t.Dict[Target, _t.Union[Checksum, _t.Dict[str, Checksum]]]:
        """For each target the checksum of its file, or the index of its directory."""
        with self.open(self.outcome.result) as file:
            index = parse_index(file.read(), "the result %s" % self.outcome.result)
        found: _t.Dict[Target, _t.Any] = {}
        for target in targets:
            name = os.path.normpath(target.server)
            found[target] = index.get(name)
            if found[target] is None:       # an empty directory is in no index
                found[target] = {path[len(name) + 1:]: checksum for path, checksum in index.items()
                                 if path.startswith(name + "/")}
        return found

    def size(self, contents: _t.Mapping) -> _t.Tuple[int, int]:
        """(number of files, number of bytes) of what ``contents`` returned."""
        checksums = _checksums(contents.values())
        return len(checksums), sum(length or 0 for length in self.store.lengths(checksums))

    def save(self, contents: _t.Mapping, cwd: str, download: bool = True,
             say: _t.Callable[[str], None] = lambda text: None) -> None:
        """Write every target and its sidecars below ``cwd``.  Raises ``SeamlessError``, ``CacheMissError``."""
        total = self.size(contents)[1] if download and self.store.remote and self.who is not None and is_watched() else 0
        with Progress("download", total, self.who) as progress:
            for target, content in contents.items():
                local = _local_path(target, cwd)
                try:
                    os.makedirs(os.path.dirname(local), exist_ok=True)
                    if is_special(local):
                        self.write_special(content, local)
                    else:
                        self.save_one(content, local, progress if download else None, say)
                except OSError as exc:
                    raise SeamlessError("the result '%s' cannot be written: %s" % (target.local, exc.strerror)) from exc

    def save_one(self, content, local: str, download: _t.Optional[Progress], say) -> None:
        """One target and its sidecars."""
        is_file = isinstance(content, str)
        index = b"" if is_file else plain_dumps(content)
        checksum = content if is_file else Checksum.of(index)
        if named(local) != checksum:
            remove_file(local + ".CHECKSUM")
        if download is not None:
            if is_file:
                self.write_file(content, local, download)
            else:
                self.write_directory(content, local, download)
        elif is_file and os.path.exists(local) and not self.is_same(content, local):
            say("'%s' stays as it is, but is not the new result that '%s.CHECKSUM' names"
                % (local, local))
        if is_file:
            remove_file(local + ".INDEX")
        else:
            self.store.put(index)           # so that the directory can be an input of another command
            write_aside(local + ".INDEX", io.BytesIO(index))
        write_aside(local + ".CHECKSUM", io.BytesIO(checksum.encode("ascii") + b"\n"))

    def write_file(self, checksum: Checksum, path: str, progress: Progress) -> None:
        """Make ``path`` a file with this content, unless it is one."""
        path = self.real_path(path)
        if not self.is_same(checksum, path):
            check_writable(path)
            with self.open(checksum, progress) as file:
                write_aside(path, file)

    @staticmethod
    def real_path(path: str) -> str:
        """The file to write to; refuses a directory."""
        path = os.path.realpath(path)       # a link stays a link, as with '>'
        if os.path.isdir(path):
            raise SeamlessError("the result '%s' is a file, but a directory of that name is here; remove it, or give "
                                "the result another name with --capture SRC:DST" % path)
        return path

    def write_directory(self, index: _t.Mapping[str, Checksum], path: str, progress: Progress) -> None:
        """Make ``path`` a directory with these files.  Other files in an existing directory stay."""
        if os.path.exists(path) and not os.path.isdir(path):
            raise SeamlessError("the result '%s' is a directory, but a file of that name is here; remove it, or give "
                                "the result another name with --capture SRC:DST" % path)
        if os.path.isdir(path):
            paths = {name: self.real_path(os.path.join(path, name)) for name in index}
            changed = {name: checksum for name, checksum in index.items() if not self.is_same(checksum, paths[name])}
            for name, file in self.each(changed, progress):
                os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
                check_writable(paths[name])
                write_aside(paths[name], file)
            return
        aside = aside_name(path)
        try:
            os.mkdir(aside)
            for name, source in self.each(index, progress):
                os.makedirs(os.path.dirname(os.path.join(aside, name)), exist_ok=True)
                with open(os.path.join(aside, name), "wb") as file:
                    _copy(source, file)
            os.rename(aside, path)
        except BaseException:
            import shutil               # not needed as long as all goes well
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def write_special(self, content, path: str) -> None:
        """A pipe or a device is written to, not replaced."""
        if not isinstance(content, str):
            raise SeamlessError("the result is a directory and cannot be written to '%s'" % path)
        with self.open(content) as source:
            write_over(path, source)

    def is_same(self, checksum: Checksum, path: str) -> bool:
        """True if the file ``path`` has this content already."""
        try:
            # a message to another host takes longer than reading most files
            return ((self.store.remote or os.path.getsize(path) == self.store.length(checksum))
                    and Checksum.of_file(path) == checksum)
        except FileNotFoundError:
            return False


def _checksums(contents: _t.Iterable) -> _t.List[Checksum]:
    return [checksum for content in contents for checksum in ([content] if isinstance(content, str) else content.values())]


def check_appended(targets: _t.Sequence[Target], cwd: str) -> None:
    """Refuse to replace a file that the command was meant to append to, unless it is an earlier result.

    The command runs without the old file, so ``>>`` begins an empty one.  Raises ``SeamlessError``.
    """
    for target in targets:
        local = _local_path(target, cwd)
        if target.append and os.path.isfile(local) and os.path.getsize(local):
            checksum = named(local)
            if checksum is None or Checksum.of_file(local) != checksum:
                raise SeamlessError("'>> %s' would replace what is in that file, since the command begins with an "
                                    "empty one; write to another file and append that yourself" % target.local)


def check_writable(path: str) -> None:
    """Refuse to replace a file that is protected, as ``>`` does.  Raises ``SeamlessError``."""
    if os.path.isfile(path) and not os.access(path, os.W_OK):
        raise SeamlessError("the result '%s' cannot be written, because a file of that name is write-protected; make "
                            "it writable with 'chmod u+w', or remove it" % path)


def future_files(targets: _t.Sequence[Target], cwd: str, checksum: Checksum) -> _t.Dict[str, bytes]:
    """``LOCAL.FUTURE`` -> its content, for the results of a command that is running."""
    return {_local_path(target, cwd) + ".FUTURE": ("%s.%s\n" % (checksum, target.server)).encode("utf-8")
            for target in targets if not is_special(_local_path(target, cwd))}


@contextlib.contextmanager
def announced(targets: _t.Sequence[Target], cwd: str, checksum: Checksum):
    """While the ``with`` block runs, ``LOCAL.FUTURE`` files tell other commands to wait for the results.

    Raises ``SeamlessError`` if a result could not be written.
    """
    markers = future_files(targets, cwd, checksum)
    for target in targets:
        check_writable(_local_path(target, cwd))
    ended = threading.Event()

    def touch():
        while not ended.wait(TOUCH_S):
            for marker in markers:
                with contextlib.suppress(OSError):      # somebody has removed it, and may
                    os.utime(marker)
    thread = threading.Thread(target=touch, daemon=True)
    try:
        for marker, text in markers.items():
            try:
                os.makedirs(os.path.dirname(marker), exist_ok=True)
                write_aside(marker, io.BytesIO(text))
            except OSError as exc:
                raise SeamlessError("the result '%s' could not be written: %s" % (marker[:-7], exc.strerror)) from exc
        if markers:
            thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        for marker in markers:
            remove_file(marker)


def _local_path(target: Target, cwd: str) -> str:
    return os.path.join(cwd, os.path.normpath(target.local))


def named(local: str) -> _t.Optional[Checksum]:
    """The checksum in ``LOCAL.CHECKSUM``; None if there is none to be read."""
    try:
        return read_checksum_file(local + ".CHECKSUM")
    except (OSError, SeamlessError):
        return None                         # none, or not one of ours


def is_special(path: str) -> bool:
    """True for a pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def aside_name(path: str) -> str:
    """Where to write what will become ``path``: in the same folder."""
    folder, name = os.path.split(path)
    return os.path.join(folder, ".%s-%s" % (name[:40], os.urandom(4).hex()))


def _copy(source: _t.BinaryIO, file: _t.BinaryIO) -> None:
    for piece in iter(lambda: source.read(CHUNK), b""):
        file.write(piece)


def write_over(path: str, source: _t.BinaryIO) -> None:
    """As ``> path`` does: into a pipe or a device, else replace the file, also one behind a link, unless it is protected."""
    if is_special(path):
        with open(path, "wb") as file:
            _copy(source, file)
    else:
        check_writable(path)
        write_aside(os.path.realpath(path), source)


def write_aside(path: str, source: _t.BinaryIO, suffix: str = "", sync: bool = False) -> None:
    """Replace the file ``path`` by the content of ``source``, compressed if ``suffix`` says so; it keeps its permissions."""
    aside = aside_name(path)
    try:
        with open(aside, "xb") as file:
            compress(source, file, suffix) if suffix else _copy(source, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(aside, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(aside, path)
        if sync:
            sync_folder(os.path.dirname(path) or ".")
    except BaseException:
        remove_file(aside)
        raise
