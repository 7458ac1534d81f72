"""The database: results over HTTP, from and into a ``ResultTable``; its client; the program.

Seamless 1.x asks with GET and PUT of a JSON object with a ``type``, on any path (compat/http.md section 2).
Our own requests are for many rows at once:

    POST /results/get      {"transformations": [...]}            -> {"results": {transformation: result}}
    POST /results/put      {"rows": [[transformation, result, metadata or null], ...], "again": bool} -> {"stored": n}, committed
    POST /results/forget   {"transformations": [...]}            -> {"forgotten": [bool, ...]}
    POST /results/recent   {"before": mark or null}              -> {"rows": [[mark, transformation], ...]}, the last one first

Answers to writes come after the commit, which concurrent requests share.
"""
import argparse
import contextlib
import json
import os
import re
import sys
import typing as _t

from .checksum import Checksum
from .errors import ChecksumError, ConfigurationError, SeamlessError, ServiceError
from .httpbase import Service, run_service, service_arguments
from .httpclient import HttpClient
from .httpmessage import HttpError, Reply, Request
from .layers import LayeredResults
from .resulttable import MemoryResults, ResultTable, Row, forget_row, put_row, stored_row

PROTOCOL = ["seamless", "database", "2.2"]
BUCKET_KINDS = ("node", "environment", "node_env", "queue", "queue_node")
PATH_CELLTYPES = ("mixed", "plain", "binary")
BATCH_ROWS = 1000
UNKNOWN_KEY = "Unknown key"


def _error(status: int, text: str) -> HttpError:
    return HttpError(status, text, "ERROR: " + text)


class DatabaseService(Service):
    """Serves ``table``, and what only ``extras`` have."""
    name = "database"

    def __init__(self, table: ResultTable, extras: _t.Sequence[ResultTable] = ()):
        super().__init__()
        self.table = table
        self._read = LayeredResults(table, extras)
        anywhere = re.compile("/.*", re.DOTALL)
        self.routes = [
            ("POST", re.compile("/results/get"), self.results_get), ("POST", re.compile("/results/put"), self.results_put),
            ("POST", re.compile("/results/forget"), self.results_forget),
            ("POST", re.compile("/results/recent"), self.results_recent),
            ("GET", anywhere, self.get), ("PUT", anywhere, self.put)]

    def info(self) -> dict:
        return {"file": self.table.path, "writable": self.table.writable}

    def close(self) -> None:
        self._read.close()

    # ---- our own requests

    def results_get(self, request: Request) -> dict:
        return {"results": self._read.get_many(_list(request.json(), "transformations"))}

    def results_put(self, request: Request) -> dict:
        self._check_writable()
        query = request.json()
        rows = _list(query, "rows")
        if not all(isinstance(row, list) and len(row) == 3 and isinstance(row[2], (dict, type(None))) for row in rows):
            raise HttpError(400, "a row is [transformation, result, metadata or null]")
        self._read.put_many(rows, bool(query.get("again")))
        return {"stored": len(rows)}

    def results_forget(self, request: Request) -> dict:
        self._check_writable()
        return {"forgotten": [self.table.forget(name) for name in _list(request.json(), "transformations")]}

    def results_recent(self, request: Request) -> dict:
        query = request.json()
        before = query.get("before") if isinstance(query, dict) else None
        if before is not None and not _is_mark(before, isinstance(self.table, LayeredResults)):
            raise HttpError(400, "'before' is a mark that came with a row, or null")
        return {"rows": self.table.recent(before)}

    def _check_writable(self) -> None:
        if not self.table.writable:
            raise _error(405, "Database server is read-only")

    # ---- the requests of Seamless 1.x

    def get(self, request: Request) -> Reply:
        """GET with a query in the body."""
        query = _Query(request)
        if query.type == "protocol":
            return Reply(json.dumps(PROTOCOL))
        shape, sql = query.handler(_READERS)
        values = query.values(sql)
        found = self._read.get(values["checksum"]) if query.type == "transformation" else \
            self._read.first(lambda table: shape(table.query(sql, values)) or None)
        if found is None:
            raise _error(404, UNKNOWN_KEY)
        return Reply(found if isinstance(found, str) else _compact(found))

    def put(self, request: Request) -> Reply:
        """PUT with a row in the body."""
        self._check_writable()
        query = _Query(request)
        handler = query.handler(_WRITERS)
        if isinstance(handler, str):
            values = query.values(handler)
            self.table.write(lambda db: db.execute(handler, values))
        else:
            self.table.write(handler(query))
        return Reply("OK")


