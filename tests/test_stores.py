"""What every store promises, run over all of them; and ``open_stores``."""
import gzip
import os
import threading

import pytest

from seamless_lite.checksum import Checksum
from seamless_lite.database import DatabaseClient, DatabaseService
from seamless_lite.errors import ChecksumError, CorruptBufferError, SeamlessError, ServiceError
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.hashserver import HashserverClient, HashService
from seamless_lite.httpbase import Listen, start
from seamless_lite.resulttable import MemoryResults, ResultTable
from seamless_lite.stores import is_on_network, open_stores

SECRET = b"s" * 32
DATA = b"some content\n"
CS = Checksum.of(DATA)
A, B, C, R, S = (Checksum.of(name) for name in (b"a", b"b", b"c", b"r", b"s"))


@pytest.fixture(params=["memory", "folder", "http", "http without signatures"])
def buffers(request, tmp_path):
    if request.param == "memory":
        yield MemoryBuffers()
        return
    folder = Folder(tmp_path / "buffers")
    if request.param == "folder":
        yield folder
        return
    secret = SECRET if request.param == "http" else None
    with start(HashService(folder), Listen(socket_path=str(tmp_path / "s")), secret=secret) as running:
        client = HashserverClient(running.address, secret)
        yield client
        client.close()


@pytest.fixture(params=["memory", "file", "http", "http without signatures"])
def results(request, tmp_path):
    if request.param == "memory":
        yield MemoryResults()
        return
    table = ResultTable(tmp_path / "new" / "folder" / "seamless.db")
    if request.param == "file":
        yield table
        table.close()
        return
    secret = SECRET if request.param == "http" else None
    with start(DatabaseService(table), Listen(socket_path=str(tmp_path / "s")), secret=secret) as running:
        client = DatabaseClient(running.address, secret)
        yield client
        client.close()


# ---- buffers

@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(range(256)) * 20000], ids=["empty", "one byte", "text", "5 MB"])
def test_a_buffer_comes_back_as_it_went_in(buffers, data):
    checksum = buffers.put(data)
    assert checksum == Checksum.of(data) and isinstance(checksum, Checksum)
    assert buffers.get(checksum) == data
    assert buffers.get(checksum.upper()) == data
    assert buffers.has([checksum, A]) == [True, False]
    assert buffers.length(checksum) == len(data)
    with buffers.open(checksum) as file:
        assert file.read(3) == data[:3]
        file.seek(0)
        assert file.read() == data
    path = buffers.path(checksum)
    if path is not None:
        with open(path, "rb") as file:
            assert file.read() == data
    assert buffers.put(data) == checksum


def test_an_unknown_buffer_is_none(buffers):
    assert buffers.get(CS) is None and buffers.open(CS) is None and buffers.path(CS) is None and buffers.length(CS) is None
    assert buffers.has([CS, A]) == [False, False] and buffers.has([]) == []
    assert buffers.length(Checksum.of(b"")) is None


def test_what_is_no_checksum_is_refused(buffers):
    for call in (buffers.get, buffers.open, buffers.length, lambda text: buffers.has([text])):
        with pytest.raises(ChecksumError):
            call("../../etc/passwd")


@pytest.mark.slow
def test_many_buffers_are_stored_together(buffers):
    datas = [b"%d" % i for i in range(2500)] + [bytes(2 << 20), b"", b"1"]
    checksums = buffers.put_many(iter(datas))
    assert checksums == [Checksum.of(data) for data in datas]
    assert all(buffers.has(checksums))
    assert [buffers.get(checksum) for checksum in checksums] == datas
    assert buffers.put_many([]) == []


def test_a_file_is_stored(buffers, tmp_path):
    source = tmp_path / "so'me file;"
    source.write_bytes(DATA * 200000)
    checksum = Checksum.of(DATA * 200000)
    assert buffers.put_file(source) == checksum
    assert buffers.put_file(str(source), checksum) == checksum
    assert buffers.get(checksum) == DATA * 200000
    assert source.exists()


def test_a_file_may_be_moved_into_the_store(buffers, tmp_path):
    source = tmp_path / "result"
    source.write_bytes(DATA)
    assert buffers.put_file(source, move=True) == CS
    assert buffers.get(CS) == DATA


