"""Several stores that look like one, and SEAMLESS_REMOTE_CLIENTS."""
import json
import os
import sqlite3

import pytest

from seamless_lite import layers, resulttable
from seamless_lite import session as session_module
from seamless_lite.checksum import Checksum
from seamless_lite.errors import ServiceError
from seamless_lite.folder import Folder
from seamless_lite.httpbase import Listen, start
from seamless_lite.layers import LayeredResults
from seamless_lite.resulttable import ResultTable
from seamless_lite.settings import load_settings
from seamless_lite.stores import open_stores
from seamless_lite.transformation import Recipe

ROW = "a" * 64


def spec(tmp_path, *names):
    parts = [{"directory": str(tmp_path / name), "file": str(tmp_path / name / "seamless.db")} for name in names]
    return {kind: {**parts[0], "read": parts[1:]} for kind in ("buffers", "results")}


def test_all_layers_are_read_and_only_the_first_is_written(tmp_path):
    with_data = open_stores(spec(tmp_path, "colleague"))
    theirs = with_data.buffers.put(b"theirs")
    with_data.results.put(ROW, theirs)
    with_data.close()
    stores = open_stores(spec(tmp_path, "mine", "colleague"))
    mine = stores.buffers.put(b"mine")
    assert stores.buffers.has([mine, theirs, Checksum.of(b"nobody")]) == [True, True, False]
    assert (stores.buffers.get(theirs), stores.buffers.length(theirs)) == (b"theirs", 6)
    assert stores.buffers.path(theirs).startswith(str(tmp_path / "colleague"))
    assert stores.results.get(ROW) == theirs and stores.results.get_many([ROW, "b" * 64]) == {ROW: theirs}
    assert stores.results.reverse(theirs) == [ROW]
    assert not stores.results.forget(ROW), "what is read only is not forgotten"
    assert Folder(str(tmp_path / "colleague")).get(mine) is None


def test_a_layer_that_does_not_answer_is_left_out(tmp_path, caplog):
    stores = open_stores({"buffers": {"directory": str(tmp_path), "read": [{"address": "unix:///nowhere.sock", "auth": False}]}})
    assert stores.buffers.get(Checksum.of(b"x")) is None and "left out" in caplog.text
    caplog.clear()
    assert stores.buffers.has([Checksum.of(b"x")]) == [False] and caplog.text == ""


def test_seamless_remote_clients_are_used_and_a_read_only_one_is_not_written(tmp_path, monkeypatch):
    from seamless_lite import database, hashserver
    (tmp_path / "store").mkdir()
    buffers = start(hashserver.HashService(Folder(str(tmp_path / "store"))), Listen(host="127.0.0.1", port=0))
    results = start(database.DatabaseService(ResultTable(str(tmp_path / "seamless.db"))), Listen(host="127.0.0.1", port=0))
    try:
        for readonly in (False, True):
            clients = {"buffer": [{"readonly": readonly, "remote_url": buffers.address}],
                       "database": [{"readonly": readonly, "remote_url": results.address}]}
            monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps(clients))
            session = session_module.Session(load_settings(str(tmp_path), environ=os.environ))
            code = b"%s + 1\n" % (b"2" if readonly else b"1")
            recipe = Recipe("python", {"code": ("python", "transformer", Checksum.of(code))})
            outcome = session.run(recipe, buffers={Checksum.of(code): code})
            assert session.value(outcome, "mixed") == (3 if readonly else 2)
            session.close()
            fresh = session_module.Session(load_settings(str(tmp_path), environ=os.environ))
            assert (fresh.lookup(recipe) is None) == readonly
            fresh.close()
    finally:
        buffers.stop()
        results.stop()


def test_a_remote_client_that_is_down_is_one_sentence(tmp_path, monkeypatch):
    clients = {"buffer": [{"readonly": False, "remote_url": "http://127.0.0.1:9"}]}
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps(clients))
    session = session_module.Session(load_settings(str(tmp_path), environ=os.environ))
    with pytest.raises(ServiceError, match="127.0.0.1:9"):
        session.store.has([Checksum.of(b"x")])


