"""The SQLite file: its schema, several processes and threads, forks, damage.  What all stores do is in ``test_stores.py``."""
import json
import os
import pathlib
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite.checksum import Checksum
from seamless_lite.errors import DeadlineError, SeamlessError
from seamless_lite.resulttable import SCHEMA, ResultTable, _Write, put_row

ROOT = pathlib.Path(__file__).resolve().parent.parent
A, B, R, S = (Checksum.of(name) for name in (b"a", b"b", b"r", b"s"))
HTTP_MD_INDEXES = {
    "transformation_result", "rev_transformation_result", "meta_data_result", "irreproducible_transformation_result",
    "irreproducible_transformation_checksum", "syntactic_to_semantic_syntactic", "syntactic_to_semantic_semantic",
    "expression_result", "bucket_probe_bucket_checksum"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "seamless.db"


@pytest.fixture
def table(file):
    table = ResultTable(file)
    yield table
    table.close()


def rows(file, name):
    db = sqlite3.connect(str(file))
    try:
        return db.execute("SELECT * FROM %s" % name).fetchall()
    finally:
        db.close()


def test_looking_makes_no_file(table, tmp_path):
    assert table.get(A) is None and table.get_many([A]) == {} and table.reverse(R) == [] and table.forget(A) is False
    assert list(tmp_path.iterdir()) == []


def test_the_schema_is_that_of_seamless(table, file):
    table.put(A, R, {"schema_version": 1, "x": [1, 2]})
    assert rows(file, "transformation") == [(A, R)]
    assert rows(file, "rev_transformation") == [(1, R, A)]
    assert rows(file, "meta_data") == [(A, R, '{"schema_version":1,"x":[1,2]}')]
    db = sqlite3.connect(str(file))
    names = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type='index' AND sql IS NOT NULL")}
    assert names == HTTP_MD_INDEXES
    assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert db.execute("PRAGMA user_version").fetchone() == (0,)
    columns = [row[1:4] for row in db.execute("PRAGMA table_info(expression)")]
    assert columns[1] == ("path", "VARCHAR(100)", 1) and columns[4] == ("validator", "CHAR(64)", 0)
    db.close()
    assert os.listdir(file.parent) == ["seamless.db"]


def test_commits_are_synced(table):
    table.put(A, R)
    assert table.query("PRAGMA synchronous")[0][0] >= 2


def test_without_metadata_there_is_no_metadata_row(table, file):
    table.put(A, R)
    table.put(A, R, None)
    assert rows(file, "meta_data") == [] and len(rows(file, "rev_transformation")) == 1


def test_the_first_record_stays_and_those_of_different_results_are_kept(table, file):
    table.put(A, R, {"n": 1})
    table.put(A, R, {"n": 2})
    assert rows(file, "meta_data") == [(A, R, '{"n":1}')]
    table.put(A, S, {"n": 3})
    assert rows(file, "meta_data") == [(A, R, '{"n":1}')]
    table.put(A, S, {"n": 3}, again=True)
    assert rows(file, "meta_data") == rows(file, "rev_transformation") == rows(file, "transformation") == []
    assert [row[1:] for row in rows(file, "irreproducible_transformation")] == [(R, A, '{"n":1}'), (S, A, '{"n":3}')]


def test_forgetting_leaves_no_row(table, file):
    table.put_many([(A, R, {"n": 1}), (B, R, {"n": 2})])
    assert table.forget(A)
    assert rows(file, "transformation") == [(B, R)] and rows(file, "meta_data") == [(B, R, '{"n":2}')]
    assert [row[1:] for row in rows(file, "rev_transformation")] == [(R, B)]


def test_double_and_stale_rows_of_seamless_do_not_show(table, file):
    table.put(A, R)
    db = sqlite3.connect(str(file))
    for result, name in ((R, A), (S, A), (R, B)):
        db.execute("INSERT INTO rev_transformation (result, checksum) VALUES (?, ?)", (result, name))
    db.commit()
    db.close()
    assert table.reverse(R) == [A] and table.reverse(S) == []


def test_a_new_folder_is_private(tmp_path):
    table = ResultTable(tmp_path / "a" / "b" / "seamless.db")
    table.put(A, R)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    table.close()


@pytest.mark.parametrize("name", ["weird ?#%41&mode=ro.db", "caf\udce9 '\";\n.db"])
def test_weird_names_are_names(tmp_path, name):
    table = ResultTable(tmp_path / name)
    table.put(A, R)
    assert table.get(A) == R and os.listdir(tmp_path) == [name]
    table.close()


def test_a_file_that_was_removed_or_replaced_is_noticed(table, file, tmp_path):
    table.put(A, R)
    os.unlink(file)
    assert table.get(A) is None
    table.put(B, S)
    assert rows(file, "transformation") == [(B, S)]
    other = ResultTable(tmp_path / "other.db")
    other.put(A, S)
    other.close()
    os.replace(tmp_path / "other.db", file)
    assert table.get(A) == S


# ---- damage and refusals: one sentence each

def refuses(call, *words):
    with pytest.raises(SeamlessError) as info:
        call()
    text = str(info.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("content", [b"this is no database at all, " * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_a_sentence(table, file, content):
    file.write_bytes(content)
    for call in (lambda: table.get(A), lambda: table.put(A, R), lambda: table.forget(A), lambda: table.reverse(R)):
        refuses(call, str(file), "move it away")
    assert file.read_bytes() == content


def test_a_page_of_rubbish_is_a_sentence(table, file):
    table.put_many([(Checksum.of(b"%d" % i), R, {"n": i}) for i in range(2000)])
    table.close()
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.seek(4096)
        handle.write(b"\xa5" * (size - 4096))
    refuses(lambda: [table.get(Checksum.of(b"%d" % i)) for i in range(2000)], str(file), "damaged")
    refuses(lambda: table.put(A, R), str(file), "damaged")


def test_the_database_of_another_program_is_left_alone(table, file):
    db = sqlite3.connect(str(file))
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.commit()
    db.close()
    for call in (lambda: table.get(A), lambda: table.put(A, R)):
        refuses(call, str(file), "another program")
    assert rows(file, "sqlite_master")[0][1] == "bookmarks" and len(rows(file, "sqlite_master")) == 1


def test_an_empty_file_is_an_empty_table(table, file):
    file.write_bytes(b"")
    assert table.get(A) is None
    table.put(A, R)
    assert table.get(A) == R


@pytest.mark.parametrize("filled", [False, True])
def test_the_metadata_table_of_an_old_seamless(table, file, filled):
    table.put(A, R)
    table.close()
    db = sqlite3.connect(str(file))
    db.execute("DROP TABLE meta_data")
    db.execute("CREATE TABLE meta_data (checksum CHAR(64) NOT NULL PRIMARY KEY, metadata TEXT NOT NULL)")
    if filled:
        db.execute("INSERT INTO meta_data VALUES (?, '{}')", (A,))
    db.commit()
    db.close()
    assert table.get(A) == R
    if filled:
        refuses(lambda: table.put(B, S, {}), str(file), "old version")
        assert len(rows(file, "meta_data")) == 1
    else:
        table.put(B, S, {"n": 1})
        assert rows(file, "meta_data") == [(B, S, '{"n":1}')]


def test_while_seamless_makes_a_file_it_has_no_rows_and_a_write_completes_it(tmp_path):
    """Seamless 1.x commits one table at a time, and may be killed between two."""
    statements = [statement for statement in SCHEMA.split(";") if statement.strip()]
    for count in range(1, len(statements)):
        for order in (statements, statements[::-1]):
            file = tmp_path / ("%d%s" % (count, order is statements))
            db = sqlite3.connect(str(file))
            for statement in order[:count]:
                db.execute(statement)
            db.commit()
            reader, table = ResultTable(file, writable=False), ResultTable(file)
            for each in (reader, table):
                assert (each.get(A), each.reverse(R), each.irreproducible(A), each.recent()) == (None, [], [], [])
            db.execute(order[count])            # they go on at the same time
            db.commit()
            table.put(A, R)
            assert reader.get(A) == R and HTTP_MD_INDEXES <= {row[1] for row in rows(file, "sqlite_master")}
            for open_file in (reader, table, db):
                open_file.close()


def test_a_file_with_fewer_tables_is_completed(table, file):
    table.put(A, R)
    table.close()
    db = sqlite3.connect(str(file))
    db.execute("DROP TABLE bucket_probe")
    db.commit()
    db.close()
    assert table.get(A) == R
    table.put(B, S)
    assert rows(file, "bucket_probe") == []


def test_a_table_opened_for_reading_refuses_to_write(table, file):
    table.put(A, R)
    reader = ResultTable(file, writable=False)
    assert reader.get(A) == R
    refuses(lambda: reader.put(B, R), "open for reading only")
    reader.close()


def test_a_place_where_no_file_can_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "seamless.db", tmp_path / "folder"):
        table = ResultTable(path)
        refuses(lambda: table.put(A, R), str(path))
        table.close()


def test_a_full_disk_is_a_sentence_and_the_table_goes_on(table, file):
    table.put(A, R)
    table.query("PRAGMA max_page_count = %d" % (file.stat().st_size // 4096 + 2))
    refuses(lambda: table.put_many([(Checksum.of(b"%d" % i), R, {"n": "x" * 100}) for i in range(1000)]), "disk is full")
    assert table.get(A) == R and rows(file, "transformation") == [(A, R)]
    table.put(B, S)
    assert table.get(B) == S


def test_a_file_that_stays_locked_is_a_deadline(table, file, monkeypatch):
    table.put(A, R)
    table.close()
    monkeypatch.setattr("seamless_lite.resulttable.BUSY_S", 0.1)
    db = sqlite3.connect(str(file), isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    for call in (lambda: table.put(B, R), lambda: table.get(A)):
        with pytest.raises(DeadlineError, match="locked by another process"):
            call()
    db.execute("COMMIT")
    db.close()
    table.put(B, R)
    assert table.get(B) == R


# ---- threads, processes, forks

def test_waiting_writers_share_one_commit(table, file):
    table.put(A, R)
    entered, go = threading.Event(), threading.Event()

    def slow(db):
        entered.set()
        assert go.wait(10)
    threads = [threading.Thread(target=table.write, args=(slow,))]
    threads[0].start()
    assert entered.wait(10)
    before = table_changes(file)
    names = [Checksum.of(b"%d" % i) for i in range(20)]
    threads += [threading.Thread(target=table.put, args=(name, R)) for name in names]
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 10
    while len(table._queue) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join()
    assert len(table.get_many(names)) == 20
    assert table_changes(file) == before + 1        # the slow one has changed nothing


def table_changes(file):
    """SQLite's count of commits, in the header of the file."""
    with open(file, "rb") as handle:
        return int.from_bytes(handle.read(28)[24:28], "big")


def test_an_error_of_one_writer_is_not_that_of_the_others(table):
    def wrong(db):
        raise ValueError("mine")
    table._queue.append(_Write(lambda db: put_row(db, A, R, None)))     # of a thread that waits for the lock
    with pytest.raises(ValueError, match="mine"):
        table.write(wrong)
    assert table.get(A) == R


def test_an_interrupted_commit_is_done_by_the_next(table):
    def interrupted(db):
        if not calls:
            calls.append(1)
            raise KeyboardInterrupt
    calls = []
    waiting = _Write(lambda db: put_row(db, A, R, None))
    table._queue.append(waiting)
    with pytest.raises(KeyboardInterrupt):
        table.write(interrupted)
    assert not waiting.done and table.get(A) is None
    table.put(B, R)
    assert waiting.done and table.get(A) == table.get(B) == R and not table._queue


def test_several_processes_write_at_once(file):
    code = ("import sys; from seamless_lite.resulttable import ResultTable; from seamless_lite.checksum import Checksum\n"
            "table = ResultTable(sys.argv[1])\n"
            "for i in range(30): table.put(Checksum.of(b'%s %d' % (sys.argv[2].encode(), i)), Checksum.of(b'r'), {'n': i})")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    children = [subprocess.Popen([sys.executable, "-c", code, str(file), str(n)], env=env) for n in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    assert len(rows(file, "transformation")) == len(rows(file, "rev_transformation")) == 120
    assert os.listdir(file.parent) == ["seamless.db"]


def in_child(function):
    """What ``function`` returned, as JSON, in a fork of this process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_a_fork_in_the_middle_of_commits_harms_neither_side(table, file):
    stop, failed = threading.Event(), []
    table.put(A, R)

    def write():
        i = 0
        while not stop.is_set():
            i += 1
            try:
                table.put(Checksum.of(b"thread %d" % i), R)
            except Exception as exc:
                failed.append(exc)
    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()

    def child():
        name = Checksum.of(b"child %d" % os.getpid())
        table.put(name, S)
        return [name, table.get(A), table.get(name)]
    answers = [in_child(child) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
    for name, first, second in answers:
        assert (first, second) == (R, S) and table.get(name) == S
    db = sqlite3.connect(str(file))
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_killed_writer_loses_nothing_that_it_reported(table, file):
    code = ("import sys; from seamless_lite.resulttable import ResultTable; from seamless_lite.checksum import Checksum\n"
            "table, i = ResultTable(sys.argv[1]), 0\n"
            "while True:\n"
            "    name = Checksum.of(b'%d' % i); table.put(name, Checksum.of(b'r')); print(name, flush=True); i += 1")
    child = subprocess.Popen([sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                             stdout=subprocess.PIPE, text=True)
    names = [child.stdout.readline().strip() for _ in range(20)]
    child.kill()
    names += child.stdout.read().split("\n")[:-1]
    child.wait()
    child.stdout.close()
    assert len(table.get_many(names)) == len(names)
    table.put(A, R)
    assert table.get(A) == R