def test_a_file_with_another_content_is_refused(buffers, tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"changed")
    with pytest.raises(CorruptBufferError):
        buffers.put_file(source, CS)
    assert buffers.has([CS, Checksum.of(b"changed")]) == [False, False]


def test_a_compressed_file_may_be_stored_as_its_content(buffers, tmp_path):
    source = tmp_path / "file.gz"
    source.write_bytes(gzip.compress(DATA))
    assert buffers.put_file(source, CS) == CS
    assert buffers.get(CS) == DATA
    raw = Checksum.of_file(source)
    assert buffers.put_file(source) == raw
    with pytest.raises(CorruptBufferError):
        buffers.put_file(source, A)


def test_a_missing_file_is_a_sentence(buffers, tmp_path):
    for checksum in (None, CS):
        with pytest.raises(SeamlessError, match="the file .*nothing cannot be read"):
            buffers.put_file(tmp_path / "nothing", checksum)


def test_buffers_are_stored_by_many_threads(buffers):
    barrier, failed = threading.Barrier(8), []

    def work(n):
        barrier.wait()
        for i in range(10):
            try:
                same, own = b"%d" % i, b"%d of %d" % (i, n)
                assert buffers.get(buffers.put(same)) == same and buffers.get(buffers.put(own)) == own
            except Exception as exc:
                failed.append(exc)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# ---- results

def test_a_result_comes_back(results):
    assert results.get(A) is None
    results.put(A, R)
    found = results.get(A.upper())
    assert found == R and isinstance(found, Checksum)
    results.put(A, R, {"schema_version": 1})
    assert results.get(A) == R and results.reverse(R) == [A]


def test_the_first_of_two_results_stays_if_nothing_ran_again(results, caplog):
    results.put(A, R, {"n": 1})
    results.put(A, S, {"n": 2})
    assert results.get(A) == R and results.reverse(S) == results.irreproducible(A) == [] and not caplog.text


def test_another_result_when_it_runs_again_makes_the_transformation_irreproducible(results, caplog):
    results.put(A, R, {"n": 1})
    results.put(A, R, again=True)
    assert results.irreproducible(A) == []
    results.put(A, S, again=True)
    assert results.get(A) is None and results.reverse(R) == [] and results.reverse(S) == []
    assert results.irreproducible(A) == [R, S]
    assert "transformation %s is irreproducible: its result was %s, and is %s now" % (A, R, S) in caplog.text
    results.put(A, R)
    assert results.get(A) is None and results.irreproducible(A) == [R, S]
    assert results.forget(A) and not results.forget(A) and results.irreproducible(A) == []
    results.put(A, S)
    assert results.get(A) == S


def test_many_results_are_recorded_together(results):
    rows = [(Checksum.of(b"%d" % i), R, {"n": i} if i % 2 else None) for i in range(2100)]
    results.put_many(rows)
    found = results.get_many([row[0] for row in rows] + [A])
    assert len(found) == 2100 and set(found.values()) == {R}
    assert all(isinstance(key, Checksum) and isinstance(value, Checksum) for key, value in found.items())
    assert sorted(results.reverse(R)) == sorted(row[0] for row in rows)
    results.put_many([])
    assert results.get_many([]) == {}


def test_a_forgotten_result_is_gone(results):
    results.put_many([(A, R, {"n": 1}), (B, R, None)])
    assert results.forget(A) is True
    assert results.get(A) is None and results.reverse(R) == [B]
    assert results.forget(A) is False and results.forget(C) is False


def test_a_result_that_is_no_checksum_is_refused(results):
    for call in (lambda: results.put("x", R), lambda: results.put(A, "x"), lambda: results.get("x"),
                 lambda: results.get_many(["x"]), lambda: results.forget("x"), lambda: results.reverse("x")):
        with pytest.raises(ChecksumError):
            call()
    assert results.get(A) is None


def test_results_are_recorded_by_many_threads(results):
    barrier, failed = threading.Barrier(8), []

    def work(n):
        barrier.wait()
        for i in range(10):
            name = Checksum.of(b"%d of %d" % (i, n))
            try:
                results.put(name, R, {"n": n})
                assert results.get(name) == R
            except Exception as exc:
                failed.append(exc)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(results.reverse(R)) == 80


# ---- open_stores

