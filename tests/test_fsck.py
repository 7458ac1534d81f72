"""fsck.py and seamless-fsck: what is wrong with a store is found, and moved aside without losing anything."""
import contextlib
import io
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite import cmd_fsck, compressed, fsck as fsck_module
from seamless_lite.celltypes import plain_dumps
from seamless_lite.checksum import Checksum
from seamless_lite.folder import STALE_S, Folder
from seamless_lite.fsck import QUARANTINE, Fsck, look
from seamless_lite.record import minimal_record
from seamless_lite.resulttable import ResultTable
from seamless_lite.transformation import Recipe


class Store:
    """A store with one transformation that has a deep input, and a deep result."""

    def __init__(self, path):
        self.path, self.database = path, str(path / "seamless.db")
        self.folder, self.table = Folder(path), ResultTable(self.database)
        self.leaf, self.code, self.x = self.folder.put(b"leaf"), self.folder.put(b"code\n"), self.folder.put(b"17\n")
        self.index = self.folder.put(plain_dumps({"a": self.leaf}))
        recipe = Recipe("bash", {"code": ("text", None, self.code), "x": ("int", None, self.x), "d": ("deepfolder", None, self.index)},
                        ("result", "deepfolder", None))
        self.transformation = self.folder.put(recipe.buffer)
        self.result_leaf = self.folder.put(b"result leaf")
        self.result = self.folder.put(plain_dumps({"out": self.result_leaf}))
        self.table.put(self.transformation, self.result, minimal_record(self.transformation, self.result, {}))

    def file(self, checksum, suffix=""):
        return self.path / checksum[:2] / (checksum + suffix)

    def damage(self, checksum, data=b"damaged"):
        path = self.file(checksum)
        path.unlink()
        path.write_bytes(data)

    def sql(self, statement, *values):
        with contextlib.closing(sqlite3.connect(self.database)) as db, db:
            return db.execute(statement, values).fetchall()

    def check(self, repair=False, quick=False, database=True):
        found = []
        fsck = Fsck(str(self.path), self.database if database else None, found.append, quick, repair)
        fsck.run()
        assert fsck.damage == sum(finding.damage for finding in found)
        assert fsck.repaired == sum(finding.repaired for finding in found if finding.damage)
        return found

    def notes(self):
        return [json.loads(line) for note in self.path.glob(QUARANTINE + "/*/note.jsonl") for line in note.read_text().splitlines()]

    def quarantined(self):
        return {path.read_bytes() for path in self.path.glob(QUARANTINE + "/*/*") if path.name != "note.jsonl"}


