"""``export`` and ``Import``: the closure of transformations and results as a tar file, which is laid out like a store.

    .HASHSERVER_PREFIX, ab/abcdef... (sorted), seamless.db (the rows of just these transformations)

Unpacked into an empty folder it is a store of its own, for Seamless 1.x too.  The same content gives the same bytes.

An import reads such a file from its beginning to its end, and trusts nothing in it: every digest is verified, a name
that is none of the above is refused, and the table is read as data of a stranger.  Buffers are stored as they come;
rows only after all is read, and found sound.  We read the tar format ourselves: ``tarfile`` understands far more than
is wanted here.
"""
import contextlib
import io
import json
import os
import pathlib
import re
import sqlite3
import tarfile
import tempfile
import time
import typing as _t

from .checksum import CHUNK, Checksum, is_checksum
from .compressed import hash_pieces
from .errors import CacheMissError, CorruptBufferError, SeamlessError
from .folder import log
from .fsck import is_record
from .progress import Progress
from .references import closure, makers, recipe_of
from .resulttable import ResultTable
from .storing import BUFFER_MODE, MARKER
from .transfer import LARGE_BYTES, read_many

DATABASE = "seamless.db"
_BATCH_BYTES, _BATCH_BUFFERS = 4 << 20, 1000
_LARGEST_TABLE, _TABLE_S = 1 << 30, 60.0
_NAME = re.compile(r"(?:\./)?(?:([0-9a-f]{2})/)?([0-9a-f]{64})\Z")
#: What may be in the schema of a table: no views, triggers, virtual tables, or columns that are computed.
_PLAIN = re.compile(r"CREATE (?:TABLE|INDEX|UNIQUE INDEX) (?!.*\bAS\b)", re.DOTALL | re.IGNORECASE)
_FOLDER = re.compile(r"(?:\.|\./|(?:\./)?[0-9a-f]{2}/?)\Z")


# --- export

class Exported(_t.NamedTuple):
    """What was written, and what of it ``missing`` is in no store."""
    buffers: int
    size: int
    rows: int
    missing: _t.List[Checksum]


def export(roots: _t.Iterable[Checksum], stores, file: _t.BinaryIO, inputs: bool = True, incomplete: bool = False,
           who: _t.Optional[str] = None) -> Exported:
    """Write the closure of ``roots`` to ``file``, which need not seek; a result, or a file of one, brings the
    transformations that have it.

    Without ``inputs``: transformations, results and rows.  Raises ``CacheMissError`` if something is missing,
    before anything is written, unless ``incomplete``.
    """
    roots = [Checksum(root) for root in roots]
    found = closure([*roots, *(name for root in roots for name in makers(root, stores.buffers, stores.results))], stores.buffers, stores.results)
    names = found.checksums
    if not inputs:
        ends = closure([*found.results.values(), *(root for root in roots if root not in found.transformations)], stores.buffers)
        names = ends.checksums | found.transformations | set(found.results)
    missing = sorted(found.missing & names)
    for root in roots:
        if root in found.missing and root not in found.results:
            raise CacheMissError("%s is unknown here: there is neither a buffer nor a result with this checksum" % root)
    if missing and not incomplete:
        raise CacheMissError("%d of %d buffers are not there (%s%s): they were scratch, or are deleted; make them again, or export without "
                             "them (--incomplete)" % (len(missing), len(names), ", ".join(missing[:3]), ", ..." if missing[3:] else ""))
    there = sorted(names.difference(missing))
    sizes = dict(zip(there, stores.buffers.lengths(there)))
    rows = [(name, result, _record(stores.results, name, result)) for name, result in sorted(found.results.items())]
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive, \
            Progress("export", sum(size or 0 for size in sizes.values()), who) as progress:
        _add(archive, MARKER, b"1\n")
        for name, content in _contents(stores.buffers, sizes):
            progress.add(_add(archive, name[:2] + "/" + name, content))
        if rows:
            _add(archive, DATABASE, _table(rows), 0o644)
    return Exported(len(there), sum(size or 0 for size in sizes.values()), len(rows), missing)


