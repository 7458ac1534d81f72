"""Deleting buffers that have not been used for long: what may go (``Survey``), and making it go (``collect``).

What stays: what was used within ``grace_s`` (see below), what is pinned, what a shared ``seamless.db`` refers to; all that the
transformations and indices among these refer to; and, if some of that is missing, what makes it.  Of the rest the least recently
used goes first.  Rows of results stay: a row without its buffer is legal (a scratch result), and says how to make it again.

Why that is safe while others work in the folder:
- The last use is the access time of the file.  Whoever asks for a buffer in order to read it, or not to store it again, notes
  the use first, and only if that succeeded says that it is there (``durable.in_use``).  So what somebody was told is young.
- A job that is queued or runs has a young transformation buffer (``leases``), which keeps its inputs and their leaves.
  A result is young when it is stored.
- A file is not deleted, but renamed aside; only if it is still as old as it was, the new name is deleted, else it gets its old
  name back.  Who looks in between takes it back himself (``Folder._rescue``).  So there is no moment in which a use could
  go unseen.  A reader that has opened the file keeps it, as the system does that.
- Transformations that arrive while we delete are looked for before each group of files, again and again.
- Seamless 1.x notes nothing, but the system notes once a day that a file is read, and its hashserver sets the mode of what it
  is sent again: that we see, too.  It waits for files named ``.LOCK``, so there is one while files are aside.  This is why
  the default of ``grace_s`` is a day.  What it has only asked for (``/has``), for a job that ran before, it may lose.
- Killed in the middle, we leave at most some files aside; who looks for one takes it back, and the next run takes back all.
"""
import contextlib
import fcntl
import os
import re
import time
import typing as _t

from . import compressed
from .checksum import Checksum
from .durable import last_use, open_unnoticed, remove_file
from .errors import SeamlessError
from .folder import ASIDE, COLLECTING, SUFFIXES, Folder
from .references import LARGEST, closure, makers, recipe_of
from .storing import MARKER

DAY_S = 86400.0
GRACE_S = DAY_S + 3600.0
_GROUP = 10_000             # so many are taken in the order of their last use, and deleted folder by folder
_FILES = 1000               # aside at once
_LOCK = b"seamless-gc\n"
_LOCK_S, _LOCK_SEEN_S = 120.0, 10.0     # readers wait for a lock that is younger; ours are older, but for these last seconds
_NAME = re.compile(r"([0-9a-f]{64})(\.zst|\.gz|\.BUFFERLENGTH)?(\.GC)?\Z")
_FRESH_NS = 50_000_000      # a folder that changed less than this before may change again unseen


class Buffer(_t.NamedTuple):
    """One buffer, in all its forms.  ``size``: bytes that are free when it is deleted; ``changed_ns``: of its files' status."""
    used_s: float
    size: int
    changed_ns: int


class Victim(_t.NamedTuple):
    """A buffer that goes; ``is_old``: because of its age, else because all are too much."""
    checksum: str
    buffer: Buffer
    is_old: bool


class _Unnoticed(Folder):
    """The folder, with what was listed in it; read without noting a use, and only what may be a transformation or an index."""

    def __init__(self, directory: str, listed: _t.Mapping[str, Buffer]):
        super().__init__(directory, writable=False, lock_timeout_s=0)
        self._listed = listed

    def has(self, checksums):
        return [checksum in self._listed for checksum in checksums]

    def length(self, checksum):
        return min(self._listed[checksum].size, LARGEST) if checksum in self._listed else None      # see ``_names_in``

    def get(self, checksum):
        is_large = checksum in self._listed and self._listed[checksum].size > LARGEST
        for suffix, path in self.forms(checksum).items():
            if is_large or suffix:
                return self._names_in(path, suffix) if is_large else self.peek(checksum)
            with contextlib.suppress(OSError), open_unnoticed(path) as file:
                begin = file.read(1)
                return begin + file.read() if begin in (b"{", b"[") else b""
        return None

    def _names_in(self, path, suffix):
        """Of what is too large to be read at once: an index of all in the folder that it may refer to."""
        names, text = set(), b""
        with contextlib.suppress(OSError, SeamlessError):
            for part in compressed.pieces(path, suffix):
                if not text and part[:1] not in (b"{", b"["):
                    break
                text = text[-65:] + part
                names.update(name for name in re.findall(rb'"([0-9a-f]{64})"', text) if name.decode() in self._listed)
        return b'["%s"]' % b'", "'.join(names) if names else b""