@pytest.fixture(autouse=True)
def whatever_age(monkeypatch):
    monkeypatch.setattr(fsck_module, "YOUNG_S", 0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store" / "__TOPLEVEL__")


def kinds(found):
    return sorted((finding.kind, finding.where.split("/")[-1].split(" ")[0][:10]) for finding in found)


def snapshot(path):
    return {str(file): (file.read_bytes(), os.lstat(file).st_mtime_ns) for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_sound_store_has_no_findings_and_nothing_is_written_or_counted_as_used(store):
    before = snapshot(store.path)
    for file in store.path.glob("??/*"):
        os.utime(file, ns=(10**18, os.stat(file).st_mtime_ns))
    assert store.check() == [] == store.check(repair=True) == store.check(quick=True)
    assert {os.stat(file).st_atime for file in store.path.glob("??/*")} == {1e9}
    assert snapshot(store.path) == before


def test_a_subproject_of_seamless_that_is_called_like_a_folder_of_buffers_is_left_alone(store):
    inner = Store(store.file(store.leaf).parent)    # made in the layout that is there, "flat"
    assert (inner.path / inner.code).exists()
    before = snapshot(store.path)
    assert store.check(repair=True) == [] and snapshot(store.path) == before


@pytest.mark.parametrize("data, text", [(b"", "it is empty"), (b"le", "its 2 bytes are those of " + Checksum.of(b"le")),
                                        (b"LEAF", "its 4 bytes are those of " + Checksum.of(b"LEAF"))])
def test_a_damaged_buffer_is_found_and_only_a_repair_moves_it(store, data, text):
    store.damage(store.leaf, data)
    first = store.check()
    assert [(finding.kind, finding.text) for finding in first if finding.damage] == [("corrupt", text)]
    assert kinds(first) == [("corrupt", store.leaf[:10]), ("missing", store.leaf[:10])]
    assert store.file(store.leaf).read_bytes() == data
    assert [finding.repaired for finding in store.check(repair=True) if finding.damage] == [True]
    assert not store.file(store.leaf).exists() and store.quarantined() == {data}
    [note] = store.notes()
    assert note["was"] == "%s/%s" % (store.leaf[:2], store.leaf) and "corrupt" in note["why"]
    assert not any(finding.damage for finding in store.check())
    store.folder.put(b"leaf")
    assert store.check() == []


def test_quick_reads_no_buffer_but_sees_empty_and_missing_ones(store):
    store.damage(store.leaf)
    assert store.check(quick=True) == []
    store.damage(store.leaf, b"")
    store.file(store.result).unlink()
    assert kinds(store.check(quick=True)) == [("corrupt", store.leaf[:10]), ("missing", "transforma")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_buffers_are_expanded_and_their_lengths_compared(store, tmp_path, suffix):
    if suffix == ".zst" and not (compressed._zstd_module() or shutil.which("zstd")):
        pytest.skip("nothing here can write zstd")

    def pack(data):
        with open(tmp_path / "packed", "w+b") as file:
            compressed.compress(io.BytesIO(data), file, suffix)
        return (tmp_path / "packed").read_bytes()
    path = store.file(store.leaf)
    path.unlink()
    packed = store.file(store.leaf, suffix)
    packed.write_bytes(pack(b"leaf"))
    length = store.file(store.leaf, ".BUFFERLENGTH")
    length.write_bytes(b"4")
    assert store.check() == []
    length.write_bytes(b"5")
    assert kinds(store.check(repair=True)) == [("length", store.leaf[:10])] and not length.exists()
    length.write_bytes(b"4\n")
    assert kinds(store.check(quick=True)) == [("length", store.leaf[:10])]
    length.unlink()
    packed.write_bytes(pack(b"leaf")[:-9])
    assert ("corrupt", store.leaf[:10]) in kinds(store.check())
    packed.write_bytes(pack(b"other"))
    assert ("corrupt", store.leaf[:10]) in kinds(store.check())
    packed.write_bytes(b"leaf")
    assert [f.text for f in store.check() if f.kind == "misnamed"] == ["it is this buffer itself, not compressed"]
    packed.unlink()
    path.write_bytes(pack(b"leaf"))
    assert [f.text for f in store.check() if f.kind == "misnamed"] == ["it is this buffer, compressed as " + suffix]
    path.unlink()
    length.write_bytes(b"4")
    assert ("length", store.leaf[:10]) in kinds(store.check(repair=True)) and not length.exists()


def test_files_under_names_that_no_reader_looks_for(store):
    other = Checksum.of(b"other")
    (store.path / "00").mkdir(exist_ok=True)
    (store.path / "00" / other).write_bytes(b"other")
    upper = store.path / other.upper()
    upper.write_bytes(b"other")
    (store.path / "00" / "thing.txt").write_bytes(b"mine")
    (store.path / "STAGE-x").mkdir()
    (store.path / "STAGE-x" / other).write_bytes(b"this is another store")
    store.file(store.leaf, ".CORRUPT").write_bytes(b"bad")
    (store.path / other[:2]).mkdir(exist_ok=True)
    os.mkfifo(store.file(other))
    store.file(store.leaf, ".gz").symlink_to("/nowhere")
    found = store.check(repair=True)
    assert kinds(found) == sorted([("misnamed", other[:10])] * 2 + [("misnamed", other[:10].upper()), ("foreign", "thing.txt"),
                                                                    ("corrupt", store.leaf[:10]), ("dangling", store.leaf[:10])])
    assert {finding.repaired for finding in found if finding.damage} == {True}
    assert kinds(store.check()) == [("foreign", "thing.txt")]
    assert (store.path / "STAGE-x" / other).exists() and len(store.notes()) == 5


def test_a_flat_store_is_checked_too(tmp_path):
    folder = Folder(tmp_path, layout="flat")
    good, bad = folder.put(b"good"), folder.put(b"bad")
    os.chmod(tmp_path / bad, 0o600)
    (tmp_path / bad).write_bytes(b"BAD")
    found = []
    fsck = Fsck(str(tmp_path), None, found.append)
    fsck.run()
    assert kinds(found) == [("corrupt", bad[:10])] and fsck.buffers == 1 and (tmp_path / good).exists()


def test_what_is_being_written_is_left_alone_and_what_a_killed_writer_left_is_not(store):
    young, old = (store.file(store.leaf, "-%08x" % n) for n in (1, 2))
    real = store.file(store.leaf, "-x_9abcde")                          # as a hashserver of Seamless 1.x calls it
    for path in (young, old, real):
        path.write_bytes(b"half")
    for path in (old, real):
        os.utime(path, (time.time() - STALE_S - 60,) * 2)
    assert kinds(store.check(repair=True)) == [("stale", store.leaf[:10])] * 2
    assert young.exists() and not old.exists() and not real.exists()


def test_a_damaged_file_that_was_written_just_now_is_not_moved(store, monkeypatch):
    monkeypatch.setattr(fsck_module, "YOUNG_S", 60)
    store.damage(store.leaf, b"le")
    [finding] = [finding for finding in store.check(repair=True) if finding.damage]
    assert not finding.repaired and "repair it later" in finding.text and store.file(store.leaf).read_bytes() == b"le"
    os.utime(store.file(store.leaf), (0, 0))
    assert [finding.repaired for finding in store.check(repair=True) if finding.damage] == [True]


def test_ctrl_c_stops_at_once_and_leaves_no_thread(store, monkeypatch):
    store.damage(store.code)
    threads = threading.active_count()

    def interrupt(finding):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Fsck(str(store.path), None, interrupt).run()
    assert threading.active_count() == threads


def test_a_buffer_that_was_replaced_before_the_repair_stays(store, monkeypatch):
    store.damage(store.leaf)
    judge = fsck_module.look

    def look_and_replace(directory, path, *more):
        found = judge(directory, path, *more)
        if path == str(store.file(store.leaf)) and found.finding is not None:
            store.damage(store.leaf, b"leaf")
        return found
    monkeypatch.setattr(fsck_module, "look", look_and_replace)
    store.check(repair=True)
    assert store.file(store.leaf).read_bytes() == b"leaf" and store.notes() == []


def test_a_buffer_that_is_replaced_between_two_looks_stays(store, monkeypatch):
    store.damage(store.leaf)
    fsck = Fsck(str(store.path), None, lambda finding: None, repair=True)
    take = fsck.quarantine.take

    def replaced_just_before(path, finding):
        os.replace(Folder(store.path / "other").path(Folder(store.path / "other").put(b"leaf")), path)
        return take(path, finding)
    monkeypatch.setattr(fsck.quarantine, "take", replaced_just_before)
    fsck.run()
    assert store.file(store.leaf).read_bytes() == b"leaf"
    assert look(str(store.path), str(store.file(store.leaf))).checksum == store.leaf


def test_a_store_in_use_has_no_damage(store):
    done = threading.Event()

    def use():
        folder, table = Folder(store.path), ResultTable(store.database)
        for n in itertools.count():
            if done.is_set():
                return
            code = folder.put(b"code %d" % n)
            name = folder.put(Recipe("bash", {"code": ("text", None, code)}).buffer)
            table.put(name, folder.put(b"result %d" % n), minimal_record(name, Checksum.of(b"result %d" % n), {}))
            if n % 3 == 0:
                table.forget(name)
    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(10):
            assert [finding for finding in store.check(repair=True) if finding.kind != "orphan"] == []
    finally:
        done.set()
        thread.join()


def test_buffers_that_nothing_refers_to_are_no_damage(store):
    orphan = store.folder.put(b"orphan")
    [finding] = store.check()
    assert (finding.kind, finding.damage, finding.size) == ("orphan", False, 6) and finding.where.endswith(orphan)
    assert store.check(database=False) == [], "without rows nobody can tell"


@pytest.mark.parametrize("name, text", [
    ("result", "can be computed again"), ("transformation", "cannot be computed again"), ("both", "neither"), ("inputs", "nor are all of its inputs")])
def test_rows_without_buffers_are_told_but_legal(store, name, text):
    for gone in {"both": ("result", "transformation"), "inputs": ("result", "leaf")}.get(name, (name,)):
        store.file(getattr(store, gone)).unlink()
    found = store.check(repair=True)
    assert not any(finding.damage for finding in found)
    assert any(text in finding.text and store.transformation in finding.where for finding in found)
    assert store.sql('SELECT COUNT(*) FROM "transformation"') == [(1,)]


def test_a_missing_input_or_leaf_is_told(store):
    store.file(store.leaf).unlink()
    store.file(store.result_leaf).unlink()
    assert kinds(store.check()) == sorted([("missing", store.leaf[:10]), ("missing", store.result_leaf[:10])])


A, B = Checksum.of(b"a"), Checksum.of(b"b")


@pytest.mark.parametrize("statement, values, kind", [
    ('INSERT INTO "transformation" VALUES (?, ?)', ("short", A), "malformed"),
    ('INSERT INTO "transformation" VALUES (?, ?)', (A.upper(), A), "malformed"),
    ('INSERT INTO "transformation" VALUES (?, ?)', (A, 17), "malformed"),
    ('INSERT INTO "transformation" VALUES (?, ?)', (bytes(64), b"\xff\xfe"), "malformed"),
    ('INSERT INTO "transformation" VALUES (?, CAST(? AS TEXT))', (A, b"\xff\xfe"), "malformed"),
    ('INSERT INTO "rev_transformation" ("result", "checksum") VALUES (?, ?)', (A, "x"), "malformed"),
    ('INSERT INTO "irreproducible_transformation" ("result", "checksum", "metadata") VALUES (?, ?, ?)', (A, "", ""), "malformed"),
    ('INSERT INTO "buffer_info" VALUES (?, ?)', ("?", "{}"), "malformed"),
    ('UPDATE "meta_data" SET "metadata" = ?', ("{",), "malformed"),
    ('UPDATE "meta_data" SET "metadata" = ?', (b"\xff",), "malformed"),
    ('UPDATE "meta_data" SET "metadata" = ?', ("[" * 100000,), "malformed"),
    ('UPDATE "meta_data" SET "metadata" = ?', (json.dumps({"tf_checksum": A}),), "malformed")])
def test_rows_that_cannot_be_right_are_copied_and_removed(store, statement, values, kind):
    store.sql(statement, *values)
    found = [finding for finding in store.check() if finding.damage]
    assert [finding.kind for finding in found if "way back" not in finding.text] == [kind]
    assert store.notes() == []
    assert all(finding.repaired for finding in store.check(repair=True) if finding.damage)
    assert not any(finding.damage for finding in store.check())
    [note] = store.notes()
    assert note["table"] == statement.split('"')[1] and note["row"]
    if statement.startswith("INSERT") and all(isinstance(value, str) for value in values):
        assert set(values) <= {value for value in note["row"].values() if isinstance(value, str)}
    assert store.table.get(store.transformation) == store.result, "sound rows stay"


def test_rows_that_a_rerun_of_seamless_leaves_behind_are_no_damage_and_a_repair_removes_them(store, capsys):
    store.sql('UPDATE "transformation" SET "result" = ?', store.x)
    store.sql('INSERT INTO "rev_transformation" ("result", "checksum") VALUES (?, ?)', store.x, store.transformation)
    argv = ["--destination", str(store.path), "--database", store.database]
    for repair in (False, True):
        found = [finding for finding in store.check(repair=repair) if finding.kind != "orphan"]
        assert [(finding.kind, finding.damage, finding.repaired) for finding in found] == [("outdated", False, repair)] * 2
        assert cmd_fsck.main(argv) == 0
    assert {note["table"] for note in store.notes()} == {"rev_transformation", "meta_data"}
    assert [finding.kind for finding in store.check() if finding.kind != "orphan"] == []


def test_a_result_without_a_way_back_gets_one(store):
    store.sql('DELETE FROM "rev_transformation"')
    assert [(finding.kind, finding.repaired) for finding in store.check(repair=True)] == [("inconsistent", True)]
    assert store.sql('SELECT "result", "checksum" FROM "rev_transformation"') == [(store.result, store.transformation)]
    assert store.check() == []


def test_rows_of_many_pages_are_all_seen(store):
    with contextlib.closing(sqlite3.connect(store.database)) as db, db:
        db.executemany('INSERT INTO "rev_transformation" ("result", "checksum") VALUES (?, ?)', [("%d" % n, A) for n in range(2500)])
    assert len(store.check(repair=True)) == 2500
    assert store.sql('SELECT COUNT(*) FROM "rev_transformation"') == [(1,)]


def test_a_table_whose_writer_was_killed_is_sound(store):
    assert store.check() == []
    code = ("import os, sqlite3\n"
            "db = sqlite3.connect(%r, isolation_level=None)\n"
            "db.execute('PRAGMA cache_size = 1')\n"
            "db.execute('BEGIN IMMEDIATE')\n"
            "for n in range(2000): db.execute('INSERT INTO \"transformation\" VALUES (?, ?)', ('%%064x' %% n, '%%064x' %% n))\n"
            "os.kill(os.getpid(), 9)" % store.database)
    subprocess.run([sys.executable, "-c", code], timeout=60)
    assert os.path.getsize(store.database + "-journal") > 0
    assert store.check() == []


def test_a_database_that_is_none_is_damage_that_stays(store):
    store.table.close()
    with open(store.database, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(3 * 4096))
    assert "database" in {finding.kind for finding in store.check(repair=True)}
    with open(store.database, "wb") as file:
        file.write(b"hello" * 1000)
    [finding] = store.check(repair=True)
    assert finding.kind == "database" and "damaged" in finding.text and not finding.repaired


# --- the program

def run(capsys, *argv):
    code = cmd_fsck.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_program_on_the_store_of_the_configuration(store, home, capsys, monkeypatch):
    monkeypatch.setenv("SEAMLESS_CACHE", str(store.path.parent))
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and out == "7 buffers (%d bytes) and 1 results are sound\n" % sum(
        path.stat().st_size for path in store.path.glob("??/*"))
    store.damage(store.leaf)
    assert run(capsys, "-q")[:2] == (1, "corrupt %s/%s: its 7 bytes are those of %s\n" % (store.leaf[:2], store.leaf, Checksum.of(b"damaged")))
    code, out, err = run(capsys, "--repair")
    assert code == 0 and "1 damaged, 1 repaired; what was there is in " in out and "1 missing: no damage" in out
    assert run(capsys)[0] == 0


def test_json_has_a_line_for_each_finding_and_a_summary(store, capsys):
    store.damage(store.leaf)
    code, out, err = run(capsys, "--json", "--destination", store.path)
    *found, summary = map(json.loads, out.splitlines())
    assert code == 1 and [finding["kind"] for finding in found] == ["corrupt", "missing"]
    assert (summary["buffers"], summary["rows"], summary["damage"], summary["repaired"]) == (6, 1, 1, 0)


@pytest.mark.parametrize("argv, code, text", [
    (["--destination", "/nowhere"], 1, "there is no buffer folder"), (["--database", "x"], 2, "--destination"),
    (["--destination", ".", "--database", "/nowhere.db"], 1, "there is no file"),
    (["--destination", ".", "--stage", "x"], 2, "--stage"), (["--bad"], 2, "unrecognized")])
def test_wrong_usage_is_one_sentence(tmp_path, monkeypatch, capsys, argv, code, text):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *argv)
    assert found == code and text in err and "Traceback" not in err and out == ""


def test_a_repair_that_is_not_allowed_is_said(store, capsys, monkeypatch):
    store.damage(store.leaf)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "rename", refuse)
    code, out, err = run(capsys, "--repair", "--destination", store.path)
    assert code == 1 and "could not be repaired" in out
    assert store.file(store.leaf).read_bytes() == b"damaged"


def test_the_progress_of_a_check_is_not_shown_to_a_file(store):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        Fsck(str(store.path), None, lambda finding: None, who="x").run()
    assert stream.getvalue() == ""