def _list(value, name: str) -> list:
    if not isinstance(value, dict) or not isinstance(value.get(name), list):
        raise HttpError(400, "the body is a JSON object with %r, a list" % name)
    return value[name]


def _is_mark(value, layered: bool) -> bool:
    """Whether it is a mark of a ``ResultTable``, or [number of the layer, its mark or null] (which were tuples)."""
    if layered:
        return (isinstance(value, list) and len(value) == 2 and type(value[0]) is int and value[0] >= 0
                and (value[1] is None or _is_mark(value[1], False)))
    return isinstance(value, int) and abs(value) < 1 << 63


def _compact(value) -> str:
    return json.dumps(value, separators=(",", ":"))


class _Query:
    """The JSON object of a request; its fields are checked when they are asked for."""

    def __init__(self, request: Request):
        try:
            self._fields = request.json()
        except HttpError as exc:
            raise (_error(400, str(exc)) if exc.status == 400 else exc) from None
        if not isinstance(self._fields, dict):
            raise _error(400, "the body is not a JSON object")
        self.type = self.text("type")

    def handler(self, table: dict):
        """What ``table`` has for the type."""
        if self.type not in table:
            raise _error(400, "unknown type %.40r" % self.type)
        return table[self.type]

    def values(self, sql: str) -> dict:
        """The fields that the statement names, checked."""
        return {name: _CHECKS.get(name, _Query.text)(self, name) for name in re.findall(r":(\w+)", sql)}

    def _typed(self, name: str, kind: type, what: str):
        value = self._fields.get(name)
        if not isinstance(value, kind):
            raise _error(400, "%s is not %s" % (name, what))
        return value

    def checksum(self, name: str = "checksum") -> Checksum:
        return _as_checksum(self._fields.get(name), name)

    def optional_checksum(self, name: str) -> _t.Optional[Checksum]:
        return None if self._fields.get(name) is None else self.checksum(name)

    def checksums(self, name: str) -> _t.List[Checksum]:
        return [_as_checksum(item, name) for item in self._typed(name, list, "a list")]

    def text(self, name: str) -> str:
        return self._typed(name, str, "a string")

    def optional_text(self, name: str) -> str:
        return "" if self._fields.get(name) is None else self.text(name)

    def object(self, name: str) -> dict:
        """A JSON object, or one written as a string."""
        with contextlib.suppress(TypeError, ValueError):        # then it is none, or one already
            self._fields[name] = json.loads(self._fields.get(name))
        return self._typed(name, dict, "a JSON object")

    def compact_object(self, name: str) -> str:
        return _compact(self.object(name))

    def bucket_kind(self, name: str) -> str:
        kind = self.text(name)
        if kind not in BUCKET_KINDS:
            raise _error(400, "%s is one of %s" % (name, ", ".join(BUCKET_KINDS)))
        return kind

    def path(self, name: str) -> str:
        """The path of an expression, as the JSON text that is stored."""
        value = self._fields.get(name)
        text = value if isinstance(value, str) else json.dumps(value if value is not None else [])
        if len(text) > 100:
            raise _error(400, "path is longer than 100 characters")
        if text not in ("", "[]", "null") and self.text("celltype") not in PATH_CELLTYPES:
            raise _error(400, "only the celltypes %s have paths" % ", ".join(PATH_CELLTYPES))
        return text


