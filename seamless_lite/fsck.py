"""``Fsck``: whether what a store holds is what its names and rows say.

    files   every buffer is hashed, several side by side -> damaged, misnamed, left over
    rows    each rule is an SQL condition that no sound row meets; rows against rows, rows against buffers
    walk    what the rows refer to (references.closure) -> buffers that nothing refers to, buffers that are missing

Each finding is told at once.  With ``repair``, what is damaged is looked at once more and then moved into a
folder of ``.quarantine`` of the store, or, a row, copied there and removed; a line in its ``note.jsonl`` is on
disk before.  Nothing is deleted, and nothing that others are writing is touched: that has a temporary name.
"""
import contextlib
import itertools
import json
import os
import re
import stat
import threading
import time
import typing as _t
from concurrent.futures import ThreadPoolExecutor

from . import compressed, references
from .checksum import Checksum, is_checksum
from .cpus import usable_cpus
from .durable import FOLDER_MODE, MISSING, make_folder, sync_folder
from .errors import CacheMissError, CorruptBufferError, SeamlessError
from .folder import ASIDE, STALE_S, SUFFIXES, Folder
from .gc import is_store
from .progress import Progress, is_watched
from .resulttable import ResultTable

QUARANTINE = ".quarantine"
#: A damaged file that is younger may just be copied into the store by hand.
YOUNG_S = 60.0
_TOGETHER, _PAGE = 256, 1000
_TEMPORARY = re.compile(r"([0-9a-f]{64}(\.zst|\.gz|\.BUFFERLENGTH)?|\.HASHSERVER_PREFIX)-\w{8}\Z")
_NAME = re.compile(r"([0-9a-fA-F]{64})(\.zst|\.gz|\.BUFFERLENGTH|(?:\.zst|\.gz)?\.CORRUPT)?\Z")
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


class Finding(_t.NamedTuple):
    """``where``: a path in the store, or a row.  ``damage``: else it is only worth knowing."""
    kind: str
    where: str
    text: str
    damage: bool = True
    size: int = 0
    repaired: bool = False


class Looked(_t.NamedTuple):
    """What one file turned out to be: ``checksum`` if it is a good form of that buffer."""
    size: int
    checksum: _t.Optional[Checksum] = None
    finding: _t.Optional[Finding] = None


def look(directory: str, path: str, quick: bool = False, seen: _t.Callable[[int], None] = lambda n: None) -> _t.Optional[Looked]:
    """Judge one file of a store; None if it has gone, or is being written.  ``seen`` hears how much was read."""
    where = os.path.relpath(path, directory)
    try:
        status = os.stat(path)
        return _judge(path, where, status, quick, seen)
    except MISSING:
        if os.path.islink(path):
            return Looked(0, None, Finding("dangling", where, "it is a link to %s, which is not there" % os.readlink(path)))
        return None
    except CacheMissError as exc:
        return Looked(status.st_size, None, Finding("unchecked", where, exc.args[0], False))
    except OSError as exc:
        return Looked(0, None, Finding("unreadable", where, "it cannot be read: %s" % exc.strerror))


def _judge(path: str, where: str, status, quick: bool, seen) -> _t.Optional[Looked]:
    def found(kind, text, damage=True):
        return Looked(status.st_size, None, Finding(kind, where, text, damage, status.st_size))
    name, match = os.path.basename(path), _NAME.match(os.path.basename(path))
    if name.endswith(ASIDE):
        return None                             # it is up to seamless-gc
    if _TEMPORARY.match(name):
        is_old = time.time() - status.st_mtime > STALE_S
        return found("stale", "it was left behind by a writer that was killed") if is_old else None
    if not match:
        return found("foreign", "it is not a buffer", False) if os.path.dirname(where) and not name.startswith(".") else None
    if not stat.S_ISREG(status.st_mode):
        return found("misnamed", "it has the name of a buffer, but is not a file")
    checksum, suffix = Checksum(match[1]), match[2] or ""
    if suffix.endswith(".CORRUPT"):
        return found("corrupt", "it was set aside by a reader, because it was damaged")
    if name != checksum + suffix or os.path.dirname(where) not in ("", checksum[:2]):
        return found("misnamed", "no reader looks for it under this name: it belongs to %s/%s" % (checksum[:2], checksum + suffix))
    if suffix == ".BUFFERLENGTH":
        text = _wrong_length(path, checksum, quick)
        return found("length", text) if text else Looked(status.st_size)
    if quick:
        if not status.st_size and (suffix or checksum != Checksum.of(b"")):
            return found("corrupt", "it is empty")
        return Looked(status.st_size, checksum)
    problem = _wrong_content(path, suffix, checksum, seen)
    return found(*problem) if problem else Looked(status.st_size, checksum)


