"""Result stores without HTTP: ``ResultTable`` (the SQLite file ``seamless.db`` of Seamless 1.x) and ``MemoryResults``.

A result row says which buffer a transformation yields.  Both stores, and ``database.DatabaseClient``, have
the same methods; ``MemoryResults`` documents them.  A transformation that yields something else when it runs again is
irreproducible: all its results are kept as such, none is its result any more, and so it runs whenever it is asked for.
Programs that merely run it at the same moment do not run it again: the first result that is recorded stays.

Threads share one connection behind one lock.  Writes queue up in front of that lock, and whoever gets it
commits everything that is queued: concurrent writers share one commit, and each returns after it.
Several processes may use the file at the same time; a fork waits for the commit that is under way.
"""
import collections
import json
import os
import sqlite3
import threading
import time
import typing as _t
import weakref

from .checksum import Checksum
from .durable import MISSING, make_folders
from .errors import DeadlineError, SeamlessError

BUSY_S = 30.0
GROUP = 1000        # writes that share one commit at most
PAGE = 1000         # results that are listed at once
GAP_S = 0.0005      # at least so long after a commit other processes can begin theirs
SCHEMA = '''
CREATE TABLE IF NOT EXISTS "transformation" ("checksum" CHAR(64) NOT NULL PRIMARY KEY, "result" CHAR(64) NOT NULL);
CREATE TABLE IF NOT EXISTS "rev_transformation" ("id" INTEGER NOT NULL PRIMARY KEY, "result" CHAR(64) NOT NULL, "checksum" CHAR(64) NOT NULL);
CREATE TABLE IF NOT EXISTS "meta_data" ("checksum" CHAR(64) NOT NULL PRIMARY KEY, "result" CHAR(64) NOT NULL, "metadata" TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS "irreproducible_transformation" ("id" INTEGER NOT NULL PRIMARY KEY, "result" CHAR(64) NOT NULL, "checksum" CHAR(64) NOT NULL, "metadata" TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS "buffer_info" ("checksum" CHAR(64) NOT NULL PRIMARY KEY, "buffer_info" TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS "syntactic_to_semantic" ("syntactic" CHAR(64) NOT NULL, "celltype" TEXT NOT NULL, "subcelltype" TEXT NOT NULL, "semantic" CHAR(64) NOT NULL, PRIMARY KEY ("syntactic", "celltype", "subcelltype", "semantic"));
CREATE TABLE IF NOT EXISTS "expression" ("input_checksum" CHAR(64) NOT NULL, "path" VARCHAR(100) NOT NULL, "celltype" VARCHAR(20) NOT NULL, "target_celltype" VARCHAR(20) NOT NULL, "validator" CHAR(64), "validator_language" VARCHAR(20), "result" CHAR(64) NOT NULL, PRIMARY KEY ("input_checksum", "path", "celltype", "target_celltype"));
CREATE TABLE IF NOT EXISTS "bucket_probe" ("bucket_kind" VARCHAR(20) NOT NULL, "label" TEXT NOT NULL, "bucket_checksum" CHAR(64) NOT NULL, "captured_at" TEXT NOT NULL, "freshness_tokens" TEXT NOT NULL, PRIMARY KEY ("bucket_kind", "label"));
'''
TABLES = {statement.split('"')[1] for statement in SCHEMA.split(";")[:-1]}
INDEXES = (("transformation", "result"), ("rev_transformation", "result"), ("meta_data", "result"),
           ("irreproducible_transformation", "result"), ("irreproducible_transformation", "checksum"),
           ("syntactic_to_semantic", "syntactic"), ("syntactic_to_semantic", "semantic"),
           ("expression", "result"), ("bucket_probe", "bucket_checksum"))
Row = _t.Tuple[str, str, _t.Optional[dict]]


