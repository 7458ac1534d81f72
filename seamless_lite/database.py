"""The database: results over HTTP, from and into a ``ResultTable``; its client; the program.

Seamless 1.x asks with GET and PUT of a JSON object with a ``type``, on any path (compat/http.md section 2).
Our own requests are for many rows at once:

    POST /results/get      {"transformations": [...]}            -> {"results": {transformation: result}}
    POST /results/put      {"rows": [[transformation, result, metadata or null], ...]} -> {"stored": n}, committed
    POST /results/forget   {"transformations": [...]}            -> {"forgotten": [bool, ...]}
    POST /results/reverse  {"result": checksum}                  -> {"transformations": [...]}

Answers to writes come after the commit, which concurrent requests share.
"""
import argparse
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
from .resulttable import MemoryResults, ResultTable, Row, forget_row, put_row

PROTOCOL = ["seamless", "database", "2.2"]
BUCKET_KINDS = ("node", "environment", "node_env", "queue", "queue_node")
PATH_CELLTYPES = ("mixed", "plain", "binary")
BATCH_ROWS = 1000
UNKNOWN_KEY = "Unknown key"


def _error(status: int, text: str) -> HttpError:
    return HttpError(status, text, text if status == 409 else "ERROR: " + text)


class DatabaseService(Service):
    """Serves ``table``."""
    name = "database"

    def __init__(self, table: ResultTable):
        super().__init__()
        self.table = table
        anywhere = re.compile("/.*", re.DOTALL)
        self.routes = [
            ("POST", re.compile("/results/get"), self.results_get), ("POST", re.compile("/results/put"), self.results_put),
            ("POST", re.compile("/results/forget"), self.results_forget),
            ("POST", re.compile("/results/reverse"), self.results_reverse),
            ("GET", anywhere, self.get), ("PUT", anywhere, self.put)]

    def info(self) -> dict:
        """The file, and whether it is served for writing."""
        return {"file": self.table.path, "writable": self.table.writable}

    def close(self) -> None:
        """Close the file."""
        self.table.close()

    # ---- our own requests

    def results_get(self, request: Request) -> dict:
        """POST /results/get."""
        return {"results": self.table.get_many(_member(request.json(), "transformations", list))}

    def results_put(self, request: Request) -> dict:
        """POST /results/put."""
        self._check_writable()
        rows = _member(request.json(), "rows", list)
        if not all(isinstance(row, list) and len(row) == 3 and isinstance(row[2], (dict, type(None))) for row in rows):
            raise HttpError(400, "a row is [transformation, result, metadata or null]")
        self.table.put_many(rows)
        return {"stored": len(rows)}

    def results_forget(self, request: Request) -> dict:
        """POST /results/forget."""
        self._check_writable()
        return {"forgotten": [self.table.forget(name) for name in _member(request.json(), "transformations", list)]}

    def results_reverse(self, request: Request) -> dict:
        """POST /results/reverse."""
        return {"transformations": self.table.reverse(_member(request.json(), "result", str))}

    def _check_writable(self) -> None:
        if not self.table.writable:
            raise _error(405, "Database server is read-only")

    # ---- the requests of Seamless 1.x

    def get(self, request: Request) -> Reply:
        """GET with a query in the body."""
        query = _Query(request)
        if query.type == "protocol":
            return Reply(json.dumps(PROTOCOL))
        handler = _READERS.get(query.type)
        if handler is None:
            raise _error(400, "unknown type %.40r" % query.type)
        found = handler(self.table.query, query)
        if not found:
            raise _error(404, UNKNOWN_KEY)
        return Reply(found if isinstance(found, str) else json.dumps(found, separators=(",", ":")))

    def put(self, request: Request) -> Reply:
        """PUT with a row in the body."""
        self._check_writable()
        query = _Query(request)
        handler = _WRITERS.get(query.type)
        if handler is None:
            raise _error(400, "unknown type %.40r" % query.type)
        self.table.write(handler(query))
        return Reply("OK")