def test_without_places_everything_stays_in_memory():
    for spec in ({}, {"buffers": {"directory": None, "address": None}, "results": {"file": None, "address": None}}):
        stores = open_stores(spec)
        assert isinstance(stores.buffers, MemoryBuffers) and isinstance(stores.results, MemoryResults)
        stores.close()


def test_a_directory_and_a_file_are_opened_directly_and_not_made(tmp_path):
    spec = {"buffers": {"directory": str(tmp_path / "b"), "address": "unix:///nowhere"},
            "results": {"file": str(tmp_path / "r" / "seamless.db"), "address": None}}
    stores = open_stores(spec)
    assert stores.buffers.get(A) is None and stores.results.get(A) is None
    assert os.listdir(tmp_path) == []
    stores.results.put(A, stores.buffers.put(DATA))
    again = open_stores(spec)
    assert again.buffers.get(again.results.get(A)) == DATA
    stores.close()
    again.close()


def test_addresses_are_asked_with_the_secret(tmp_path):
    table, folder = ResultTable(tmp_path / "seamless.db"), Folder(tmp_path / "b")
    with start(HashService(folder), Listen(socket_path=str(tmp_path / "h")), secret=SECRET) as one, \
            start(DatabaseService(table), Listen(socket_path=str(tmp_path / "d"))) as two:
        spec = {"buffers": {"address": one.address, "auth": True}, "results": {"address": two.address, "auth": False}}
        stores = open_stores(spec, SECRET)
        stores.results.put(A, stores.buffers.put(DATA))
        assert folder.get(table.get(A)) == DATA
        with pytest.raises(ServiceError):
            open_stores(spec, b"another secret").buffers.get(A)
        stores.close()


def test_a_service_that_is_not_there_is_a_sentence(tmp_path):
    stores = open_stores({"buffers": {"address": "unix://%s/h" % tmp_path}, "results": {"address": "unix://%s/d" % tmp_path}})
    for call in (lambda: stores.buffers.put(DATA), lambda: stores.results.get(A)):
        with pytest.raises(ServiceError, match="nothing answers at unix:"):
            call()


def test_network_file_systems_are_known(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_bytes(b"/dev/sda / ext4 rw 0 0\nsrv:/home /home nfs4 rw 0 0\n/dev/sdb /home/my\\040disk xfs rw 0 0\n"
                       b"a /data ext4 rw 0 0\nmds@tcp:/x /data lustre rw 0 0\nme@host: /mnt/far fuse.sshfs rw 0 0\n")
    far = ["/home/me/x.db", "/data/x/y", "/mnt/far", "/home"]
    near = ["/", "/homes/x", "/home/my disk/x.db", "/tmp/x"]
    assert [is_on_network(path, str(mounts)) for path in far] == [True] * 4
    assert [is_on_network(path, str(mounts)) for path in near] == [False] * 4
    assert is_on_network("/", str(tmp_path / "no mounts")) is False


def test_sqlite_on_a_network_file_system_is_left_to_the_service(tmp_path, monkeypatch):
    spec = {"results": {"file": str(tmp_path / "seamless.db"), "address": "unix://%s/d" % tmp_path}}
    assert isinstance(open_stores(spec).results, ResultTable)
    monkeypatch.setattr("seamless_lite.stores.is_on_network", lambda path: True)
    assert isinstance(open_stores(spec).results, DatabaseClient)
    assert isinstance(open_stores({"results": {**spec["results"], "address": None}}).results, ResultTable)


def test_in_a_layer_that_is_only_read_nothing_is_changed(tmp_path):
    theirs = Folder(tmp_path / "theirs")
    path = theirs.path(theirs.put(DATA))
    with open(path, "r+b") as file:
        file.write(b"S")
    before = sorted(map(str, (tmp_path / "theirs").rglob("*")))
    stores = open_stores({"buffers": {"directory": str(tmp_path / "mine"), "read": [{"directory": str(tmp_path / "theirs")}]},
                          "results": {"file": str(tmp_path / "mine.db"), "read": [{"file": str(tmp_path / "theirs.db")}]}})
    assert stores.buffers.get(CS) is None and stores.results.get(A) is None
    assert stores.buffers.has([CS]) == [False]
    stores.buffers.put(DATA)
    assert stores.buffers.get(CS) == DATA
    stores.close()
    assert sorted(map(str, (tmp_path / "theirs").rglob("*"))) == before and not (tmp_path / "theirs.db").exists()