def test_a_layer_that_failed_is_asked_again_later_and_closed_with_the_others(tmp_path, monkeypatch):
    table = ResultTable(str(tmp_path / "theirs.db"))
    table.put(ROW, "b" * 64)
    monkeypatch.setattr(resulttable, "BUSY_S", 0.1)
    theirs = ResultTable(str(tmp_path / "theirs.db"), writable=False)
    results = LayeredResults(ResultTable(str(tmp_path / "mine.db")), [theirs])
    other = sqlite3.connect(str(tmp_path / "theirs.db"), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert results.get(ROW) is None
    other.execute("ROLLBACK")
    other.close()
    assert results.get(ROW) is None, "it is left out for a while"
    monkeypatch.setattr(layers.time, "monotonic", lambda now=layers.time.monotonic: now() + layers.LEFT_OUT_S)
    assert results.get(ROW) == "b" * 64 and theirs._db is not None
    monkeypatch.undo()
    results._left_out[id(theirs)] = float("inf")
    results.close()
    assert theirs._db is None


def test_a_table_of_an_older_seamless_is_read_though_it_lacks_a_table(tmp_path, caplog):
    path = str(tmp_path / "theirs.db")
    ResultTable(path).put(ROW, "b" * 64)
    with sqlite3.connect(path) as db:
        db.execute('DROP TABLE "irreproducible_transformation"')
    results = LayeredResults(ResultTable(str(tmp_path / "mine.db")), [ResultTable(path, writable=False)])
    assert results._layers[1].irreproducible(ROW) == [] and results.get(ROW) == "b" * 64 and not caplog.text


def test_what_is_irreproducible_here_is_no_hit_of_a_colleague(tmp_path):
    from seamless_lite.database import DatabaseClient, DatabaseService
    ResultTable(str(tmp_path / "theirs.db")).put(ROW, "b" * 64)
    ResultTable(str(tmp_path / "theirs.db")).put("d" * 64, "b" * 64)
    mine, theirs = ResultTable(str(tmp_path / "mine.db")), ResultTable(str(tmp_path / "theirs.db"), writable=False)
    results = LayeredResults(mine, [theirs])
    results.put_many([(ROW, "b" * 64, None), (ROW, "c" * 64, None)], again=True)
    assert results.get(ROW) is None and results.get_many([ROW, "d" * 64]) == {"d" * 64: "b" * 64}
    with start(DatabaseService(mine, [theirs]), Listen(host="127.0.0.1", port=0)) as running:
        assert DatabaseClient(running.address).get(ROW) is None and DatabaseClient(running.address).get("d" * 64) == "b" * 64


def test_what_ran_again_though_only_a_colleague_knew_it_is_irreproducible_here(tmp_path, caplog):
    theirs, mine = ResultTable(str(tmp_path / "theirs.db")), ResultTable(str(tmp_path / "mine.db"))
    theirs.put_many([(name * 64, "b" * 64, None) for name in "adef"])
    before = (tmp_path / "theirs.db").read_bytes()
    results = LayeredResults(mine, [theirs])
    results.put(ROW, "c" * 64, {"n": 1}, True)
    results.put_many([("d" * 64, "c" * 64, None), ("e" * 64, "b" * 64, {"n": 1})], again=True)
    results.put("f" * 64, "c" * 64)
    assert mine.irreproducible(ROW) == mine.irreproducible("d" * 64) == ["b" * 64, "c" * 64] and caplog.text.count("is irreproducible") == 2
    results.put(ROW, "9" * 64, None, True)
    assert mine.irreproducible(ROW)[2:] == ["9" * 64] and results.get(ROW) is None
    assert mine.get_many([ROW, "d" * 64, "e" * 64, "f" * 64]) == {"e" * 64: "b" * 64, "f" * 64: "c" * 64} and not mine.irreproducible("e" * 64)
    assert mine.query('SELECT "checksum" FROM "meta_data"') == [("e" * 64,)] and (tmp_path / "theirs.db").read_bytes() == before


def test_the_same_through_a_service(tmp_path):
    from seamless_lite.database import DatabaseClient, DatabaseService
    theirs, mine = ResultTable(str(tmp_path / "theirs.db")), ResultTable(str(tmp_path / "mine.db"))
    theirs.put(ROW, "b" * 64)
    with start(DatabaseService(mine, [theirs]), Listen(socket_path=str(tmp_path / "s"))) as running:
        client = DatabaseClient(running.address)
        client.put_many([(ROW, "c" * 64, None)], again=True)
        client.close()
    assert mine.irreproducible(ROW) == ["b" * 64, "c" * 64]


def test_all_pages_of_layered_results_are_listed_through_a_service(tmp_path, monkeypatch):
    from seamless_lite.database import DatabaseClient, DatabaseService
    monkeypatch.setattr(resulttable, "PAGE", 1)
    ResultTable(str(tmp_path / "theirs.db")).put(ROW, "b" * 64)
    results = LayeredResults(ResultTable(str(tmp_path / "mine.db")), [ResultTable(str(tmp_path / "theirs.db"), writable=False)])
    results.put("c" * 64, "b" * 64)
    with start(DatabaseService(results), Listen(host="127.0.0.1", port=0)) as running:
        client, names = DatabaseClient(running.address), []
        page = client.recent()
        while page:
            names += [name for _, name in page]
            page = client.recent(page[-1][0])
    assert names == ["c" * 64, ROW]