def _contents(buffers, sizes: _t.Mapping[Checksum, _t.Optional[int]]) -> _t.Iterator[_t.Tuple[Checksum, _t.Any]]:
    """Each name, in this order, with its bytes or an open file; some MB at a time are in memory."""
    batch: _t.List[Checksum] = []
    size = 0
    for name in [*sizes, None]:
        small = name is not None and sizes[name] is not None and sizes[name] <= LARGE_BYTES
        if batch and not (small and size < _BATCH_BYTES and len(batch) < _BATCH_BUFFERS):
            found = dict(read_many(buffers, batch))
            for each in batch:
                yield each, _opened(buffers, each) if found.get(each) is None else found[each]
            batch, size = [], 0
        if small:
            batch.append(name)
            size += sizes[name]
        elif name is not None:
            yield name, _opened(buffers, name)


def _opened(buffers, name: Checksum) -> _t.BinaryIO:
    file = buffers.open(name)
    if file is None:
        raise CacheMissError("the buffer %s is damaged, or was deleted just now" % name)
    return file


def _add(archive: tarfile.TarFile, name: str, content, mode: int = BUFFER_MODE) -> int:
    with (io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        entry = tarfile.TarInfo(name)       # owner, group and time are 0
        entry.size, entry.mode = file.seek(0, os.SEEK_END), mode
        file.seek(0)
        archive.addfile(entry, file)
    return entry.size


def _record(results, name: Checksum, result: Checksum) -> _t.Optional[dict]:
    """The execution record, if the store has one."""
    text = None
    if hasattr(results, "query"):           # a table
        rows = results.query('SELECT "metadata" FROM "meta_data" WHERE "checksum" = ?', (name,))
        text = rows[0][0] if rows else None
    elif hasattr(results, "request"):       # a service
        answer = results.request("GET", "/", json={"type": "metadata", "checksum": name})
        text = answer.body if answer.expect(200, 404).status == 200 else None
    return json.loads(text) if text and is_record(text, name, result) else None


def _table(rows) -> bytes:
    """The bytes of a ``seamless.db`` with these rows."""
    with tempfile.TemporaryDirectory(prefix="seamless-export-") as folder:
        path = os.path.join(folder, DATABASE)
        table = ResultTable(path)
        table.put_many(rows)
        table.close()
        with open(path, "r+b") as file:
            file.seek(96)
            file.write(bytes(4))            # the version of SQLite that wrote it
            file.seek(0)
            return file.read()


# --- the tar format, as far as it is wanted

class _Member(_t.NamedTuple):
    name: str
    size: int
    is_folder: bool


class _Reader:
    """The members of a tar stream; all that is wrong with it is a ``SeamlessError``."""

    def __init__(self, file: _t.BinaryIO, where: str, progress: Progress):
        self._file, self._where, self._progress, self._left = file, where, progress, 0

    def refuse(self, text: str) -> SeamlessError:
        """The error to raise."""
        return SeamlessError("the archive %s is refused: %s; nothing of its results was recorded" % (self._where, text))

    def __iter__(self) -> _t.Iterator[_Member]:
        while True:
            header = self._exactly(512)
            if not header.strip(b"\0"):
                return
            kind, name, size = self._parse(header)
            if kind in b"xg":               # what pax adds: times and the like do not matter
                extra = self._exactly(size if size <= 1 << 16 else -1)
                self._exactly(-size % 512)
                if re.search(rb"(?:^|\n)[0-9]+ (?:path|size|linkpath|GNU\.sparse[^=]*)=", extra):
                    raise self.refuse("it has a name or size in a form that is not read here")
                continue
            if kind not in b"0\x005":
                raise self.refuse("'%s' is a link, a device or of another kind that has no place in a store" % name)
            if kind == b"5" and size:
                raise self.refuse("'%s' is a folder with content" % name)
            self._left = size
            yield _Member(name, size, kind == b"5")
            while self.read(CHUNK):
                pass
            self._exactly(-size % 512)

    def _parse(self, header: bytes) -> _t.Tuple[bytes, str, int]:
        if self._number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise self.refuse("it is damaged, or not a tar file (compressed ones must be expanded first)")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = header[345:500].split(b"\0")[0] + b"/" + name
        return header[156:157], name.decode("ascii", "backslashreplace"), self._number(header[124:136])

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:                # for more than 8 GB
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if not re.match(rb"[0-7]{1,12}\Z", digits):
            raise self.refuse("it is damaged, or not a tar file (compressed ones must be expanded first)")
        return int(digits, 8)

    def read(self, n: int = -1) -> bytes:
        """Up to ``n`` bytes of the present member."""
        n = self._left if n < 0 else min(self._left, n)
        data = self._exactly(n)
        self._left -= n
        return data

    def _exactly(self, n: int) -> bytes:
        if n < 0:
            raise self.refuse("it has a header that is far too large")
        parts, left = [], n
        while left:
            try:
                part = self._file.read(left)
            except OSError as exc:
                raise SeamlessError("the archive %s cannot be read: %s" % (self._where, exc.strerror)) from exc
            if not part:
                raise self.refuse("it ends in the middle")
            parts.append(part)
            left -= len(part)
        self._progress.add(n)
        return parts[0] if len(parts) == 1 else b"".join(parts)


# --- import

class Import:
    """What importing archives into ``stores`` did: ``added`` (of which ``mended`` were damaged) and ``there`` (buffers),
    ``size`` (bytes added), ``rows`` and ``known_rows``, and ``kept``: (transformation, result here, result there) of those that differ.

    With ``dry_run`` nothing is stored, and it is what would be done.  ``tell`` hears of each buffer and row.
    """

    def __init__(self, stores, dry_run: bool = False, tell: _t.Callable[[str], None] = lambda line: None,
                 who: _t.Optional[str] = None):
        self.added = self.mended = self.there = self.size = self.rows = self.known_rows = 0
        self.kept: _t.List[_t.Tuple[Checksum, str, Checksum]] = []
        self._stores, self._dry_run, self._tell, self._who = stores, dry_run, tell, who

    def read(self, file: _t.BinaryIO, where: str, size: int = 0) -> None:
        """Import one archive; ``where`` is how to call it.  Raises ``SeamlessError``, and then no row was recorded."""
        names: _t.Set[str] = set()
        mended = self.mended
        others: _t.Set[Checksum] = set()            # buffers that are no transformations
        batch: _t.Dict[Checksum, bytes] = {}
        with Progress("import", size, self._who) as progress, tempfile.TemporaryFile() as table:
            reader = _Reader(file, where, progress)
            for member in reader:
                if member.is_folder and _FOLDER.match(member.name):
                    continue
                name = member.name[2:] if member.name.startswith("./") else member.name
                match = _NAME.match(name)
                if member.is_folder or not (name in (MARKER, DATABASE) or match and match[1] in (None, match[2][:2])):
                    raise reader.refuse("'%.100s' is not the name of a buffer" % name)
                if (match[2] if match else name) in names:
                    raise reader.refuse("'%s' is in it twice" % name)
                names.add(match[2] if match else name)
                if match is None:
                    if member.size > (_LARGEST_TABLE if name == DATABASE else 16):
                        raise reader.refuse("its %s is far too large" % name)
                    for part in iter(lambda: reader.read(CHUNK), b"") if name == DATABASE else ():
                        table.write(part)
                elif member.size > LARGE_BYTES:
                    self._large(Checksum(match[2]), member.size, reader)
                else:
                    data = reader.read(member.size)
                    if Checksum.of(data) != match[2]:
                        raise reader.refuse("the content of %s is not that of its checksum" % match[2])
                    batch[Checksum(match[2])] = data
                    if recipe_of(data) is None:
                        others.add(Checksum(match[2]))
                    if len(batch) == _BATCH_BUFFERS or sum(map(len, batch.values())) > _BATCH_BYTES:
                        self._small(batch)
            self._small(batch)
            if not names:
                raise reader.refuse("there is nothing in it")
            if DATABASE in names:
                table.flush()
                self._record(_rows(table, reader, others))
            if self.mended > mended:
                log().warning("%d damaged buffers of the store were replaced by those of the archive %s", self.mended - mended, where)

    def _note(self, name: Checksum, size: int, is_there: bool) -> None:
        self._tell("%s %s %d" % ("have" if is_there else "add ", name, size))
        self.there += is_there
        self.added += not is_there
        self.size += 0 if is_there else size

    def _there(self, names: _t.Collection[Checksum]) -> _t.Dict[Checksum, bool]:
        """Which are in the store.  If it is on this machine they are read too: what is damaged is not there, and is stored again."""
        buffers = self._stores.buffers
        there = dict(zip(names, buffers.has(names))) if names else {}
        for name in [] if buffers.remote or self._dry_run else [name for name in names if there[name]]:
            with contextlib.suppress(SeamlessError), buffers.open(name) or contextlib.nullcontext() as file:    # if it can be read
                if file is None:
                    [there[name]] = buffers.has([name])     # still, if it could not be moved aside
                    self.mended += not there[name]
        return there

    def _small(self, batch: _t.Dict[Checksum, bytes]) -> None:
        there = self._there(batch)
        if not self._dry_run:
            self._stores.buffers.put_many(data for name, data in batch.items() if not there[name])
        for name, data in batch.items():
            self._note(name, len(data), there[name])
        batch.clear()

    def _large(self, name: Checksum, size: int, reader: _Reader) -> None:
        buffers, found = self._stores.buffers, None
        is_there = self._there([name])[name]
        parts = iter(lambda: reader.read(CHUNK), b"")
        if is_there or self._dry_run:
            found = hash_pieces(parts)
        elif not buffers.remote:
            with contextlib.suppress(CorruptBufferError):
                buffers.put_open(name, reader)
                found = name
        else:                               # what is sent may have to be sent again
            with tempfile.TemporaryFile() as file:
                found = hash_pieces(part for part in parts if file.write(part))
                file.seek(0)
                if found == name:
                    buffers.put_open(name, file)
        if found != name:
            raise reader.refuse("the content of %s is not that of its checksum" % name)
        self._note(name, size, is_there)

    def _record(self, rows: _t.Sequence[_t.Tuple[Checksum, Checksum, _t.Optional[dict]]]) -> None:
        results, new = self._stores.results, []
        present = results.get_many([name for name, _, _ in rows])
        for name, result, record in rows:
            before = [present[name]] if name in present else results.irreproducible(name)
            if before and result not in before:
                self.kept.append((name, before[0], result))
            elif before:
                self.known_rows += 1
            else:
                self._tell("add  result of %s: %s" % (name, result))
                new.append((name, result, record))
        if new and not self._dry_run:
            results.put_many(new)
        self.rows += len(new)


def _rows(file, reader: _Reader, others: _t.Set[Checksum]) -> _t.List[_t.Tuple[Checksum, Checksum, _t.Optional[dict]]]:
    """The rows of a table that a stranger made.  Raises what ``reader.refuse`` makes if they do not agree with each other."""
    with tempfile.TemporaryDirectory(prefix="seamless-import-") as folder:
        path = os.path.join(folder, DATABASE)
        with open(path, "wb") as copy:
            file.seek(0)
            for part in iter(lambda: file.read(CHUNK), b""):
                copy.write(part)
        db = sqlite3.connect(pathlib.Path(path).as_uri() + "?mode=ro&immutable=1", uri=True)
        try:
            rows, ways_back, records = _select(db, reader)
        except (sqlite3.Error, UnicodeError, ValueError, OverflowError, MemoryError) as exc:
            raise reader.refuse("its %s cannot be read (%s)" % (DATABASE, exc)) from exc
        finally:
            db.close()
    for name, result in [*rows.items(), *ways_back, *((name, result) for name, (result, _) in records.items())]:
        if not (is_checksum(name) and is_checksum(result) and name == name.lower() and rows.get(name) == result):
            raise reader.refuse("its %s has rows that contradict each other, or are not checksums" % DATABASE)
        if Checksum(name) in others:
            raise reader.refuse("its %s has a result for %s, which is not a transformation" % (DATABASE, name))
    for name, (result, text) in records.items():
        deeper = '{"":' * 100 + str(text) + "}" * 100       # what can just be read may be nested too deeply to be written
        if not (isinstance(text, str) and is_record(text, name, result) and is_record(deeper, name, result)):
            raise reader.refuse("its %s has no execution record, or one of something else, for %s" % (DATABASE, name))
    return [(Checksum(name), Checksum(result), json.loads(records[name][1]) if name in records else None)
            for name, result in sorted(rows.items())]


def _select(db: sqlite3.Connection, reader: _Reader):
    deadline = time.monotonic() + _TABLE_S
    db.set_progress_handler(lambda: time.monotonic() > deadline, 100000)
    db.execute("PRAGMA trusted_schema = OFF")
    if not all(sql is None or isinstance(sql, str) and _PLAIN.match(sql) for sql, in db.execute("SELECT sql FROM sqlite_master")):
        raise reader.refuse("its %s is more than a table" % DATABASE)
    if db.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
        raise reader.refuse("its %s is damaged" % DATABASE)
    rows = dict(db.execute('SELECT "checksum", "result" FROM "transformation"'))
    ways_back = db.execute('SELECT "checksum", "result" FROM "rev_transformation"').fetchall()
    records = {name: (result, text) for name, result, text in db.execute('SELECT "checksum", "result", "metadata" FROM "meta_data"')}
    return rows, ways_back, records