def _wrong_content(path: str, suffix: str, checksum: Checksum, seen) -> _t.Optional[_t.Tuple[str, str]]:
    with contextlib.suppress(CorruptBufferError):
        actual = compressed.hash_pieces(_pieces(path, suffix, seen))
        if actual == checksum:
            return None
    with open(path, "rb") as file:
        start = file.read(4)
    if suffix and compressed.is_whole(path, "", checksum):
        return "misnamed", "it is this buffer itself, not compressed"
    inside = _MAGIC.get(start, _MAGIC.get(start[:2], ""))
    if inside and inside != suffix and compressed.is_whole(path, inside, checksum):
        return "misnamed", "it is this buffer, compressed as %s" % inside
    if not start:
        return "corrupt", "it is empty"
    return "corrupt", "it is not whole %s data" % suffix if suffix else "its %d bytes are those of %s" % (os.path.getsize(path), actual)


def _pieces(path: str, suffix: str, seen: _t.Callable[[int], None]) -> _t.Iterator[bytes]:
    for part in compressed.pieces(path, suffix):
        seen(len(part))
        yield part


def _wrong_length(path: str, checksum: Checksum, quick: bool) -> str:
    """What is wrong with a ``.BUFFERLENGTH``; "" if nothing is."""
    with open(path, "rb") as file:
        text = file.read(33)
    forms = [suffix for suffix in SUFFIXES if os.path.exists(path[:-len(".BUFFERLENGTH")] + suffix)]
    if not forms:
        return "it is the length of a buffer that is not there"
    if not re.match(rb"[0-9]{1,20}\Z", text):
        return "it does not hold a number"
    base = path[:-len(".BUFFERLENGTH")]
    try:
        length = os.path.getsize(base) if "" in forms else -1 if quick else sum(map(len, compressed.pieces(base + forms[0], forms[0])))
    except CorruptBufferError:
        length = -1                             # the buffer itself is the finding
    return "it says %s bytes, but the buffer has %d" % (text.decode(), length) if length not in (-1, int(text)) else ""