def _as_checksum(value, name: str) -> Checksum:
    try:
        return Checksum(value)
    except ChecksumError as exc:
        raise _error(400, "%s: %s" % (name, exc)) from None


# ---- what is read: type -> (function of the rows, whose empty value is "unknown"; SELECT with the fields of the query)

def _one(rows) -> str:
    return rows[0][0] if rows else ""


def _column(rows) -> list:
    return [row[0] for row in rows]


def _objects(*names):
    return lambda rows: [dict(zip(names, row)) for row in rows]


def _irreproducible(rows):
    names = ("checksum", "result", "metadata")
    return [dict(zip(names, row), metadata=json.loads(row[2] or '""')) for row in rows]


def _probe(rows):
    names = ("bucket_kind", "label", "bucket_checksum", "captured_at")
    return rows and {**dict(zip(names, rows[0])), "freshness_tokens": json.loads(rows[0][4])}


#: how a field is checked that is not just text
_CHECKS: _t.Dict[str, _t.Callable] = {
    "checksum": _Query.checksum, "value": _Query.checksum, "bucket_checksum": _Query.checksum,
    "result": _Query.optional_checksum, "subcelltype": _Query.optional_text, "bucket_kind": _Query.bucket_kind,
    "freshness_tokens": _Query.compact_object, "path": _Query.path}
_READERS = {
    "transformation": (_one, 'SELECT "result" FROM "transformation" WHERE "checksum" = :checksum'),
    "rev_transformations": (_column, 'SELECT "checksum" FROM "transformation" WHERE "result" = :checksum'),
    "metadata": (_one, 'SELECT "metadata" FROM "meta_data" WHERE "checksum" = :checksum'),
    "irreproducible": (_irreproducible, """
        SELECT "checksum", "result", "metadata" FROM "irreproducible_transformation"
        WHERE "checksum" = :checksum AND "result" = IFNULL(:result, "result")"""),
    "bucket_probe": (_probe, """
        SELECT "bucket_kind", "label", "bucket_checksum", "captured_at", "freshness_tokens" FROM "bucket_probe"
        WHERE "bucket_kind" = :bucket_kind AND "label" = :label"""),
    "buffer_info": (_one, 'SELECT "buffer_info" FROM "buffer_info" WHERE "checksum" = :checksum'),
    "semantic_to_syntactic": (_column, """
        SELECT "syntactic" FROM "syntactic_to_semantic"
        WHERE "semantic" = :checksum AND "celltype" = :celltype AND "subcelltype" = :subcelltype"""),
    "syntactic_to_semantic": (_column, """
        SELECT "semantic" FROM "syntactic_to_semantic"
        WHERE "syntactic" = :checksum AND "celltype" = :celltype AND "subcelltype" = :subcelltype"""),
    "expression": (_one, """
        SELECT "result" FROM "expression" WHERE "input_checksum" = :checksum AND "path" = :path
        AND "celltype" = :celltype AND "target_celltype" = :target_celltype"""),
    "rev_expression": (_objects("checksum", "path", "celltype", "target_celltype", "result"), """
        SELECT "input_checksum", "path", "celltype", "target_celltype", "result" FROM "expression" WHERE "result" = :checksum""")}


# ---- what is written: type -> a statement with the fields of the query, or a function of the query, which checks it
# ---- and returns a function of the connection

def _put_transformation(query):
    checksum, result = query.checksum(), query.checksum("value")
    return lambda db: put_row(db, checksum, result, None)


def _put_metadata(query):
    checksum, result, record = query.checksum(), query.checksum("result"), query.object("value")
    if type(record.get("schema_version")) is not int:
        raise _error(400, "the execution record has no schema_version")
    if record.get("tf_checksum") != checksum or record.get("result_checksum") != result:
        raise _error(400, "the execution record is of another transformation or result")

    def write(db):
        known, recorded, metadata = stored_row(db, checksum)
        if db.execute('SELECT 1 FROM "irreproducible_transformation" WHERE "checksum" = ?', (checksum,)).fetchone():
            raise _error(409, "Transformation already has irreproducible records")
        if known not in (None, result):
            raise _error(409, "Transformation result does not match execution record result")
        if recorded not in (None, result):
            raise _error(409, "Execution record result does not match stored metadata result")
        if recorded and json.loads(metadata) != record:
            raise _error(409, "Execution record already exists with different metadata")
        put_row(db, checksum, result, record)
    return write