def _member(value, name: str, kind: type):
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        raise HttpError(400, "the body is a JSON object with %r, a %s" % (name, kind.__name__))
    return value[name]


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

    def checksum(self, name: str = "checksum") -> Checksum:
        return _as_checksum(self._fields.get(name), name)

    def text(self, name: str, optional: bool = False) -> str:
        value = self._fields.get(name)
        if optional and value is None:
            return ""
        if not isinstance(value, str):
            raise _error(400, "%s is not a string" % name)
        return value

    def object(self, name: str) -> dict:
        """A JSON object, or one written as a string."""
        value = self._fields.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass            # then it is none
        if not isinstance(value, dict):
            raise _error(400, "%s is not a JSON object" % name)
        return value

    def checksums(self, name: str) -> _t.List[Checksum]:
        value = self._fields.get(name)
        if not isinstance(value, list):
            raise _error(400, "%s is not a list" % name)
        return [_as_checksum(item, name) for item in value]

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def path(self) -> str:
        """The path of an expression, as the JSON text that is stored."""
        value = self._fields.get("path")
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


def _column(rows) -> list:
    return [row[0] for row in rows]


def _one(rows) -> str:
    return rows[0][0] if rows else ""


# ---- what is read: type -> function of (query of the table, query of the client), whose empty value is "unknown"

def _get_transformation(select, query):
    return _one(select('SELECT "result" FROM "transformation" WHERE "checksum" = ?', [query.checksum()]))


def _get_rev_transformations(select, query):
    return _column(select('SELECT "checksum" FROM "transformation" WHERE "result" = ?', [query.checksum()]))


def _get_metadata(select, query):
    return _one(select('SELECT "metadata" FROM "meta_data" WHERE "checksum" = ?', [query.checksum()]))


def _get_irreproducible(select, query):
    sql, values = 'SELECT "checksum", "result", "metadata" FROM "irreproducible_transformation" WHERE "checksum" = ?', [query.checksum()]
    if query.has("result"):
        sql, values = sql + ' AND "result" = ?', values + [query.checksum("result")]
    return [{"checksum": checksum, "result": result, "metadata": metadata} for checksum, result, metadata in select(sql, values)]


def _get_bucket_probe(select, query):
    kind, label = _bucket_kind(query), query.text("label")
    rows = select('SELECT "bucket_checksum", "captured_at", "freshness_tokens" FROM "bucket_probe" '
                  'WHERE "bucket_kind" = ? AND "label" = ?', [kind, label])
    return rows and {"bucket_kind": kind, "label": label, "bucket_checksum": rows[0][0], "captured_at": rows[0][1],
                     "freshness_tokens": json.loads(rows[0][2])}


def _get_buffer_info(select, query):
    return _one(select('SELECT "buffer_info" FROM "buffer_info" WHERE "checksum" = ?', [query.checksum()]))


def _get_syntactic(select, query):
    return _column(select('SELECT "syntactic" FROM "syntactic_to_semantic" WHERE "semantic" = ? AND "celltype" = ? AND "subcelltype" = ?',
                          [query.checksum(), query.text("celltype"), query.text("subcelltype", optional=True)]))


def _get_semantic(select, query):
    return _column(select('SELECT "semantic" FROM "syntactic_to_semantic" WHERE "syntactic" = ? AND "celltype" = ? AND "subcelltype" = ?',
                          [query.checksum(), query.text("celltype"), query.text("subcelltype", optional=True)]))


def _get_expression(select, query):
    return _one(select('SELECT "result" FROM "expression" WHERE "input_checksum" = ? AND "path" = ? AND "celltype" = ? AND '
                       '"target_celltype" = ?', [query.checksum(), query.path(), query.text("celltype"), query.text("target_celltype")]))


def _get_rev_expression(select, query):
    rows = select('SELECT "input_checksum", "path", "celltype", "target_celltype" FROM "expression" WHERE "result" = ?', [query.checksum()])
    return [dict(zip(("checksum", "path", "celltype", "target_celltype"), row)) for row in rows]