def is_store(folder: str) -> bool:
    """Whether a folder of buffers is also the store of a subproject: Seamless 1.x allows one that is called ``ab``."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (MARKER, "seamless.db"))


class Survey:
    """What is in the buffer folder ``directory``, and what of it stays.  Nothing is changed.

    ``results``: the result store that goes with it, or None.  ``kept``: checksum -> why it stays ("in use", "pinned" or
    "shared"); ``aside``: what a run that was killed left.  Raises ``SeamlessError``.
    """

    def __init__(self, directory: str, results=None, grace_s: float = GRACE_S):
        self.directory, self.results, self.grace_s = directory, results, grace_s
        self.buffers: _t.Dict[str, Buffer] = {}
        self.kept: _t.Dict[str, str] = {}
        self.aside: _t.List[str] = []
        self._folder = _Unnoticed(directory, self.buffers)
        self._changed_ns: _t.Dict[str, int] = {}        # folder -> its time when it was listed
        self.look()

    def look(self) -> None:
        """List what is new since the last look, and keep what it needs."""
        new: _t.Dict[str, Buffer] = {}
        try:
            for folder in self._changed_folders():
                is_shared = is_store(folder)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        match = _NAME.match(entry.name)
                        if match and match[3]:
                            self.aside.append(entry.path)
                        elif match and match[1] not in self.buffers:
                            with contextlib.suppress(FileNotFoundError):    # it came and went
                                new[match[1]] = _joined(new.get(match[1]), entry, match[2])
                                if is_shared and (folder != self.directory or match[1][:2] == os.path.basename(folder)):
                                    new[match[1]] = new[match[1]]._replace(used_s=time.time())      # it may be the other store's
        except OSError as exc:
            raise SeamlessError("the buffer folder %s cannot be read: %s" % (exc.filename or self.directory, exc.strerror)) from exc
        self.buffers.update(new)
        young_s = time.time() - self.grace_s
        self.keep((name for name, buffer in new.items() if buffer.used_s > young_s), "in use")

    def _changed_folders(self) -> _t.Iterator[str]:
        todo = [self.directory, *(folder for folder in self._changed_ns if folder != self.directory)]
        for folder in todo:
            changed_ns = os.stat(folder).st_mtime_ns
            if changed_ns == self._changed_ns.get(folder):
                continue
            self._changed_ns[folder] = changed_ns if time.time_ns() - changed_ns > _FRESH_NS else 0
            if folder == self.directory:
                with os.scandir(folder) as entries:
                    todo += [entry.path for entry in entries if re.fullmatch("[0-9a-f]{2}", entry.name)
                             and entry.path not in self._changed_ns and entry.is_dir()]
            yield folder

    def keep(self, roots: _t.Iterable[str], why: str, results=None) -> None:
        """Keep ``roots`` and all that they refer to, with the results of the transformations if ``results`` is given.

        What makes those that are missing (they were scratch), or the index of a missing leaf, is kept too, and so on.
        """
        seen: _t.Set[str] = set()
        while roots:
            found = closure(roots, self._folder, results)
            for name in found.checksums:
                self.kept.setdefault(name, why)
            lacking = (found.missing | found.incomplete) - seen
            seen |= lacking
            roots = [maker for name in lacking for maker in self.results.reverse(name)] if self.results is not None else []

    def is_transformation(self, name: str) -> bool:
        """Whether the buffer is one."""
        return recipe_of(self._folder.get(name) or b"") is not None

    def keep_pinned(self, pins: _t.Iterable[str]) -> None:
        """Keep what is pinned, with the results of transformations."""
        others = [name for pin in pins if self.results is not None for name in self.results.irreproducible(pin)]
        self.keep([*pins, *others], "pinned", self.results)

    def makers(self, checksum: Checksum) -> _t.List[str]:
        """``references.makers`` of it."""
        return [] if self.results is None else makers(checksum, self._folder, self.results)

    def keep_shared(self, table) -> None:
        """Keep what the rows of ``table``, a ``ResultTable``, refer to.  Raises ``SeamlessError`` if it has no such table."""
        tables = {name for name, in table.query("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "transformation" not in tables:
            raise SeamlessError("%s has no table of transformations: give the seamless.db of the other store" % table.path)
        for kind in tables & {"transformation", "irreproducible_transformation"}:
            rows = table.query('SELECT "checksum", "result" FROM "%s"' % kind)
            self.keep((name for row in rows for name in row), "shared", table)

    def sizes(self) -> _t.Dict[str, _t.Tuple[int, int]]:
        """(number, bytes) of the buffers: "all", those kept for each reason, and "free", which could go."""
        found: _t.Dict[str, _t.List[int]] = {}
        for name, buffer in self.buffers.items():
            for key in ("all", self.kept.get(name, "free")):
                sums = found.setdefault(key, [0, 0])
                sums[0] += 1
                sums[1] += buffer.size
        return {key: (count, size) for key, (count, size) in found.items()}

    def choose(self, max_size: _t.Optional[float], older_than_s: _t.Optional[float]) -> _t.List[Victim]:
        """What must go so that the limits (None: there is none) are kept, the least recently used first."""
        free = sorted((buffer.used_s, name) for name, buffer in self.buffers.items() if name not in self.kept)
        left, now, victims = sum(buffer.size for buffer in self.buffers.values()), time.time(), []
        for used_s, name in free:
            buffer = self.buffers[name]
            is_old = older_than_s is not None and now - used_s > older_than_s
            if is_old or max_size is not None and left > max_size and buffer.size:
                victims.append(Victim(name, buffer, is_old))
                left -= buffer.size
        return victims


def _joined(buffer: _t.Optional[Buffer], entry: os.DirEntry, suffix: _t.Optional[str]) -> Buffer:
    """``buffer`` with one more file.  One with another name elsewhere (a link) takes no space here."""
    status = _status(entry.path)
    size = 0 if entry.is_symlink() or status.st_nlink > 1 else status.st_size
    used_s = last_use(status) if suffix != ".BUFFERLENGTH" else 0.0
    before = buffer or Buffer(0.0, 0, 0)
    return Buffer(max(before.used_s, used_s), before.size + size, max(before.changed_ns, status.st_ctime_ns))


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return os.lstat(path)               # a link to nothing


@contextlib.contextmanager
def collecting(directory: str):
    """Within the ``with`` block files may be deleted.  Raises ``SeamlessError`` if another process is doing so."""
    path = os.path.join(directory, COLLECTING)
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        except OSError as exc:
            raise SeamlessError("nothing can be deleted in the buffer folder %s: %s" % (directory, exc.strerror)) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SeamlessError("another seamless-gc is deleting in %s: wait until it has ended" % directory) from None
        except OSError:
            pass                            # no locks here; two who delete only get in each other's way
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        os.close(fd)                        # the one before removed it just now
    try:
        yield
    finally:
        remove_file(path)
        os.close(fd)


class Collected:
    """What ``collect`` has done: ``count`` buffers, ``size`` bytes, are gone; ``spared`` ones are there still, of these ``refused``
    are not ours to delete, and the others were used meanwhile."""

    def __init__(self):
        self.count = self.size = self.spared = self.refused = 0


def collect(survey: Survey, victims: _t.Sequence[Victim], done: Collected) -> None:
    """Delete ``victims``, unless they are needed meanwhile, and add to ``done``; within ``collecting``."""
    try:
        for start in range(0, len(victims), _GROUP):
            folders: _t.Dict[str, _t.List[Victim]] = {}
            for victim in victims[start:start + _GROUP]:
                for path in _paths(survey.directory, victim.checksum)[:1]:
                    folders.setdefault(os.path.dirname(path), []).append(victim)
            for folder, group in folders.items():
                for first in range(0, len(group), _FILES):
                    survey.look()
                    _delete(survey, folder, group[first:first + _FILES], done)
    except OSError as exc:
        raise SeamlessError("nothing more can be deleted: %s: %s" % (exc.filename, exc.strerror)) from exc
    time.sleep(0.1 if victims else 0)       # who missed what we put back last still sees that we are here


def take_back(survey: Survey) -> None:
    """Give their names back to files that a killed run left aside; within ``collecting``."""
    if survey.aside:
        _put_back(survey.aside)
        survey.aside.clear()
        survey.look()


def _put_back(aside: _t.Iterable[str]) -> None:
    """Rename files to what they were, unless the buffer was stored again: that file is younger."""
    for path in aside:
        with contextlib.suppress(FileNotFoundError):            # somebody was faster
            try:
                os.link(path, path[:-len(ASIDE)], follow_symlinks=False)
            except FileExistsError:
                pass                                            # it was stored again
            except (OSError, NotImplementedError):              # there are no links here, or not to files of others
                os.rename(path, path[:-len(ASIDE)])
                continue
            os.unlink(path)


def _delete(survey: Survey, folder: str, victims: _t.Sequence[Victim], done: Collected) -> None:
    """Delete those that are still as they were."""
    aside: _t.Dict[Victim, _t.List[str]] = {}
    try:
        with _lock(folder) as locked:
            for victim in victims:
                moved = aside[victim] = []
                try:
                    if locked and victim.checksum not in survey.kept and _move(survey.directory, victim, moved):
                        continue
                except PermissionError:     # somebody else's file in the folder of a group
                    done.refused += 1
                except FileNotFoundError:   # somebody took it back
                    pass
                done.spared += 1
                _put_back(aside.pop(victim))
        for victim in list(aside):
            try:
                for path in aside[victim]:
                    os.unlink(path)
                    remove_file(os.path.splitext(path[:-len(ASIDE)])[0] + ".BUFFERLENGTH")
            except FileNotFoundError:       # somebody needs it, and took it back
                done.spared += 1
            else:
                del survey.buffers[victim.checksum]     # if it comes again, it is new
                done.count += 1
                done.size += victim.buffer.size
            del aside[victim]
    finally:
        for moved in aside.values():        # we were interrupted
            _put_back(moved)


def _move(directory: str, victim: Victim, moved: _t.List[str]) -> bool:
    """Rename the files of ``victim`` aside, and note them in ``moved``; False if it was used since it was listed."""
    for path in _paths(directory, victim.checksum):
        status = _status(path)
        if last_use(status) > victim.buffer.used_s or status.st_ctime_ns > victim.buffer.changed_ns:
            return False
        os.rename(path, path + ASIDE)
        moved.append(path + ASIDE)
    return all(last_use(_status(path)) <= victim.buffer.used_s for path in moved)


def _paths(directory: str, checksum: str) -> _t.List[str]:
    places = (os.path.join(directory, checksum[:2], checksum), os.path.join(directory, checksum))
    return [place + suffix for place in places for suffix in SUFFIXES if os.path.lexists(place + suffix)]


@contextlib.contextmanager
def _lock(folder: str):
    """Readers that miss something in ``folder`` wait meanwhile.  The value is False if somebody else has locked it."""
    path = os.path.join(folder, ".LOCK")
    with contextlib.suppress(FileNotFoundError):
        with open(path, "rb") as file:
            if file.read(20) != _LOCK and time.time() - os.fstat(file.fileno()).st_mtime < _LOCK_S:
                yield False
                return
    with contextlib.suppress(OSError):      # the disk may be full
        with open(path, "wb", buffering=0) as file:
            os.utime(path, (time.time(), time.time() - _LOCK_S + _LOCK_SEEN_S))     # should we be killed, nobody waits long
            file.write(_LOCK)
            os.utime(path, (time.time(), time.time() - _LOCK_S + _LOCK_SEEN_S))
    try:
        yield True
    finally:
        remove_file(path)