def _put_irreproducible(query):
    checksum, result = query.checksum(), query.checksum("result")

    def write(db):
        known, recorded, metadata = stored_row(db, checksum)
        if known not in (None, result):
            raise _error(404, "Transformation does not have the irreproducible result")
        if recorded not in (None, result):
            raise _error(409, "Stored metadata result does not match irreproducible result")
        row = (result, checksum)
        there = 'SELECT 1 FROM "irreproducible_transformation" WHERE "result" = ? AND "checksum" = ?'
        if known or not db.execute(there, row).fetchone():
            db.execute('INSERT INTO "irreproducible_transformation" ("result", "checksum", "metadata") VALUES (?, ?, ?)',
                       (*row, metadata or ""))
        forget_row(db, checksum)
    return write


def _put_buffer_info(query):
    checksum, value = query.checksum(), query.object("value")

    def write(db):
        stored = db.execute('SELECT "buffer_info" FROM "buffer_info" WHERE "checksum" = ?', (checksum,)).fetchone()
        merged = {**(json.loads(stored[0]) if stored else {}), **value}
        db.execute('INSERT OR REPLACE INTO "buffer_info" VALUES (?, ?)', (checksum, _compact(merged)))
    return write


def _put_syntactic(query):
    rows = [(syntactic, query.text("celltype"), query.optional_text("subcelltype"), query.checksum())
            for syntactic in query.checksums("value")]
    return lambda db: db.executemany('INSERT OR IGNORE INTO "syntactic_to_semantic" ("syntactic", "celltype", '
                                     '"subcelltype", "semantic") VALUES (?, ?, ?, ?)', rows)


_WRITERS = {
    "transformation": _put_transformation, "metadata": _put_metadata, "irreproducible": _put_irreproducible,
    "buffer_info": _put_buffer_info, "semantic_to_syntactic": _put_syntactic,
    "bucket_probe": """
        INSERT OR REPLACE INTO "bucket_probe" ("bucket_kind", "label", "bucket_checksum", "captured_at", "freshness_tokens")
        VALUES (:bucket_kind, :label, :bucket_checksum, :captured_at, :freshness_tokens)""",
    "expression": """
        INSERT OR REPLACE INTO "expression" ("input_checksum", "path", "celltype", "target_celltype", "result")
        VALUES (:checksum, :path, :celltype, :target_celltype, :value)"""}


