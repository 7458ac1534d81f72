"""The queue file: what ``seamless-run --qsubmit`` appends and ``seamless-queue`` runs (compat/bash.md section 8).

    {"queue_command": "SUBMIT", ...}\\0 ... {"queue_command": "ENDED", "at": N, "result": ...}\\0 ... {"queue_command": "EOF"}\\0

It only ever grows, so the offset ``at`` names a command; ``ENDED`` is our own, and Seamless 1.x passes over it.  A command
that reads what a queued one will make has the pin ``futures[name] = "ID.SERVER"`` instead of a checksum, where ID is
the other's ``transformation_checksum`` (that of the transformation with stand-ins, if it waits for others itself).
"""
import contextlib
import fcntl
import json
import os
import time
import typing as _t

from .checksum import Checksum
from .durable import remove_file, sync_folder
from .errors import SeamlessError
from .script import Target

LOCK_STALE_S = 30.0
POLL_S = 0.05
VARIABLE, DEFAULT_NAME = "SEAMLESS_QUEUE_FILE", ".seamless-queue"
_BEGINS = (b'{\n  "queue_command"', b'{"queue_command"')
#: What an entry may leave out.
_PARAMS = {"scratch": False, "download": True, "auto_confirm": "no", "max_download_files": 2000, "max_download_size": 500_000_000}


class Submission(_t.NamedTuple):
    """A queued command.  ``after``: the offsets of those that must have ended before; ``makers``: pin -> (offset, server name)."""
    at: int
    number: int
    id: Checksum
    command: str
    transformation: _t.Mapping
    targets: _t.Sequence[Target]
    params: _t.Mapping
    makers: _t.Mapping[str, _t.Tuple[int, str]]
    config: _t.Mapping
    after: _t.FrozenSet[int]


class Ended(_t.NamedTuple):
    """How a command ended: the checksum of its result, or why there is none."""
    result: _t.Optional[Checksum]
    message: str