class Quarantine:
    """A new folder in ``.quarantine`` of the store, made when the first thing comes into it."""

    def __init__(self, directory: str):
        self._base, self.folder = os.path.join(directory, QUARANTINE), ""

    def note(self, entries: _t.Iterable[dict]) -> None:
        """Append lines to the note; on disk on return."""
        if not self.folder:
            self.folder = os.path.join(self._base, time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + os.urandom(2).hex())
            for path in (self._base, self.folder):
                make_folder(path, FOLDER_MODE)
                sync_folder(os.path.dirname(path))
        with open(os.path.join(self.folder, "note.jsonl"), "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)

    def take(self, path: str, finding: Finding) -> str:
        """Move a file here; returns where it is now."""
        name = "%s-%s" % (os.urandom(4).hex(), os.path.basename(path))
        self.note([{"time": time.time(), "was": finding.where, "now": name, "why": "%s: %s" % (finding.kind, finding.text)}])
        target = os.path.join(self.folder, name)
        os.rename(path, target)
        sync_folder(os.path.dirname(path))
        sync_folder(self.folder)
        return target


def _bad(*columns: str) -> str:
    return " OR ".join("typeof(t.\"{0}\") <> 'text' OR length(t.\"{0}\") <> 64 OR t.\"{0}\" GLOB '*[^0-9a-f]*'".format(column)
                       for column in columns)


_PAIR = _bad("checksum", "result")
_OTHER = 'NOT (%s) AND NOT EXISTS (SELECT 1 FROM "%%s" o WHERE o."result" = t."result" AND o."checksum" = t."checksum")' % _PAIR
_UNKNOWN, _RECORDS = _OTHER % "transformation", "NOT (%s)" % _PAIR
#: table, kind, what is wrong with the rows that meet the condition
_RULES = (
    ("transformation", "malformed", "its names are not checksums", _PAIR),
    ("rev_transformation", "malformed", "its names are not checksums", _PAIR),
    ("meta_data", "malformed", "its names are not checksums", _PAIR),
    ("irreproducible_transformation", "malformed", "its names are not checksums", _PAIR),
    ("buffer_info", "malformed", "its name is not a checksum", _bad("checksum")),
    # Seamless 1.x leaves such rows behind when a transformation yields something else: they are no damage
    ("rev_transformation", "outdated", "no transformation has this result", _UNKNOWN),
    ("meta_data", "outdated", "it is the record of a result that the transformation does not have", _UNKNOWN),
    ("meta_data", "malformed", "it is not the execution record of this result", _RECORDS))
#: more tables whose columns name buffers
_NAMING = (("irreproducible_transformation", "checksum"), ("irreproducible_transformation", "result"), ("expression", "result"),
           ("expression", "input_checksum"), ("syntactic_to_semantic", "syntactic"), ("syntactic_to_semantic", "semantic"),
           ("bucket_probe", "bucket_checksum"))


def is_record(metadata, checksum: str, result: str) -> bool:
    """Whether the text ``metadata`` is a JSON object, and not the execution record of another transformation or result."""
    try:
        record = json.loads(metadata)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("tf_checksum", checksum) == checksum and record.get("result_checksum", result) == result


class Fsck:
    """Check the folder ``directory`` and, unless it is None, the result table ``database``; each finding goes to ``tell``.

    ``quick``: names and sizes only.  ``who`` begins the progress line.  After ``run``, ``damage`` and ``repaired`` say how
    many, and ``buffers``, ``size``, ``rows`` what was looked at.
    """

    def __init__(self, directory: str, database: _t.Optional[str], tell: _t.Callable[[Finding], None], quick: bool = False,
                 repair: bool = False, who: _t.Optional[str] = None):
        self.directory, self.database = os.path.abspath(directory), database
        self.quarantine = Quarantine(self.directory)
        self.damage = self.repaired = self.buffers = self.size = self.rows = 0
        self._tell, self._quick, self._repair, self._who = tell, quick, repair, who
        self._folder = Folder(self.directory, writable=False)
        self._good: _t.Dict[Checksum, int] = {}
        self._bad: _t.Set[str] = set()

    def run(self) -> None:
        """Look at everything.  Raises ``SeamlessError`` if the folder or the table cannot be read at all."""
        if not os.path.isdir(self.directory):
            raise SeamlessError("the buffer folder %s does not exist: nothing was stored there yet, or it was moved" % self.directory)
        try:
            self._check_files()
        except OSError as exc:
            raise SeamlessError("the buffer folder %s cannot be read: %s" % (exc.filename or self.directory, exc.strerror)) from exc
        if self.database is not None and os.path.exists(self.database):
            table = ResultTable(self.database)      # what a writer that crashed left is put right by SQLite
            try:
                self._check_rows(table)
            except SeamlessError as exc:
                self._report(Finding("database", self.database, exc.args[0]))
            finally:
                table.close()

    def _report(self, *findings: Finding, repair: _t.Optional[_t.Callable[[], _t.Any]] = None) -> None:
        """Tell findings, which one call of ``repair`` repairs."""
        if self._repair and repair is not None and findings:
            try:
                repair()
                findings = tuple(finding._replace(repaired=True) for finding in findings)
            except (OSError, SeamlessError) as exc:
                findings = tuple(finding._replace(text="%s; it could not be repaired (%s)" % (finding.text, exc)) for finding in findings)
        for finding in findings:
            self.damage += finding.damage
            self.repaired += finding.damage and finding.repaired
            self._tell(finding)

    # ---- files

    def _files(self) -> _t.Iterator[os.DirEntry]:
        folders = [self.directory]
        for folder in folders:
            with contextlib.suppress(*MISSING), os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=True) or _NAME.match(entry.name):
                        yield entry
                    elif folder == self.directory and re.match("[0-9a-f]{2}\\Z", entry.name) and not is_store(entry.path):
                        folders.append(entry.path)      # others are stores of subprojects and stages

    def _check_files(self) -> None:
        total = 0
        for entry in self._files() if self._who is not None and is_watched() and not self._quick else ():
            with contextlib.suppress(OSError):
                total += entry.stat().st_size
        stopped = threading.Event()
        files = self._files()
        pool = ThreadPoolExecutor(min(8, usable_cpus() + 1))

        def seen(n: int) -> None:
            if stopped.is_set():                # Ctrl-C shall not wait for the end of a large file
                raise SeamlessError("interrupted")
            progress.add(n)
        try:
            with Progress("check", total, self._who) as progress:
                for part in iter(lambda: list(itertools.islice(files, _TOGETHER)), []):
                    found = pool.map(lambda entry: look(self.directory, entry.path, self._quick, seen), part)
                    for entry, looked in zip(part, found):
                        if looked is not None:
                            self._note(entry.path, looked)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _note(self, path: str, looked: Looked) -> None:
        if looked.checksum is not None:
            self.buffers += looked.checksum not in self._good
            self.size += looked.size
            self._good[looked.checksum] = self._good.get(looked.checksum, 0) + looked.size
        if looked.finding is not None:
            if looked.finding.kind in ("corrupt", "dangling", "unreadable", "misnamed"):
                self._bad.add(os.path.basename(path)[:64])
            movable = looked.finding.damage and looked.finding.kind != "unreadable"
            self._report(looked.finding, repair=(lambda: self._set_aside(path, looked.finding)) if movable else None)

    def _set_aside(self, path: str, finding: Finding) -> None:
        if finding.kind in ("corrupt", "length") and time.time() - os.stat(path).st_mtime < YOUNG_S:
            raise SeamlessError("somebody wrote it less than a minute ago, and may not be done: repair it later")
        again = look(self.directory, path, self._quick)
        if again is not None and again.finding is not None and again.finding.kind == finding.kind:
            target = self.quarantine.take(path, finding)
            name = os.path.basename(path)
            if finding.kind == "corrupt" and is_checksum(name[:64]) and name[64:] in SUFFIXES and compressed.is_whole(
                    target, name[64:], Checksum(name[:64])):
                with contextlib.suppress(FileExistsError):
                    os.link(target, path)       # somebody has replaced it in the moment between

    # ---- rows

    def _check_rows(self, table: ResultTable) -> None:
        check = "quick_check" if self._quick else "integrity_check"
        problems = [text for text, in table.query("PRAGMA %s(20)" % check) if text != "ok"]
        for text in problems:
            self._report(Finding("database", table.path, "SQLite says: %s" % text))
        if problems:
            return                              # no row can be trusted; a copy of the file can
        tables = {name for name, in table.query("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for name, kind, text, condition in _RULES:
            if name in tables and not (self._quick and condition == _RECORDS):
                self._check_rule(table, name, kind, text, condition)
        self._check_ways_back(table)
        missing = self._check_results(table) if "transformation" in tables else set()
        if not self._quick:
            self._walk(table, tables, missing)

    def _pages(self, table: ResultTable, select: str) -> _t.Iterator[_t.List[tuple]]:
        """The rows of ``select``, which begins with the rowid and ends with a condition; the table is not locked meanwhile."""
        rows, last = None, -1 << 62
        while rows is None or rows:
            rows = table.query(select + " AND t.rowid > ? ORDER BY t.rowid LIMIT %d" % _PAGE, (last,))
            last = rows[-1][0] if rows else last
            yield rows

    def _select(self, table: ResultTable, name: str, columns: str, condition: str) -> _t.Iterator[tuple]:
        """``columns`` of the rows that meet the condition."""
        for page in self._pages(table, 'SELECT t.rowid, %s FROM "%s" t WHERE (%s)' % (columns, name, condition)):
            yield from (row[1:] for row in page)

    def _check_rule(self, table: ResultTable, name: str, kind: str, text: str, condition: str) -> None:
        columns = [row[1] for row in table.query('PRAGMA table_info("%s")' % name)]
        select = 'SELECT t.rowid, %s FROM "%s" t WHERE (%s)' % (
            ", ".join('typeof(t."{0}"), hex(CAST(t."{0}" AS BLOB))'.format(column) for column in columns), name, condition)

        def wrong(rows):
            values = [(row[0], {column: _value(*row[2 * n + 1:2 * n + 3]) for n, column in enumerate(columns)}) for row in rows]
            return [row for row in values if condition != _RECORDS or not is_record(*(row[1][key] for key in ("metadata", "checksum", "result")))]

        def remove(db):                         # those that are still as they were found
            gone = wrong([row for rowid in found for row in db.execute(select + " AND t.rowid = ?", (rowid,))])
            if gone:
                self.quarantine.note({"time": time.time(), "table": name, "row": row, "why": text} for _, row in gone)
            db.executemany('DELETE FROM "%s" WHERE rowid = ?' % name, [(rowid,) for rowid, _ in gone])
        for page in self._pages(table, select):
            found = dict(wrong(page))
            if found:
                self._report(*(Finding(kind, "%s %s" % (name, row["checksum"]), text, kind != "outdated") for row in found.values()),
                             repair=self._write(remove))

    def _write(self, change: _t.Callable) -> _t.Callable[[], None]:
        return lambda: ResultTable(self.database).write(change)

    def _check_ways_back(self, table: ResultTable) -> None:
        condition = _OTHER % "rev_transformation"
        add = self._write(lambda db: db.execute('INSERT INTO "rev_transformation" ("result", "checksum") '
                                                'SELECT "result", "checksum" FROM "transformation" t WHERE ' + condition))
        self._report(*(Finding("inconsistent", "transformation " + name, "its result has no way back (rev_transformation)")
                       for name, in self._select(table, "transformation", '"checksum"', condition)), repair=add)

    # ---- rows and buffers

    # What ``references.closure`` needs of a store.  A Folder would note that all this is used, move damaged files aside, and
    # wait for locks.

    def has(self, names: _t.Iterable[Checksum]) -> _t.List[bool]:
        """Which are there and good, those that came meanwhile included."""
        return [name in self._good or name not in self._bad and bool(self._folder.forms(name)) for name in names]

    def length(self, name: Checksum) -> _t.Optional[int]:
        """The size of the files."""
        return self._good.get(name, 0) if self.has([name])[0] else None

    def get(self, name: Checksum) -> _t.Optional[bytes]:
        """The bytes, verified."""
        return self._folder.peek(name)

    def _check_results(self, table: ResultTable) -> _t.Set[Checksum]:
        """Tell rows without buffers; returns what is missing."""
        missing = set()
        for name, result in self._select(table, "transformation", '"checksum", "result"', "NOT (%s)" % _PAIR):
            self.rows += 1
            name, result = Checksum(name), Checksum(result)
            has_name, has_result = self.has((name, result))
            if has_name and has_result:
                continue
            missing.update(part for part, there in ((name, has_name), (result, has_result)) if not there)
            if has_result:
                text = "the transformation's own buffer is missing: its result is found, but cannot be computed again"
            elif not has_name:
                text = "neither the transformation nor its result %s is there" % result
            else:
                text = "its result %s is not there (scratch, or deleted)" % result
                if not self._quick:
                    text += ", nor are all of its inputs" if references.closure([name], self).missing else "; it can be computed again"
            self._report(Finding("missing", "transformation " + name, text, False))
        return missing

    def _walk(self, table: ResultTable, tables: _t.Set[str], missing: _t.Set[Checksum]) -> None:
        def roots():
            for name, column in (("transformation", "checksum"), *_NAMING):
                if name in tables:
                    yield from (root for root, in self._select(table, name, '"%s"' % column, "NOT (%s)" % _bad(column)))
        found = references.closure(roots(), self, _SoundRows(table))
        for name in sorted(found.missing - missing):
            self._report(Finding("missing", name[:2] + "/" + name, "a row or a transformation refers to it, but it is not there", False))
        for name, size in self._good.items():
            if name not in found.checksums:
                self._report(Finding("orphan", name[:2] + "/" + name, "no row refers to it, nor does what the rows refer to", False, size))


class _SoundRows:
    """For ``references.closure``: the results in a table, without malformed rows."""

    def __init__(self, table: ResultTable):
        self._table = table

    def get_many(self, names: _t.Sequence[Checksum]) -> _t.Dict[Checksum, Checksum]:
        found = {}
        for start in range(0, len(names), 500):
            part = names[start:start + 500]
            found.update(self._table.query('SELECT "checksum", "result" FROM "transformation" t WHERE "checksum" IN (%s) AND NOT (%s)'
                                           % (",".join("?" * len(part)), _PAIR), part))
        return {Checksum(name): Checksum(result) for name, result in found.items()}


def _value(kind: str, hexadecimal: str):
    """A column for the note: text as it is, all else with its type."""
    data = bytes.fromhex(hexadecimal)
    with contextlib.suppress(UnicodeDecodeError):
        if kind == "text":
            return data.decode("utf-8")
    return {"type": kind, "hex": hexadecimal}