class MemoryResults:
    """Results in the memory of this process.  Safe from several threads, as all stores are."""

    def __init__(self):
        self._results: _t.Dict[str, Checksum] = {}
        self._irreproducible: _t.Dict[str, _t.Dict[Checksum, None]] = {}

    def get(self, transformation) -> _t.Optional[Checksum]:
        """The result of the transformation with this checksum; None if it is not known."""
        return self._results.get(Checksum(transformation))

    def get_many(self, transformations: _t.Iterable) -> _t.Dict[str, Checksum]:
        """Those of the results that are known."""
        names = [Checksum(name) for name in transformations]
        return {name: self._results[name] for name in names if name in self._results}

    def put(self, transformation, result, metadata: _t.Optional[dict] = None, again: bool = False) -> None:
        """Record a result, and with ``metadata`` how it was made; on disk on return.

        Idempotent.  The first result stays; but if it was known when the transformation ran ``again``, another one makes
        that irreproducible, with a warning.
        """
        self.put_many([(transformation, result, metadata)], again)

    def put_many(self, rows: _t.Iterable[Row], again: bool = False) -> None:
        """Record all rows (transformation, result, metadata or None) in one commit."""
        for name, result in [(Checksum(name), Checksum(result)) for name, result, _ in rows]:
            before = result if name in self._irreproducible else self._results.setdefault(name, result)
            if name in self._irreproducible or again and before != result:
                self._irreproducible.setdefault(name, {}).update({before: None, result: None})
                self._results.pop(name, None)
                if before != result:
                    warn_irreproducible(name, before, result)

    def forget(self, transformation) -> bool:
        """Remove everything that is recorded about the transformation; False if nothing was."""
        name = Checksum(transformation)
        irreproducible = self._irreproducible.pop(name, None) is not None
        return self._results.pop(name, None) is not None or irreproducible

    def irreproducible(self, transformation) -> _t.List[Checksum]:
        """All results of a transformation that is known to be irreproducible; none of one that is not."""
        return list(self._irreproducible.get(Checksum(transformation), ()))

    def reverse(self, result) -> _t.List[str]:
        """The transformations that have this result."""
        wanted = Checksum(result)
        return [name for name, found in list(self._results.items()) if found == wanted]

    def recent(self, before=None) -> _t.Optional[_t.List[_t.Tuple[_t.Any, str]]]:
        """(mark, transformation) of what has run, the last one first: a page of those before the mark ``before``.

        Irreproducible ones are at the end, perhaps more than once.  Empty: there are no more.  None: this store cannot list them.
        """
        names = [*self._irreproducible, *self._results][:before]
        return [(n, names[n]) for n in range(len(names) - 1, max(-1, len(names) - 1 - PAGE), -1)]

    def close(self) -> None:
        """Give back what is held open."""


class _Write:
    """One queued write: a function of the connection, and what became of it."""
    __slots__ = ("function", "done", "value", "error")

    def __init__(self, function):
        self.function, self.done, self.value, self.error = function, False, None, None