class QueueFile:
    """The file at ``path`` as it was when last read (``update``), and the ways to change it."""

    def __init__(self, environ: _t.Mapping[str, str], cwd: str):
        self.path = os.path.join(cwd, environ.get(VARIABLE) or DEFAULT_NAME)
        self.submissions: _t.Dict[int, Submission] = {}
        self.ended: _t.Dict[int, Ended] = {}
        self.eof = False
        self.left_out = 0                                   # submissions that cannot be understood
        self.kept = self.path                               # where the file is
        self._file: _t.Optional[_t.BinaryIO] = None
        self._next = 0
        self._by_id: _t.Dict[str, int] = {}
        self._writers: _t.Dict[str, int] = {}                # absolute path of a result -> who makes it last

    # --- reading --------------------------------------------------------------------------------------

    def update(self) -> _t.List[str]:
        """Read what was appended; sentences about what could not be understood.  No file is an empty one.

        Goes on reading a file that was removed.
        """
        try:
            self._file = self._file or open(self.path, "rb")
            self._file.seek(self._next)
            *chunks, _ = self._file.read().split(b"\0")     # the rest is being written
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise SeamlessError("the queue file %s cannot be read: %s" % (self.path, exc.strerror)) from exc
        problems = []
        for chunk in chunks:
            for offset, record in _records(chunk):
                try:
                    if record is None:
                        raise ValueError
                    self._take(self._next + offset, record)
                except (LookupError, TypeError, ValueError, AttributeError, SeamlessError):
                    self.left_out += isinstance(record, dict) and record.get("queue_command") == "SUBMIT"
                    problems.append("an entry of %s at byte %d cannot be read (its writer may have been killed) and is left out: %s"
                                    % (self.path, self._next + offset, chunk[offset:offset + 200].decode("utf-8", "replace")))
            self._next += len(chunk) + 1
        return problems

    def is_replaced(self) -> bool:
        """True if the file that was read is not the one at ``path`` any more."""
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return True

    def _take(self, at: int, record: _t.Mapping) -> None:
        if record["queue_command"] == "SUBMIT":
            self._add(at, record)
        elif record["queue_command"] == "ENDED" and record["at"] in self.submissions:
            result = record["result"]
            self.ended[record["at"]] = Ended(None if result is None else Checksum(result), str(record.get("message", "")))
        elif record["queue_command"] == "EOF":
            self.eof = True

    def _add(self, at: int, record: _t.Mapping) -> None:
        params, checksum = {**_PARAMS, **record["params"]}, Checksum(record["transformation_checksum"])
        targets = [Target(server, local or server) for server, local in record["result_targets"].items()]
        makers = {}
        for pin, made_by in record.get("futures", {}).items():
            id, _, server = made_by.partition(".")
            makers[pin] = (self._by_id[id], server)
        places = [self.place(params, target) for target in targets]
        after = {self._writers[place] for place in places if place in self._writers} | {maker for maker, _ in makers.values()}
        transformation = record["pending_transformation" if makers else "transformation_dict"]
        self.submissions[at] = Submission(at, len(self.submissions) + 1, checksum, str(record["original_command"]), dict(transformation),
                                          targets, params, makers, dict(record.get("config", {})), frozenset(after))
        self._by_id[checksum] = at
        self._writers.update(dict.fromkeys(places, at))

    def place(self, params: _t.Mapping, target: Target) -> str:
        """Where a result goes."""
        return os.path.normpath(os.path.join(os.path.dirname(self.path), params["workdir"], target.local))

    def pending(self) -> _t.List[Submission]:
        """The commands that have not ended."""
        return [submission for at, submission in self.submissions.items() if at not in self.ended]

    def failed(self) -> _t.List[_t.Tuple[Submission, str]]:
        """The commands without a result, and why."""
        return [(self.submissions[at], ended.message) for at, ended in self.ended.items() if ended.result is None]

    def queued(self, id: Checksum) -> bool:
        """True if this transformation was submitted."""
        return id in self._by_id

    def maker(self, path: str) -> _t.Optional[str]:
        """"ID.SERVER" of the queued command that will make the file ``path``; None if there is none.

        Raises ``SeamlessError`` if commands will make files inside the directory ``path``, or a directory that ``path`` is inside of.
        """
        path = os.path.normpath(path)
        coming = {place: at for place, at in self._writers.items() if at not in self.ended}
        at = coming.get(path)
        if at is None:
            for place in coming:
                if place.startswith(path.rstrip("/") + "/") and (os.path.isdir(path) or not os.path.exists(path)):
                    raise SeamlessError("the input '%s' is a directory in which a queued command will make '%s'; name the files that are "
                                        "needed, or submit this when that command has ended" % (path, place))
                if path.startswith(place + "/"):
                    raise SeamlessError("the input '%s' is inside '%s', which a queued command will make as a whole; make that the input, "
                                        "or submit this when that command has ended" % (path, place))
            return None
        submission = self.submissions[at]
        server = next(target.server for target in submission.targets if self.place(submission.params, target) == path)
        return "%s.%s" % (submission.id, server)

    # --- writing --------------------------------------------------------------------------------------

    def append(self, record: _t.Mapping, create: bool = True, indent: _t.Optional[int] = None) -> None:
        """Add a record; it is durable when this returns.  Raises ``SeamlessError``, also if its makers are gone with their file."""
        data = json.dumps(record, indent=indent).encode("ascii") + b"\0"
        with self.locked():
            if record.get("futures") and self.is_replaced():
                raise SeamlessError("the queue %s ended while this command was being submitted, which would wait in vain for its input '%s'; "
                                    "submit it again" % (self.path, next(iter(record["futures"]))))
            try:
                is_new = not os.path.exists(self.path)
                fd = os.open(self.path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o666)
                try:
                    size = os.fstat(fd).st_size
                    if size and os.pread(fd, 1, size - 1) != b"\0":
                        data = b"\0" + data                 # a writer was killed half-way: close what it left
                    if os.write(fd, data) != len(data):
                        os.ftruncate(fd, size)
                        raise OSError(0, "the disk is full")
                    os.fsync(fd)
                finally:
                    os.close(fd)
                if is_new:
                    sync_folder(os.path.dirname(self.path))
            except OSError as exc:
                raise SeamlessError("the queue file %s cannot be written: %s" % (self.path, exc.strerror)) from exc

    def end(self, submission: Submission, result: _t.Optional[Checksum], message: str = "") -> None:
        """Note that a command has ended, with or without a result."""
        self.append({"queue_command": "ENDED", "at": submission.at, "result": result, "message": message}, create=False)
        self.ended[submission.at] = Ended(result, message)

    def remove(self) -> bool:
        """Remove the file, unless something was submitted meanwhile; if submissions were left out, rename it."""
        with self.locked():
            self.update()
            if self.pending():
                return False
            if self.left_out:
                self.kept = "%s.%s.LEFT-OUT" % (self.path, os.urandom(4).hex())
                os.rename(self.path, self.kept)
            remove_file(self.path)
            return True

    @contextlib.contextmanager
    def locked(self):
        """Nobody else writes while the ``with`` block runs, Seamless 1.x included."""
        lock, seen, since = self.path + ".LOCK", None, time.monotonic()
        while True:
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                break
            except FileExistsError:
                pass                        # somebody else has it
            except OSError as exc:
                raise SeamlessError("the queue file %s cannot be locked: %s" % (self.path, exc.strerror)) from exc
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(lock)
                if (status.st_ino, status.st_mtime) != seen:
                    seen, since = (status.st_ino, status.st_mtime), time.monotonic()
                if max(time.time() - status.st_mtime, time.monotonic() - since) > LOCK_STALE_S:
                    self._break(lock, status)
                    continue
            time.sleep(POLL_S)
        try:
            yield
        finally:
            remove_file(lock)

    @staticmethod
    def _break(lock: str, stale: os.stat_result) -> None:
        """Remove the lock of a dead process, but not a fresh one that has taken its place."""
        aside = "%s.%s" % (lock, os.urandom(4).hex())
        os.rename(lock, aside)
        if os.stat(aside).st_ino != stale.st_ino:
            with contextlib.suppress(OSError):
                os.link(aside, lock)
        remove_file(aside)

    # --- who runs it ----------------------------------------------------------------------------------

    @property
    def running(self) -> str:
        """The file that is locked while a queue runs."""
        return self.path + ".RUNNING"

    def hold(self) -> _t.TextIO:
        """Become the one queue of this file, until the answer is closed.  Raises ``SeamlessError`` if there is one."""
        end = time.monotonic() + 1.0                        # ``is_held`` holds it for a moment
        while True:
            try:
                file = open(self.running, "a+", encoding="utf-8")
            except OSError as exc:
                raise SeamlessError("the file %s cannot be written: %s" % (self.running, exc.strerror)) from exc
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.running)):
                    file.truncate(0)
                    with contextlib.suppress(OSError):      # it is only for a message
                        os.write(file.fileno(), b"%d\n" % os.getpid())
                    return file
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    raise SeamlessError("a seamless-queue (process %s) is running the commands in %s already; submit to that one, or end "
                                        "it with seamless-queue-finish" % (file.read().strip() or "?", self.path)) from None
            except FileNotFoundError:
                pass                                        # the last one has just ended
            file.close()
            time.sleep(POLL_S)

    def is_held(self) -> bool:
        """True while a queue of ours runs the commands in this file."""
        try:
            with open(self.running, encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True


def _records(chunk: bytes) -> _t.Iterator[_t.Tuple[int, _t.Optional[dict]]]:
    """(offset, record) of what stands between two NULs; None for what is no record.

    Seamless 1.x appends right behind what a killed writer has left: a whole record behind half of one is found.
    """
    begin = max(chunk.rfind(mark) for mark in _BEGINS)
    for start in dict.fromkeys((0, max(begin, 0))):
        try:
            record = json.loads(chunk[start:])
        except ValueError:
            if chunk:
                yield start, None
        else:
            yield start, record if isinstance(record, dict) else None
            return
