"""The database over HTTP: what Seamless 1.x and curl see, our batches, and the program."""
import http.client
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite import database
from seamless_lite.checksum import Checksum
from seamless_lite.database import DatabaseClient, DatabaseService
from seamless_lite.errors import SeamlessError, ServiceError
from seamless_lite.httpbase import Listen, start
from seamless_lite.resulttable import ResultTable

ROOT = pathlib.Path(__file__).resolve().parent.parent
A, B, R, S = (str(Checksum.of(name)) for name in (b"a", b"b", b"r", b"s"))
RECORD = {"schema_version": 1, "tf_checksum": A, "result_checksum": R, "seamless_version": "0.6.1"}


@pytest.fixture
def table(tmp_path):
    return ResultTable(tmp_path / "seamless.db")


@pytest.fixture
def running(table):
    with start(DatabaseService(table), Listen(host="127.0.0.1", port=0)) as running:
        yield running


def send(port, method, path, body, kind="text/plain"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body if isinstance(body, str) else json.dumps(body), {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.fixture
def get(running):
    return lambda type, **fields: send(running.port, "GET", "/any/path", {"type": type, **fields})


@pytest.fixture
def put(running):
    return lambda type, **fields: send(running.port, "PUT", "/", {"type": type, **fields})


OK = (200, "OK")
UNKNOWN = (404, "ERROR: Unknown key")


def test_the_protocol_is_announced(get, running):
    status, text = get("protocol")
    assert status == 200 and json.loads(text) == ["seamless", "database", "2.2"]
    assert send(running.port, "GET", "/healthcheck", "") == OK


def test_a_transformation_is_put_and_got(get, put, table):
    assert get("transformation", checksum=A) == UNKNOWN
    assert put("transformation", checksum=A.upper(), value=R) == OK
    assert put("transformation", checksum=A, value=R) == OK
    assert get("transformation", checksum=A) == (200, R)
    assert json.loads(get("rev_transformations", checksum=R)[1]) == [A]
    assert table.query("SELECT COUNT(*) FROM rev_transformation") == [(1,)]
    assert put("transformation", checksum=A, value=S) == OK
    assert get("rev_transformations", checksum=R) == UNKNOWN
    assert get("transformation", checksum=A) == (200, S)


def test_metadata_is_recorded_with_its_result(get, put):
    assert get("metadata", checksum=A) == UNKNOWN
    assert put("metadata", checksum=A, result=R, value=RECORD) == OK
    assert put("metadata", checksum=A, result=R, value=json.dumps(RECORD, indent=3)) == OK
    assert get("metadata", checksum=A) == (200, json.dumps(RECORD, separators=(",", ":")))
    assert get("transformation", checksum=A) == (200, R)
    assert json.loads(get("rev_transformations", checksum=R)[1]) == [A]


@pytest.mark.parametrize("change", [
    {"schema_version": None}, {"schema_version": "1"}, {"schema_version": True}, {"tf_checksum": B}, {"result_checksum": S}])
def test_a_record_of_something_else_is_refused(get, put, change):
    status, text = put("metadata", checksum=A, result=R, value={**RECORD, **change})
    assert status == 400 and text.startswith("ERROR: ")
    assert get("transformation", checksum=A) == UNKNOWN


def test_records_that_contradict_are_conflicts(put):
    put("metadata", checksum=A, result=R, value=RECORD)
    assert put("metadata", checksum=A, result=R, value={**RECORD, "more": 1}) == (
        409, "ERROR: Execution record already exists with different metadata")
    other = {**RECORD, "result_checksum": S}
    assert put("metadata", checksum=A, result=S, value=other) == (
        409, "ERROR: Transformation result does not match execution record result")
    put("irreproducible", checksum=A, result=R)
    assert put("metadata", checksum=A, result=R, value=RECORD) == (409, "ERROR: Transformation already has irreproducible records")


def test_metadata_without_its_transformation_is_a_conflict_too(put, table):
    put("metadata", checksum=A, result=R, value=RECORD)
    table.write(lambda db: db.execute("DELETE FROM transformation"))
    assert put("metadata", checksum=A, result=S, value={**RECORD, "result_checksum": S}) == (
        409, "ERROR: Execution record result does not match stored metadata result")
    assert put("irreproducible", checksum=A, result=S)[0] == 409


def test_an_irreproducible_result_is_moved(get, put):
    put("metadata", checksum=A, result=R, value=RECORD)
    assert put("irreproducible", checksum=A, result=S) == (404, "ERROR: Transformation does not have the irreproducible result")
    assert get("irreproducible", checksum=A) == UNKNOWN
    assert put("irreproducible", checksum=A, result=R) == OK
    for fields in ({}, {"result": R}):
        assert json.loads(get("irreproducible", checksum=A, **fields)[1]) == [{"checksum": A, "result": R, "metadata": RECORD}]
    assert get("irreproducible", checksum=A, result=S) == UNKNOWN
    for type, name in (("transformation", A), ("metadata", A), ("rev_transformations", R)):
        assert get(type, checksum=name) == UNKNOWN
    assert put("irreproducible", checksum=B, result=R) == put("irreproducible", checksum=B, result=R) == OK
    assert json.loads(get("irreproducible", checksum=B)[1]) == [{"checksum": B, "result": R, "metadata": ""}]


def test_a_bucket_probe_is_put_and_got(get, put):
    row = {"bucket_kind": "node_env", "label": "here", "bucket_checksum": R, "captured_at": "2024-01-01", "freshness_tokens": {"a": 1}}
    assert get("bucket_probe", bucket_kind="node_env", label="here") == UNKNOWN
    assert put("bucket_probe", **row) == OK
    assert json.loads(get("bucket_probe", bucket_kind="node_env", label="here")[1]) == row
    assert put("bucket_probe", **{**row, "bucket_checksum": S}) == OK
    assert json.loads(get("bucket_probe", bucket_kind="node_env", label="here")[1])["bucket_checksum"] == S
    assert put("bucket_probe", **{**row, "bucket_kind": "bucket"})[0] == get("bucket_probe", bucket_kind="x", label="y")[0] == 400


def test_buffer_info_is_merged(get, put):
    assert put("buffer_info", checksum=A, value={"length": 1}) == OK
    assert put("buffer_info", checksum=A, value={"is_utf8": True}) == OK
    assert json.loads(get("buffer_info", checksum=A)[1]) == {"length": 1, "is_utf8": True}


def test_semantic_and_syntactic_checksums_know_each_other(get, put):
    kind = {"celltype": "plain", "subcelltype": None}
    for _ in range(2):
        assert put("semantic_to_syntactic", checksum=A, value=[R, S], **kind) == OK
    assert sorted(json.loads(get("semantic_to_syntactic", checksum=A, **kind)[1])) == sorted([R, S])
    assert json.loads(get("syntactic_to_semantic", checksum=R, **kind)[1]) == [A]
    assert get("syntactic_to_semantic", checksum=R, celltype="text") == UNKNOWN
    assert put("semantic_to_syntactic", checksum=A, value=["x"], **kind)[0] == 400


def test_an_expression_is_put_and_got(get, put):
    fields = {"checksum": A, "celltype": "plain", "path": ["a", 0], "target_celltype": "int"}
    assert put("expression", value=R, **fields) == OK
    assert get("expression", **fields) == (200, R)
    assert get("expression", **{**fields, "path": []}) == UNKNOWN
    [found] = json.loads(get("rev_expression", checksum=R)[1])
    assert {**found, "path": json.loads(found["path"])} == {**fields, "result": R}
    assert put("expression", value=R, **{**fields, "celltype": "text"})[0] == 400
    assert put("expression", value=R, **{**fields, "path": ["x" * 100]})[0] == 400


@pytest.mark.parametrize("body", [
    "", "{", "[]", "1", "[" * 10000, {}, {"type": 1}, {"type": "nothing"}, {"type": "transformation"},
    {"type": "transformation", "checksum": "abc"}, {"type": "transformation", "checksum": [A], "value": R},
    {"type": "transformation", "checksum": A[:-1], "value": R}])
def test_a_bad_query_is_a_400(running, body):
    for method in ("GET", "PUT"):
        status, text = send(running.port, method, "/", body)
        assert status == 400 and text.startswith("ERROR: ") and "Traceback" not in text


def test_other_methods_are_not_allowed(running):
    for method in ("POST", "DELETE", "HEAD"):
        assert send(running.port, method, "/", {"type": "transformation", "checksum": A})[0] == 405


# ---- our batches

def post(running, name, body):
    status, text = send(running.port, "POST", "/results/" + name, body)
    return status, json.loads(text)


def test_batches_of_results(running):
    assert post(running, "put", {"rows": [[A, R, None], [B, R, {"n": 1}]]}) == (200, {"stored": 2})
    assert post(running, "get", {"transformations": [A, B, S]}) == (200, {"results": {A: R, B: R}})
    assert post(running, "forget", {"transformations": [A, S]}) == (200, {"forgotten": [True, False]})
    assert post(running, "get", {"transformations": [A]}) == (200, {"results": {}})


@pytest.mark.parametrize("name, body", [
    ("get", []), ("get", {"transformations": "x"}), ("get", {"transformations": ["x"]}), ("put", {"rows": [[A, R]]}),
    ("put", {"rows": [[A, "x", None]]}), ("put", {"rows": [[A, R, "text"]]}), ("forget", {}), ("put", "{")])
def test_a_bad_batch_is_a_400_and_stores_nothing(running, table, name, body):
    assert send(running.port, "POST", "/results/" + name, body)[0] == 400
    assert table.get(A) is None


def test_concurrent_writes_share_commits(running, table, tmp_path):
    table.put(S, R)
    entered, go = threading.Event(), threading.Event()

    def slow(db):
        entered.set()
        assert go.wait(10)
    threads = [threading.Thread(target=table.write, args=(slow,))]
    threads[0].start()
    assert entered.wait(10)
    answers = []
    names = [str(Checksum.of(b"%d" % i)) for i in range(20)]
    for name in names:
        query = {"type": "transformation", "checksum": name, "value": R}
        threads.append(threading.Thread(target=lambda query=query: answers.append(send(running.port, "PUT", "/", query))))
        threads[-1].start()
    deadline = time.monotonic() + 10
    while len(table._queue) < 20:
        assert time.monotonic() < deadline and answers == []
        time.sleep(0.01)
    before = commits(table.path)
    go.set()
    for thread in threads:
        thread.join()
    assert answers == [OK] * 20 and commits(table.path) == before + 1
    assert len(table.get_many(names)) == 20


def commits(path):
    """SQLite's count of commits, in the header of the file."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(28)[24:], "big")


def test_a_server_for_reading_only_refuses_to_write(table, tmp_path):
    table.put(A, R)
    with start(DatabaseService(ResultTable(table.path, writable=False)), Listen(host="127.0.0.1", port=0)) as running:
        assert send(running.port, "PUT", "/", {"type": "transformation", "checksum": B, "value": R}) == (
            405, "ERROR: Database server is read-only")
        client = DatabaseClient(running.address)
        assert client.get(A) == R and client.get_many([A, B]) == {A: R} and client.reverse(R) == [A]
        for write in (lambda: client.put(B, R), lambda: client.forget(A)):
            with pytest.raises(SeamlessError, match="for reading only: start it with --writable"):
                write()


def test_the_client_speaks_with_a_server_that_has_no_batches(table):
    service = DatabaseService(table)
    service.routes = [route for route in service.routes if route[0] != "POST"]
    with start(service, Listen(host="127.0.0.1", port=0)) as running:
        client = DatabaseClient(running.address)
        client.put_many([(A, R, RECORD), (B, R, None)])
        client.put(A, R, {**RECORD, "more": 1})
        assert client.get_many([A, B, S]) == {A: R, B: R} and sorted(client.reverse(R)) == sorted([A, B])
        assert table.query("SELECT metadata FROM meta_data") == [(json.dumps(RECORD, separators=(",", ":")),)]
        with pytest.raises(SeamlessError, match="cannot forget"):
            client.forget(A)


def test_an_answer_that_is_no_result_is_an_error(table):
    class Odd(DatabaseService):
        def get(self, request):
            return "hello"
    with start(Odd(table), Listen(host="127.0.0.1", port=0)) as running:
        with pytest.raises(ServiceError, match="it is not a database"):
            DatabaseClient(running.address).get(A)


def test_a_damaged_file_reaches_the_client_as_a_sentence(running, table):
    pathlib.Path(table.path).write_bytes(b"no database " * 500)
    client = DatabaseClient(running.address)
    for call in (lambda: client.get(A), lambda: client.put(A, R), lambda: client.get_many([A])):
        with pytest.raises(SeamlessError, match="damaged or not a result table"):
            call()


# ---- the program

@pytest.fixture
def program(tmp_path):
    children = []

    def run(*args, command=(sys.executable, "-m", "seamless_lite.database"), **options):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        children.append(subprocess.Popen([*command, *map(str, args)], env=env, stderr=subprocess.PIPE, **options))
        return children[-1]
    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


def test_the_program_runs_through_a_symlink_and_serves_curl(program, tmp_path):
    link, status = tmp_path / "db", tmp_path / "status.json"
    link.symlink_to(ROOT / "bin" / "seamless-database")
    status.write_text("{}")
    child = program(tmp_path / "new" / "seamless.db", "--writable", "--auth", "none", "--status-file", status,
                    "--port-range", 49152, 65535, command=(sys.executable, str(link)), cwd=tmp_path)
    deadline = time.monotonic() + 20
    while json.loads(status.read_text()).get("status") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    url = "http://127.0.0.1:%d/" % json.loads(status.read_text())["port"]
    if shutil.which("curl"):
        query = json.dumps({"type": "transformation", "checksum": A, "value": R})
        subprocess.run(["curl", "-sf", "-X", "PUT", "-d", query, url], check=True, stdout=subprocess.DEVNULL)
        answer = subprocess.run(["curl", "-sf", "-X", "GET", "-d", query, url], check=True, stdout=subprocess.PIPE)
        assert answer.stdout.decode() == R
        db = sqlite3.connect(str(tmp_path / "new" / "seamless.db"))
        assert db.execute("SELECT * FROM transformation").fetchall() == [(A, R)]
        db.close()
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == 0


@pytest.mark.parametrize("content, words", [(None, b"does not exist"), (b"no database" * 100, b"damaged or not a result table")])
def test_the_program_refuses_a_file_that_is_no_table(program, tmp_path, content, words):
    if content:
        (tmp_path / "seamless.db").write_bytes(content)
    child = program(tmp_path / "seamless.db", "--auth", "none")
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 1 and words in errors and b"Traceback" not in errors
    assert not os.path.exists(tmp_path / "seamless.db") or content


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_an_idle_server_is_small(program, tmp_path):
    for command, argument, name in (("database", "seamless.db", "s1"), ("hashserver", "store", "s2")):
        child = program(tmp_path / argument, "--writable", "--socket", tmp_path / name, "--auth", "none",
                        command=(sys.executable, "-m", "seamless_lite." + command))
        deadline = time.monotonic() + 20
        while not os.path.exists(tmp_path / name):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with open("/proc/%d/status" % child.pid) as status:
            [size] = [line for line in status if line.startswith("VmRSS")]
        assert int(size.split()[1]) < 30 << 10, command


def test_a_database_that_knows_of_no_irreproducible_ones_is_asked_once(table, monkeypatch):
    monkeypatch.delitem(database._READERS, "irreproducible")
    asked, ask = [], DatabaseClient._ask
    monkeypatch.setattr(DatabaseClient, "_ask", lambda self, method, target, query, *also: (
        asked.append(query.get("type") if method == "GET" else None), ask(self, method, target, query, *also))[1])
    service = DatabaseService(table)
    service.routes = [route for route in service.routes if route[0] != "POST"]
    with start(service, Listen(host="127.0.0.1", port=0)) as running:
        client = DatabaseClient(running.address)
        client.put_many([(A, R, None), (A, R, None), (B, R, None)])
        assert client.irreproducible(A) == [] and client.get(B) == R
    assert asked.count("irreproducible") == 1