_READERS = {
    "transformation": _get_transformation, "rev_transformations": _get_rev_transformations, "metadata": _get_metadata,
    "irreproducible": _get_irreproducible, "bucket_probe": _get_bucket_probe, "buffer_info": _get_buffer_info,
    "semantic_to_syntactic": _get_syntactic, "syntactic_to_semantic": _get_semantic,
    "expression": _get_expression, "rev_expression": _get_rev_expression}


# ---- what is written: type -> function of the query, which checks it and returns a function of the connection

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
        stored = db.execute('SELECT "result", "metadata" FROM "meta_data" WHERE "checksum" = ?', (checksum,)).fetchone()
        known = db.execute('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (checksum,)).fetchone()
        if db.execute('SELECT 1 FROM "irreproducible_transformation" WHERE "checksum" = ?', (checksum,)).fetchone():
            raise _error(409, "Transformation already has irreproducible records")
        if known and known[0] != result:
            raise _error(409, "Transformation result does not match execution record result")
        if stored and stored[0] != result:
            raise _error(409, "Execution record result does not match stored metadata result")
        if stored and json.loads(stored[1]) != record:
            raise _error(409, "Execution record already exists with different metadata")
        put_row(db, checksum, result, record)
    return write


def _put_irreproducible(query):
    checksum, result = query.checksum(), query.checksum("result")

    def write(db):
        known = db.execute('SELECT "result" FROM "transformation" WHERE "checksum" = ?', (checksum,)).fetchone()
        stored = db.execute('SELECT "result", "metadata" FROM "meta_data" WHERE "checksum" = ?', (checksum,)).fetchone()
        if known and known[0] != result:
            raise _error(404, UNKNOWN_KEY)
        if stored and stored[0] != result:
            raise _error(409, "Execution record result does not match stored metadata result")
        if known or not db.execute('SELECT 1 FROM "irreproducible_transformation" WHERE "checksum" = ? AND "result" = ?',
                                   (checksum, result)).fetchone():
            db.execute('INSERT INTO "irreproducible_transformation" ("result", "checksum", "metadata") VALUES (?, ?, ?)',
                       (result, checksum, stored[1] if stored else ""))
        forget_row(db, checksum)
    return write


def _bucket_kind(query) -> str:
    kind = query.text("bucket_kind")
    if kind not in BUCKET_KINDS:
        raise _error(400, "bucket_kind is one of %s" % ", ".join(BUCKET_KINDS))
    return kind


def _put_bucket_probe(query):
    values = (_bucket_kind(query), query.text("label"), query.checksum("bucket_checksum"), query.text("captured_at"),
              json.dumps(query.object("freshness_tokens"), separators=(",", ":")))
    return lambda db: db.execute('INSERT OR REPLACE INTO "bucket_probe" ("bucket_kind", "label", "bucket_checksum", "captured_at", '
                                 '"freshness_tokens") VALUES (?, ?, ?, ?, ?)', values)


def _put_buffer_info(query):
    checksum, value = query.checksum(), query.object("value")

    def write(db):
        stored = db.execute('SELECT "buffer_info" FROM "buffer_info" WHERE "checksum" = ?', (checksum,)).fetchone()
        merged = {**(json.loads(stored[0]) if stored else {}), **value}
        db.execute('INSERT OR REPLACE INTO "buffer_info" VALUES (?, ?)', (checksum, json.dumps(merged, separators=(",", ":"))))
    return write


def _put_syntactic(query):
    rows = [(syntactic, query.text("celltype"), query.text("subcelltype", optional=True), query.checksum())
            for syntactic in query.checksums("value")]
    return lambda db: db.executemany('INSERT OR IGNORE INTO "syntactic_to_semantic" ("syntactic", "celltype", "subcelltype", "semantic") '
                                     'VALUES (?, ?, ?, ?)', rows)


def _put_expression(query):
    values = (query.checksum(), query.path(), query.text("celltype"), query.text("target_celltype"), query.checksum("value"))
    return lambda db: db.execute('INSERT OR REPLACE INTO "expression" ("input_checksum", "path", "celltype", "target_celltype", "result") '
                                 'VALUES (?, ?, ?, ?, ?)', values)


_WRITERS = {
    "transformation": _put_transformation, "metadata": _put_metadata, "irreproducible": _put_irreproducible,
    "bucket_probe": _put_bucket_probe, "buffer_info": _put_buffer_info, "semantic_to_syntactic": _put_syntactic,
    "expression": _put_expression}


class DatabaseClient:
    """The results of the database at ``address``; the methods are those of ``resulttable.MemoryResults``.

    Works with a database of Seamless 1.x too, except ``forget``.  Raises ``ServiceError`` and its kin.
    """

    def __init__(self, address: str, secret: _t.Optional[bytes] = None):
        self.address = address
        self._http = HttpClient(address, secret)

    def get(self, transformation) -> _t.Optional[Checksum]:
        """As ``MemoryResults.get``."""
        answer = self._ask("GET", {"type": "transformation", "checksum": Checksum(transformation)}, 404)
        return None if answer.status == 404 else self._checksum(answer.body.decode("latin-1").strip())

    def get_many(self, transformations: _t.Iterable) -> _t.Dict[str, Checksum]:
        """As ``MemoryResults.get_many``."""
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

    def put_many(self, rows: _t.Iterable[Row]) -> None:
        """As ``MemoryResults.put_many``."""
        checked = [[Checksum(name), Checksum(result), metadata] for name, result, metadata in rows]
        for start in range(0, len(checked), BATCH_ROWS):
            part = checked[start:start + BATCH_ROWS]
            if self._post("put", {"rows": part}) is None:
                for row in part:
                    self._put_one(*row)

    def _put_one(self, name, result, metadata) -> None:
        """As Seamless 1.x does it; a record that is there already stays."""
        self._ask("PUT", {"type": "transformation", "checksum": name, "value": result})
        if metadata is not None:
            self._ask("PUT", {"type": "metadata", "checksum": name, "result": result, "value": metadata}, 409)

    def forget(self, transformation) -> bool:
        """As ``MemoryResults.forget``."""
        answer = self._post("forget", {"transformations": [Checksum(transformation)]})
        if answer is None:
            raise SeamlessError("%s is a database of Seamless 1.x, which cannot forget results: open its file instead" % self.address)
        return answer["forgotten"][0]

    def reverse(self, result) -> _t.List[str]:
        """As ``MemoryResults.reverse``."""
        answer = self._ask("GET", {"type": "rev_transformations", "checksum": Checksum(result)}, 404)
        return [] if answer.status == 404 else list(dict.fromkeys(answer.json()))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(self, method: str, query: dict, *also: int):
        answer = self._http.request(method, "/", json=query)
        if answer.status == 405:
            raise SeamlessError("%s serves its results for reading only: start it with --writable" % self.address)
        return answer.expect(200, *also)

    def _post(self, name: str, query: dict) -> _t.Optional[dict]:
        """The answer; None from a server that does not know our requests."""
        answer = self._http.request("POST", "/results/" + name, json=query)
        if answer.status == 405 and b"read-only" not in answer.body:
            return None
        if answer.status == 405:
            raise SeamlessError("%s serves its results for reading only: start it with --writable" % self.address)
        return answer.expect(200).json()

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
    return DatabaseService(table)


def main(argv: _t.Optional[_t.List[str]] = None) -> int:
    """The program ``seamless-database``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="seamless-database", description="Serve a table of results (seamless.db) over HTTP.")
    parser.add_argument("file", metavar="FILE", help="the SQLite file")
    parser.add_argument("--writable", action="store_true", help="accept new results too, and make the file if it is missing")
    service_arguments(parser)
    return run_service(make_service, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