class ResultTable:
    """As ``MemoryResults``, but in the SQLite file ``path``, which need not exist yet: the first write makes it, and its folder.

    Errors are a ``SeamlessError`` of one sentence; a file that others keep locked for 30 s is a ``DeadlineError``.
    """

    def __init__(self, path, writable: bool = True):
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.writable = writable
        self._db: _t.Optional[sqlite3.Connection] = None
        self._opened: _t.Optional[_t.Tuple[int, int]] = None    # device and inode of the open file
        self._is_readable = self._is_complete = False           # there are tables; all tables are there
        self._queue: "collections.deque[_Write]" = collections.deque()
        self._lock = threading.RLock()
        self._last_commit = 0.0
        _tables.add(self)

    # ---- the interface of all result stores

    def get(self, transformation) -> _t.Optional[Checksum]:
        rows = self.query('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (Checksum(transformation),))
        return Checksum(rows[0][0]) if rows else None

    def get_many(self, transformations: _t.Iterable) -> _t.Dict[str, Checksum]:
        names, found = [Checksum(name) for name in transformations], {}
        for start in range(0, len(names), 500):         # SQLite takes at most 999 parameters
            part = names[start:start + 500]
            found.update(self.query('SELECT "checksum", "result" FROM "transformation" WHERE "checksum" IN (%s)'
                                    % ",".join("?" * len(part)), part))
        return {Checksum(name): Checksum(result) for name, result in found.items()}

    put = MemoryResults.put

    def put_many(self, rows: _t.Iterable[Row], again: bool = False) -> None:
        checked = [(Checksum(name), Checksum(result), metadata) for name, result, metadata in rows]

        def insert(db):
            return [(name, before, result) for name, result, metadata in checked
                    for before in [record_row(db, name, result, metadata, again)] if before is not None]
        for differing in self.write(insert):
            warn_irreproducible(*differing)

    def forget(self, transformation) -> bool:
        name = Checksum(transformation)
        if self.get(name) is None and not self.query('SELECT 1 FROM "meta_data" WHERE "checksum" = ?', (name,)) \
                and not self.irreproducible(name):
            return False

        def delete(db):
            marked = db.execute('DELETE FROM "irreproducible_transformation" WHERE "checksum" = ?', (name,)).rowcount
            return forget_row(db, name) or marked > 0
        return self.write(delete)

    def irreproducible(self, transformation) -> _t.List[Checksum]:
        rows = self.query('SELECT "result" FROM "irreproducible_transformation" WHERE "checksum" = ? ORDER BY "id"',
                          (Checksum(transformation),))
        return [Checksum(result) for result, in rows]

    def reverse(self, result) -> _t.List[str]:
        rows = self.query('SELECT "checksum" FROM "transformation" WHERE "result" = ?', (Checksum(result),))
        return [name for name, in rows]     # rev_transformation may hold stale and double rows of Seamless 1.x

    def recent(self, before=None) -> _t.List[_t.Tuple[_t.Any, str]]:
        before = (1 << 63) - 1 if before is None else before
        rows = self.query('SELECT "rowid", "checksum" FROM "transformation" WHERE "rowid" < ? ORDER BY "rowid" DESC LIMIT ?',
                          (before, PAGE))
        return rows or self.query('SELECT -"id", "checksum" FROM "irreproducible_transformation" WHERE "id" > ? ORDER BY "id" LIMIT ?',
                                  (max(0, -before), PAGE))

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._disconnect()

    # ---- for the database service, which keeps more than results

    def query(self, sql: str, parameters=()) -> _t.List[tuple]:
        """The rows of a SELECT; none if the file is not there."""
        with self._lock:
            try:
                db = self._connect()
                if db is None or not (self._is_readable or self._has_tables(db)):
                    return []
                return db.execute(sql, parameters).fetchall()
            except (sqlite3.Error, OSError) as exc:
                self._disconnect()
                if "no such table" in str(exc):     # an older Seamless made it, or one is making it; the next write completes it
                    return []
                raise self._sentence(exc) from exc

    def write(self, function: _t.Callable[[sqlite3.Connection], _t.Any]):
        """``function(connection)`` in a transaction that others may share; returns its value after the commit.

        It looks first and writes then, so that an exception of its own needs no rollback; it may be called
        again if the commit is interrupted.
        """
        if not self.writable:
            raise SeamlessError("the result table %s is open for reading only" % self.path)
        mine = _Write(function)
        self._queue.append(mine)
        with self._lock:
            while not mine.done:
                self._commit()
        if mine.error is not None:
            raise mine.error
        return mine.value

    # ---- the file

    def _commit(self) -> None:
        """Run and commit what is queued.  The caller holds the lock."""
        if time.monotonic() - self._last_commit < GAP_S:
            time.sleep(GAP_S)
        group = [self._queue.popleft() for _ in range(min(GROUP, len(self._queue)))]
        try:
            db = self._connect(create=True)
            self._begin(db)
            if not self._is_complete:
                self._complete(db)
            for write in group:
                _run(write, db)
            db.execute("COMMIT")
        except (sqlite3.Error, OSError, SeamlessError) as exc:
            self._disconnect()                  # which rolls back
            error = exc if isinstance(exc, SeamlessError) else self._sentence(exc)
            for write in group:
                write.error, write.done = error, True
        except BaseException:                   # Ctrl-C: the others who wait will do it again
            self._disconnect()
            self._queue.extendleft(reversed(group))
            raise
        else:
            self._last_commit = time.monotonic()
            for write in group:
                write.done = True

    def _connect(self, create: bool = False) -> _t.Optional[sqlite3.Connection]:
        """The connection to the file that is at ``path`` now; None if there is none and it shall not be made."""
        try:
            status = os.stat(self.path)
            found = (status.st_dev, status.st_ino)
        except MISSING:
            found = None
        if self._db is not None and found != self._opened:
            self._disconnect()                  # somebody removed or replaced the file
        if self._db is None and (found or create):
            if create and not found:
                make_folders(os.path.dirname(self.path))
            mode = "ro" if not self.writable else "rwc" if create else "rw"
            self._db = sqlite3.connect("file:%s?mode=%s" % (_quote(self.path), mode), uri=True, timeout=BUSY_S,
                                       isolation_level=None, check_same_thread=False)
            # EXTRA is FULL, plus a sync of the folder when the journal is removed, which is the commit
            self._db.execute("PRAGMA synchronous = %s" % ("EXTRA" if sqlite3.sqlite_version_info >= (3, 12) else "FULL"))
            status = os.stat(self.path)
            self._opened = (status.st_dev, status.st_ino)
        return self._db

    def _disconnect(self) -> None:
        db, self._db, self._is_readable, self._is_complete = self._db, None, False, False
        if db is not None:
            db.close()

    def _has_tables(self, db) -> bool:
        """False for a file that is empty, or whose first tables a Seamless 1.x has made; the next write makes the others.

        Raises ``SeamlessError`` if it is somebody else's database.
        """
        names = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        self._is_readable = {"transformation", "rev_transformation", "meta_data"} <= names
        if not self._is_readable and not names <= TABLES:
            raise SeamlessError("%s is the database of another program: move it away, or choose another place "
                                "for the results" % self.path)
        return self._is_readable

    def _complete(self, db) -> None:
        """Make the tables that are not there, in the transaction that has begun."""
        columns = [row[1] for row in db.execute('PRAGMA table_info("meta_data")')]
        if columns and "result" not in columns:
            if db.execute('SELECT 1 FROM "meta_data" LIMIT 1').fetchone():
                raise SeamlessError("the result table %s was made by an old version of Seamless, whose metadata "
                                    "names no results: move it away to begin a new one" % self.path)
            db.execute('DROP TABLE "meta_data"')
        else:
            self._has_tables(db)
        for statement in SCHEMA.split(";"):
            db.execute(statement)
        for table, column in INDEXES:
            db.execute('CREATE INDEX IF NOT EXISTS "%s_%s" ON "%s" ("%s")' % (table, column, table, column))
        self._is_readable = self._is_complete = True

    def _begin(self, db) -> None:
        """Begin to write.  A read lock that only later becomes a write lock could be a deadlock.

        SQLite's own way to wait has pauses of up to 0.1 s: it would miss the gaps that a busy writer leaves.
        """
        deadline = time.monotonic() + BUSY_S
        db.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as exc:
                if "locked" not in str(exc) or time.monotonic() > deadline:
                    raise
            time.sleep(os.urandom(1)[0] / 255000)       # up to 1 ms, and not in step with anybody
        db.execute("PRAGMA busy_timeout = %d" % (BUSY_S * 1000))

    def _sentence(self, exc) -> SeamlessError:
        text = str(exc)
        if "locked" in text:
            return DeadlineError("the result table %s has been locked by another process for %d s: wait until it is "
                                 "done, or end it" % (self.path, BUSY_S))
        if "not a database" in text or "malformed" in text or "no such table" in text or "no such column" in text:
            return SeamlessError("the result table %s is damaged or not a result table (%s): move it away to begin a "
                                 "new one, or put back a copy" % (self.path, text))
        if "full" in text:
            return SeamlessError("the result table %s cannot grow: the disk is full; free some space there" % self.path)
        if "readonly" in text or "unable to open" in text or isinstance(exc, PermissionError):
            return SeamlessError("the result table %s cannot be opened or written (%s): check the permissions of the "
                                 "file and its folder" % (self.path, text))
        return SeamlessError("the result table %s cannot be used (%s): look at the file and its disk" % (self.path, text))


def stored_row(db, name: str) -> _t.Tuple[_t.Optional[str], _t.Optional[str], _t.Optional[str]]:
    """(result, result of the metadata, metadata) of a transformation, None where there is no row."""
    result = db.execute('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (name,)).fetchone()
    record = db.execute('SELECT "result", "metadata" FROM "meta_data" WHERE "checksum" = ?', (name,)).fetchone()
    return (result or (None,)) + (record or (None, None))


def put_row(db, name: str, result: str, metadata: _t.Optional[dict]) -> None:
    """Insert the rows of one result.  A transformation row and its rev row come and go together."""
    old = db.execute('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (name,)).fetchone()
    if old is None or old[0] != result:
        if old is not None:
            forget_row(db, name)
        db.execute('INSERT INTO "transformation" VALUES (?, ?)', (name, result))
        db.execute('INSERT INTO "rev_transformation" ("result", "checksum") VALUES (?, ?)', (result, name))
    if metadata is not None:            # the first record of a result stays
        text = json.dumps(metadata, separators=(",", ":"))
        db.execute('INSERT OR IGNORE INTO "meta_data" VALUES (?, ?, ?)', (name, result, text))


def record_row(db, name: str, result: str, metadata: _t.Optional[dict], again: bool) -> _t.Optional[str]:
    """``put_row``, unless the transformation is irreproducible: then the result is added to those it had.

    If it ran ``again`` and ``result`` is another one than recorded, it is irreproducible from now on; returns the recorded one.
    """
    before, recorded, text = stored_row(db, name)
    differs = before not in (None, result)
    if differs and not again:
        return None
    if differs:
        mark_row(db, name, before, text if recorded == before else None)
    elif not db.execute('SELECT 1 FROM "irreproducible_transformation" WHERE "checksum" = ?', (name,)).fetchone():
        put_row(db, name, result, metadata)
        return None
    mark_row(db, name, result, json.dumps(metadata, separators=(",", ":")) if metadata is not None else None)
    return before if differs else None


def mark_row(db, name: str, result: str, metadata: _t.Optional[str]) -> None:
    """Record that ``result`` is one of several that the transformation yields, and delete its other rows."""
    there = 'SELECT 1 FROM "irreproducible_transformation" WHERE "result" = ? AND "checksum" = ?'
    if not db.execute(there, (result, name)).fetchone():
        db.execute('INSERT INTO "irreproducible_transformation" ("result", "checksum", "metadata") VALUES (?, ?, ?)',
                   (result, name, metadata or ""))
    forget_row(db, name)


def warn_irreproducible(name: str, before: str, result: str) -> None:
    """Tell that a transformation yields something else than before."""
    import logging                      # a tenth of a cached run, which has nothing to say
    logging.getLogger(__name__).warning(
        "transformation %s is irreproducible: its result was %s, and is %s now; both are recorded, and it will run "
        "each time (seamless-run --undo forgets that)", name, before, result)


def forget_row(db, name: str) -> bool:
    """Delete the rows of one result; False if there were none."""
    old = db.execute('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (name,)).fetchone()
    if old is not None:                 # there is an index on result, not on checksum
        db.execute('DELETE FROM "rev_transformation" WHERE "result" = ? AND "checksum" = ?', (old[0], name))
        db.execute('DELETE FROM "transformation" WHERE "checksum" = ?', (name,))
    removed = db.execute('DELETE FROM "meta_data" WHERE "checksum" = ?', (name,)).rowcount
    return old is not None or removed > 0


def _run(write: _Write, db) -> None:
    try:
        write.value, write.error = write.function(db), None
    except sqlite3.Error:
        raise
    except Exception as exc:            # its own affair: the others in the group are committed
        write.error = exc


def _quote(path: str) -> str:
    """``path`` in an SQLite URI (``urllib`` is slow to import)."""
    safe = b"/._-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "".join(chr(byte) if byte in safe else "%%%02x" % byte for byte in os.fsencode(path))


# ---- forks: a child must not inherit a held lock or a transaction, nor use its parent's connection

_tables: "weakref.WeakSet[ResultTable]" = weakref.WeakSet()
_forking = threading.RLock()
_held: _t.List[ResultTable] = []


def _before_fork() -> None:
    _forking.acquire()
    _held[:] = _tables
    for table in _held:
        table._lock.acquire()


def _after_fork_in_parent() -> None:
    for table in _held:
        table._lock.release()
    _held.clear()
    _forking.release()


def _after_fork_in_child() -> None:
    for table in _held:
        table._queue.clear()            # the parent's threads write what is queued
        table._disconnect()             # no transaction is open, so this only closes the file
    _after_fork_in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