class DatabaseClient(HttpClient):
    """The results of the database at an address; the methods are those of ``resulttable.MemoryResults``.

    Works with a database of Seamless 1.x too, except ``forget``.  Raises ``ServiceError`` and its kin.
    """
    _is_old = False         # knows of no irreproducible transformations

    def get(self, transformation) -> _t.Optional[Checksum]:
        answer = self._ask("GET", "/", {"type": "transformation", "checksum": Checksum(transformation)}, 404)
        return None if answer.status == 404 else self._checksum(answer.body.decode("latin-1").strip())

    def get_many(self, transformations: _t.Iterable) -> _t.Dict[str, Checksum]:
        names, found = list(dict.fromkeys(map(Checksum, transformations))), {}
        for start in range(0, len(names), BATCH_ROWS):
            part = names[start:start + BATCH_ROWS]
            answer = self._post("get", {"transformations": part})
            if answer is None:
                found.update((name, self.get(name)) for name in part)
            else:
                found.update((Checksum(name), self._checksum(result)) for name, result in answer["results"].items())
        return {name: result for name, result in found.items() if result is not None}

    put = MemoryResults.put

    def put_many(self, rows: _t.Iterable[Row], again: bool = False) -> None:
        checked = [[Checksum(name), Checksum(result), metadata] for name, result, metadata in rows]
        for start in range(0, len(checked), BATCH_ROWS):
            part = checked[start:start + BATCH_ROWS]
            if self._post("put", {"rows": part, "again": again}) is None:
                for row in part:
                    self._put_one(*row, again)

    def _put_one(self, name, result, metadata, again) -> None:
        """As Seamless 1.x does it; a record that is there already stays.  It would replace a result that differs."""
        before = self.get(name)
        if before not in (None, result) and not again:
            return
        several = self.irreproducible(name) if before != result else []
        if before not in (None, result) or several:
            for each in (before, result):
                if each is not None and (each == before or each not in several):
                    self._ask("PUT", "/", {"type": "irreproducible", "checksum": name, "result": each}, 409)
            return
        self._ask("PUT", "/", {"type": "transformation", "checksum": name, "value": result})
        if metadata is not None:
            self._ask("PUT", "/", {"type": "metadata", "checksum": name, "result": result, "value": metadata}, 409)

    def forget(self, transformation) -> bool:
        answer = self._post("forget", {"transformations": [Checksum(transformation)]})
        if answer is None:
            raise SeamlessError("%s is a database of Seamless 1.x, which cannot forget results: open its file instead"
                                % self.address)
        return answer["forgotten"][0]

    def reverse(self, result) -> _t.List[str]:
        answer = self._ask("GET", "/", {"type": "rev_transformations", "checksum": Checksum(result)}, 404)
        return [] if answer.status == 404 else list(dict.fromkeys(answer.json()))

    def irreproducible(self, transformation) -> _t.List[Checksum]:
        if self._is_old:
            return []
        answer = self._ask("GET", "/", {"type": "irreproducible", "checksum": Checksum(transformation)}, 400, 404)
        self._is_old = answer.status == 400
        return [] if answer.status != 200 else [self._checksum(row["result"]) for row in answer.json()]

    def recent(self, before=None):
        answer = self._post("recent", {"before": before})
        return None if answer is None else [(mark, Checksum(name)) for mark, name in answer["rows"]]

    def _ask(self, method: str, target: str, query: dict, *also: int):
        answer = self.request(method, target, json=query)
        if answer.status == 405 and (b"read-only" in answer.body or 405 not in also):
            raise SeamlessError("%s serves its results for reading only: start it with --writable" % self.address)
        return answer.expect(200, *also)

    def _post(self, name: str, query: dict) -> _t.Optional[dict]:
        """The answer; None from a server that does not know our requests."""
        answer = self._ask("POST", "/results/" + name, query, 405)
        return None if answer.status == 405 else answer.json()

    def _checksum(self, text: str) -> Checksum:
        try:
            return Checksum(text)
        except ChecksumError:
            raise ServiceError("%s answered %.60r, which is not a result: it is not a database" % (self.address, text)) from None


def make_service(args) -> DatabaseService:
    """The service that the command line asks for."""
    if not args.writable and not os.path.isfile(args.file):
        raise ConfigurationError("the result table %s does not exist: start with --writable to make it" % args.file)
    table = ResultTable(args.file, args.writable)
    if args.writable:
        table.write(lambda db: None)        # makes the file, or says now why that is not possible
    else:
        table.get("0" * 64)
    return DatabaseService(table, [ResultTable(path, writable=False) for path in args.extra_files.split(";") if path])


def main(argv: _t.Optional[_t.List[str]] = None) -> int:
    """The program ``seamless-database``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="seamless-database", description="Serve a table of results (seamless.db) over HTTP.")
    parser.add_argument("file", metavar="FILE", help="the SQLite file")
    parser.add_argument("--writable", action="store_true", help="accept new results too, and make the file if it is missing")
    parser.add_argument("--extra-files", metavar='"F1;F2"', default="", help="more tables to read from")
    service_arguments(parser)
    return run_service(make_service, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
