"""archive.py, seamless-export and seamless-import: closures as tar files, and what strangers may make of them."""
import contextlib
import io
import os
import pathlib
import random
import sqlite3
import subprocess
import sys
import tarfile

import pytest

from seamless_lite import archive, cmd_archive, database, hashserver, httpbase
from seamless_lite.celltypes import plain_dumps
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, SeamlessError
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.fsck import Fsck
from seamless_lite.record import minimal_record
from seamless_lite.resulttable import MemoryResults, ResultTable
from seamless_lite.stores import Stores
from seamless_lite.transformation import Recipe

ROOT = pathlib.Path(__file__).resolve().parent.parent
LARGE = os.urandom(1 << 20) + b"more than one piece"


def stores_at(path):
    return Stores(Folder(path), ResultTable(path / "seamless.db"))


class Made:
    """A transformation with a directory for an input and one for a result, in ``stores``; and something else."""

    def __init__(self, stores):
        self.stores = stores
        put = stores.buffers.put
        self.leaf, self.code = put(LARGE), put(b"code\n")
        self.index = put(plain_dumps({"a": self.leaf}))
        recipe = Recipe("bash", {"code": ("text", None, self.code), "d": ("deepfolder", None, self.index)}, ("result", "deepfolder", None))
        self.transformation = put(recipe.buffer)
        self.result_leaf = put(b"result leaf")
        self.result = put(plain_dumps({"out": self.result_leaf}))
        self.record = minimal_record(self.transformation, self.result, {"wall_time_seconds": 1.5})
        stores.results.put(self.transformation, self.result, self.record)
        self.inputs = {self.leaf, self.code, self.index}
        self.all = {self.transformation, self.result_leaf, self.result} | self.inputs
        put(b"something else")

    def export(self, *roots, **options):
        file = io.BytesIO()
        self.done = archive.export(roots or [self.transformation], self.stores, file, **options)
        return file.getvalue()


@pytest.fixture(params=["folder", "services"])
def any_stores(request, tmp_path):
    with contextlib.ExitStack() as stack:
        if request.param == "folder":
            yield stores_at(tmp_path / "store")
            return
        services = (hashserver.HashService(Folder(tmp_path / "store")), database.DatabaseService(ResultTable(tmp_path / "store" / "seamless.db")))
        addresses = []
        for service in services:
            running = httpbase.start(service, httpbase.Listen(host="127.0.0.1"))
            stack.callback(running.stop)
            addresses.append(running.address)
        stores = Stores(hashserver.HashserverClient(addresses[0]), database.DatabaseClient(addresses[1]))
        stack.callback(stores.close)
        yield stores


@pytest.fixture
def made(tmp_path):
    return Made(stores_at(tmp_path / "source"))


def members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def add(stores, data, dry_run=False):
    done = archive.Import(stores, dry_run)
    done.read(io.BytesIO(data), "x.tar")
    return done


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) if path.exists() else []


def expected(names):
    return {".HASHSERVER_PREFIX", "seamless.db"} | {name[:2] + "/" + name for name in names}


# --- export

def test_an_archive_is_laid_out_like_a_store_and_holds_the_closure_only(any_stores):
    made = Made(any_stores)
    found = members(made.export())
    assert set(found) == expected(made.all) and list(found) == sorted(found)
    assert all(Checksum.of(data) == name[3:] for name, data in found.items() if "/" in name)
    assert (made.done.buffers, made.done.rows, made.done.missing) == (6, 1, [])


def test_unpacked_it_is_a_sound_store(made, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(made.export())) as tar:
        tar.extractall(tmp_path / "unpacked")
    stores = stores_at(tmp_path / "unpacked")
    assert stores.results.get(made.transformation) == made.result and stores.results.reverse(made.result) == [made.transformation]
    assert archive._record(stores.results, made.transformation, made.result) == made.record
    fsck = Fsck(str(tmp_path / "unpacked"), stores.results.path, lambda finding: None)
    fsck.run()
    assert (fsck.damage, fsck.buffers, fsck.rows) == (0, 6, 1)


def test_the_same_content_gives_the_same_bytes(made, tmp_path):
    first = made.export()
    other = stores_at(tmp_path / "other")
    add(other, first)
    file = io.BytesIO()
    archive.export([made.transformation], other, file)
    assert file.getvalue() == first == made.export(made.result, made.transformation)


def test_a_result_brings_the_transformations_that_have_it(made):
    assert set(members(made.export(made.result))) == expected(made.all)
    assert set(members(made.export(made.index))) == expected({made.index, made.leaf}) - {"seamless.db"}


def test_inputs_can_be_left_out(made):
    assert set(members(made.export(inputs=False))) == expected(made.all - made.inputs)


def test_what_is_missing_is_an_error_unless_it_may_be(made, tmp_path):
    (tmp_path / "source" / made.leaf[:2] / made.leaf).unlink()
    file = io.BytesIO()
    with pytest.raises(CacheMissError, match="1 of 6 .*" + made.leaf):
        archive.export([made.transformation], made.stores, file)
    assert file.getvalue() == b""
    assert set(members(made.export(incomplete=True))) == expected(made.all - {made.leaf}) and made.done.missing == [made.leaf]
    assert set(members(made.export(inputs=False))) == expected(made.all - made.inputs)
    with pytest.raises(CacheMissError, match="unknown"):
        made.export(Checksum.of(b"?"), incomplete=True)


# --- import

def test_an_import_adds_all_and_the_second_time_nothing(made, any_stores):
    data = made.export()
    done = add(any_stores, data)
    assert (done.added, done.there, done.rows, done.known_rows) == (6, 0, 1, 0)
    assert all(any_stores.buffers.has(made.all)) and any_stores.buffers.get(made.leaf) == LARGE
    assert any_stores.results.get(made.transformation) == made.result
    assert archive._record(any_stores.results, made.transformation, made.result) == made.record
    done = add(any_stores, data)
    assert (done.added, done.there, done.rows, done.known_rows) == (0, 6, 0, 1)


def test_what_an_interrupted_import_left_is_completed(made, tmp_path):
    target = stores_at(tmp_path / "target")
    data = made.export()
    for end in (0, 100, 512, 3000, len(data) // 2, len(data) - 12000, len(data) - 10300):
        with pytest.raises(SeamlessError, match="ends in the middle"):
            add(target, data[:end])
        assert target.results.get(made.transformation) is None, "rows come last"
    done = add(target, data)
    assert done.added + done.there == 6 and done.there > 0 and done.rows == 1


def test_what_is_damaged_in_the_store_is_mended(made, tmp_path, caplog):
    target, data = stores_at(tmp_path / "target"), made.export()
    add(target, data)
    for name, content in ((made.code, b"CODE\n"), (made.leaf, bytes(len(LARGE))), (made.result_leaf, b"")):
        os.chmod(tmp_path / "target" / name[:2] / name, 0o644)
        (tmp_path / "target" / name[:2] / name).write_bytes(content)
    before, target = files(tmp_path / "target"), stores_at(tmp_path / "target")
    assert add(target, data, dry_run=True).there == 6 and files(tmp_path / "target") == before
    done = add(target, data)
    assert (done.added, done.mended, done.there) == (3, 3, 3) and "3 damaged buffers of the store were replaced" in caplog.text
    assert (target.buffers.get(made.code), target.buffers.get(made.leaf)) == (b"code\n", LARGE) and add(target, data).there == 6


def test_a_dry_run_writes_nothing_and_says_what_would_be(made, tmp_path):
    done = add(stores_at(tmp_path / "target"), made.export(), dry_run=True)
    assert (done.added, done.rows) == (6, 1) and files(tmp_path / "target") == []


def test_another_result_that_is_there_is_kept(made, any_stores):
    mine = any_stores.buffers.put(b"mine")
    any_stores.results.put(made.transformation, mine)
    done = add(any_stores, made.export())
    assert done.kept == [(made.transformation, mine, made.result)] and (done.rows, done.added) == (0, 6)
    assert any_stores.results.get(made.transformation) == mine and not any_stores.results.irreproducible(made.transformation)


def test_a_store_packed_with_tar_itself_can_be_imported(made, tmp_path):
    made.stores.close()
    data = subprocess.run(["tar", "-c", "-C", tmp_path / "source", "."], stdout=subprocess.PIPE, check=True).stdout
    assert add(stores_at(tmp_path / "target"), data).added == 7


# --- what must be refused

def tar_of(*entries, format=tarfile.GNU_FORMAT):
    """Entries are (name, data or None, fields of the TarInfo)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data, fields in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return file.getvalue()


A, B = b"some content", b"other content"
NAME = Checksum.of(A)
PLACE = "%s/%s" % (NAME[:2], NAME)


@pytest.mark.parametrize("name, data, fields", [
    ("/" + PLACE, A, {}), ("../" + PLACE, A, {}), ("ab/../" + PLACE, A, {}), ("/etc/passwd", A, {}), ("./../x", A, {}), ("", A, {}),
    ("readme", A, {}), (NAME.upper(), A, {}), ("00/" + NAME, A, {}), (PLACE + ".gz", A, {}), (PLACE + "\n", A, {}), ("ab/", b"", {}),
    (PLACE, B, {}), (PLACE, b"", {}), ("\udcff", A, {}), ("x" * 300, A, {}), (".HASHSERVER_PREFIX", b"1" * 600, {}),
    (PLACE, None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), (PLACE, None, {"type": tarfile.LNKTYPE, "linkname": PLACE}),
    (PLACE, None, {"type": tarfile.CHRTYPE}), (PLACE, None, {"type": tarfile.BLKTYPE}), (PLACE, None, {"type": tarfile.FIFOTYPE}),
    (PLACE, A, {"type": tarfile.GNUTYPE_SPARSE}), (PLACE, A, {"type": tarfile.CONTTYPE}), ("sub", None, {"type": tarfile.DIRTYPE}),
    ("..", None, {"type": tarfile.DIRTYPE}), ("seamless.db", b"not a database", {}), ("seamless.db", None, {"type": tarfile.DIRTYPE}),
    ("seamless.db", b"", {}), ("./seamless.db/x", A, {})])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_has_no_place_in_a_store_is_refused_and_nothing_is_written(tmp_path, name, data, fields, format):
    with pytest.raises(SeamlessError, match="the archive x.tar is refused: "):
        add(stores_at(tmp_path / "in" / "target"), tar_of((name, data, fields), format=format))
    assert files(tmp_path) == []


@pytest.mark.parametrize("way", ["new", "there", "dry"])
def test_a_large_buffer_with_another_content_is_refused(any_stores, way):
    name = Checksum.of(LARGE)
    if way == "there":
        any_stores.buffers.put(LARGE)
    data = tar_of(("%s/%s" % (name[:2], name), LARGE[:-1] + b"X", {}))
    with pytest.raises(SeamlessError, match="refused: the content of " + name):
        add(any_stores, data, dry_run=way == "dry")
    assert any_stores.buffers.has([name]) == [way == "there"]


def test_a_member_may_not_come_twice(tmp_path):
    for second in (PLACE, "./" + PLACE, NAME):
        with pytest.raises(SeamlessError, match="twice"):
            add(stores_at(tmp_path / "target"), tar_of((PLACE, A, {}), (second, A, {})))


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\xff" * 12, b"            ", b"00000000009\0"])
def test_a_size_that_is_a_lie_costs_nothing(tmp_path, size):
    data = bytearray(tar_of((PLACE, A, {})))
    data[124:136] = size
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(SeamlessError, match="ends in the middle|is damaged"):
        add(stores_at(tmp_path / "target"), bytes(data))
    assert files(tmp_path) == []


def test_other_files_are_refused_with_a_sentence(tmp_path):
    for data in (b"", b"hello", b"x" * 2000, b"\x1f\x8b" + os.urandom(2000), b"PK\3\4" + bytes(600)):
        with pytest.raises(SeamlessError, match="not a tar file|ends in the middle"):
            add(stores_at(tmp_path / "target"), data)


def with_table(made, change):
    """The archive, with statements done to its table."""
    found = members(made.export())
    path = pathlib.Path(made.stores.results.path).parent.parent / "table.db"
    path.write_bytes(found.pop("seamless.db"))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in change:
            db.execute(*statement)
    return tar_of(("seamless.db", path.read_bytes(), {}), *((name, data, {}) for name, data in found.items()))


OTHER = Checksum.of(b"?")
BOMB = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS checksum, x AS result FROM n"


@pytest.mark.parametrize("change", [
    [('UPDATE "transformation" SET "result" = ?', (OTHER,))], [('UPDATE "transformation" SET "result" = ?', ("x",))],
    [('UPDATE "transformation" SET "checksum" = ?', (OTHER,))], [('UPDATE "transformation" SET "checksum" = upper("checksum")',)],
    [('UPDATE "rev_transformation" SET "checksum" = ?', (OTHER,))], [('UPDATE "meta_data" SET "result" = ?', (OTHER,))],
    [('UPDATE "meta_data" SET "metadata" = ?', ("{",))], [('UPDATE "meta_data" SET "metadata" = ?', ('{"tf_checksum": "x"}',))],
    [('INSERT INTO "transformation" VALUES (?, ?)', (b"\xff", b"\xff"))], [('INSERT INTO "transformation" VALUES (CAST(? AS TEXT), 1)', (b"\xff",))],
    [('INSERT INTO "transformation" VALUES (?, ?)', (Checksum.of(b"code\n"), OTHER))],
    [('DROP TABLE "transformation"',)], [('DROP TABLE "transformation"',), ("CREATE VIEW transformation AS " + BOMB,)],
    [('CREATE TRIGGER t AFTER INSERT ON "transformation" BEGIN DELETE FROM "meta_data"; END',)], [('CREATE VIRTUAL TABLE v USING fts4(x)',)],
    [("PRAGMA writable_schema = ON",), ("UPDATE sqlite_master SET sql = CAST(sql AS BLOB) WHERE name = 'transformation'",)],
    [("PRAGMA writable_schema = ON",), ("CREATE VIRTUAL TABLE v USING fts4(x)",),
     ("UPDATE sqlite_master SET sql = replace(sql, 'CREATE VIRTUAL', 'CREATE  VIRTUAL') WHERE name = 'v'",)],
    [('ALTER TABLE "rev_transformation" ADD "x" AS (hex(zeroblob(1000)))',)], [('UPDATE "meta_data" SET "metadata" = CAST("metadata" AS BLOB)',)]])
def test_rows_that_are_not_consistent_are_not_recorded(made, tmp_path, change):
    target = stores_at(tmp_path / "target")
    with pytest.raises(SeamlessError, match="refused: its seamless.db"):
        add(target, with_table(made, change))
    assert target.results.get(made.transformation) is None and not (tmp_path / "target" / "seamless.db").exists()


def test_a_record_that_can_be_read_but_not_written_is_refused(made):
    for depth in range(780, 1000, 10):
        target = Stores(MemoryBuffers(), ResultTable(pathlib.Path(made.stores.results.path).parent / ("%d.db" % depth)))
        nested = [('UPDATE "meta_data" SET "metadata" = ?', ('{"a": %s%s}' % ("[" * depth, "]" * depth),))]
        with contextlib.suppress(SeamlessError):
            add(target, with_table(made, nested))
        target.close()


def test_a_sound_table_that_comes_first_is_fine(made, tmp_path):
    assert add(stores_at(tmp_path / "target"), with_table(made, [])).rows == 1


SMALL = tar_of((PLACE, A, {}))


def test_a_damaged_archive_never_does_harm(made, tmp_path):
    before = files(tmp_path)
    for seed in range(300):
        chance = random.Random(seed)
        target = Stores(MemoryBuffers(), MemoryResults())
        with contextlib.suppress(SeamlessError):
            add(target, damaged(chance.choice([with_small(made), SMALL]), chance))
        assert files(tmp_path) == before, seed
        assert {made.transformation: made.result}.items() >= target.results._results.items(), seed
        assert all(Checksum.of(content) == name for name, content in target.buffers._buffers.items()), seed


def damaged(data, chance):
    """``data`` with some pieces left out or replaced."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(min(len(data), chance.choice([len(data), 1100])))
        changed[start:start + chance.randint(0, 600)] = bytes(chance.randrange(256) for _ in range(chance.randint(0, 20)))
        if chance.random() < 0.5 and len(changed) > 512:         # let the header look sound
            changed[148:156] = b"        "
            changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


def with_small(made, cache={}):
    """An archive without the large leaf, made once."""
    if "data" not in cache:
        stores = Stores(MemoryBuffers(), MemoryResults())
        put = stores.buffers.put
        recipe = Recipe("bash", {"code": ("text", None, put(b"code\n"))}, ("result", "text", None))
        cache["rows"] = put(recipe.buffer), put(b"result\n")
        stores.results.put(*cache["rows"])
        file = io.BytesIO()
        archive.export([recipe.checksum], stores, file)
        cache["data"] = file.getvalue()
    made.transformation, made.result = cache["rows"]
    return cache["data"]


# --- the programs

def run(command, *words, **options):
    return subprocess.run([sys.executable, str(ROOT / "bin" / command), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, **options)


def test_from_one_store_to_another_through_a_pipe(made, tmp_path):
    (tmp_path / "x.CHECKSUM").write_text(made.result + "\n")
    out = run("seamless-export", "--destination", tmp_path / "source", tmp_path / "x.CHECKSUM", "-o", "-")
    assert out.returncode == 0 and out.stderr.startswith(b"seamless-export: 6 buffers (1.0") and out.stdout == made.export()
    back = run("seamless-import", "--destination", tmp_path / "target", "-", input=out.stdout)
    assert (back.returncode, back.stdout) == (0, b"") and b"added 6 buffers" in back.stderr and b"1 results" in back.stderr
    assert run("seamless-import", "-q", "--destination", tmp_path / "target", "-", input=out.stdout).stderr == b""


def test_a_pipe_is_written_and_a_link_followed_and_neither_is_replaced(made, tmp_path):
    words = ["--destination", str(tmp_path / "source"), made.transformation, "-q", "-o"]
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "read", "wb") as target, subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=target) as reader:
        try:
            assert cmd_archive.export([*words, str(tmp_path / "pipe")]) == 0 and (tmp_path / "pipe").is_fifo()
            assert reader.wait(30) == 0 and (tmp_path / "read").read_bytes() == made.export()
        finally:
            reader.kill()
    (tmp_path / "link").symlink_to("x.tar")
    assert cmd_archive.export([*words, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "x.tar").read_bytes() == made.export()


def test_a_file_of_a_result_brings_the_transformation_that_made_it(any_stores):
    made = Made(any_stores)
    assert set(members(made.export(made.result_leaf))) == expected(made.all)


@pytest.mark.parametrize("words", [["export", "{t}", "-o", "-"], ["import", "--dry-run", "x.tar"]])
def test_a_full_disk_and_a_reader_who_has_had_enough(made, tmp_path, words):
    (tmp_path / "x.tar").write_bytes(made.export())
    words = ["seamless-" + words[0], "--destination", "source", *(word.format(t=made.transformation) for word in words[1:])]
    command = [sys.executable, str(ROOT / "bin" / words[0]), *words[1:]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=str(tmp_path), timeout=60)
    assert done.returncode == 1 and b"No space left" in done.stderr and b"internal" not in done.stderr and b"cannot be read" not in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as broken:
        done = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, cwd=str(tmp_path), timeout=60)
    assert done.returncode == 0 and b"Broken" not in done.stderr and b"Exception" not in done.stderr


def test_a_file_appears_only_when_it_is_whole(made, tmp_path, capsys):
    target = tmp_path / "out" / "x.tar"
    target.parent.mkdir()
    words = ["--destination", str(tmp_path / "source"), made.transformation, "-o", str(target)]
    assert cmd_archive.export(words) == 0 and target.read_bytes() == made.export()
    target.write_bytes(b"old")
    os.chmod(tmp_path / "source" / made.result[:2] / made.result, 0o600)
    (tmp_path / "source" / made.result[:2] / made.result).write_bytes(b"damaged")
    assert cmd_archive.export(words) == 1
    assert files(target.parent) == ["x.tar"] and target.read_bytes() == b"old"
    assert "not there" in capsys.readouterr().err


def test_a_dry_run_lists(made, tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(made.export())
    assert cmd_archive.import_(["--dry-run", "--destination", str(tmp_path / "target"), str(tmp_path / "x.tar")]) == 0
    out, err = capsys.readouterr()
    assert "add  %s 5\n" % made.code in out and "add  result of %s" % made.transformation in out and "would add 6" in err
    assert files(tmp_path / "target") == []


@pytest.mark.parametrize("program, argv, code, text", [
    ("export", ["nothing", "-o", "x"], 2, "neither a checksum"), ("export", [NAME, "-o", "x"], 1, "unknown here"),
    ("export", [NAME, "-o", "x", "--destination", "/nowhere"], 1, "there is no buffer folder"),
    ("export", [NAME], 2, "required"), ("export", [NAME, "-o", "/nowhere/x"], 1, "cannot be written"),
    ("import", ["/nowhere.tar"], 1, "cannot be read"), ("import", ["."], 1, "cannot be read"), ("import", ["--database", "x", "y"], 2, "--destination"),
    ("export", [".", "-o", "x"], 1, "the file . cannot be read"), ("import", ["/dev/null"], 1, "ends in the middle"),
    ("import", ["--destination", "", "x"], 2, "--destination is empty")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, program, argv, code, text):
    monkeypatch.chdir(tmp_path)
    os.mkdir("store")
    if "--database" not in argv:
        argv = ["--destination", "store"] + argv
    assert {"export": cmd_archive.export, "import": cmd_archive.import_}[program](argv) == code
    out, err = capsys.readouterr()
    assert text in err and "Traceback" not in err and files(tmp_path) == []


def test_from_one_configuration_to_another(home, tmp_path):
    def at(name):
        return {"env": {**os.environ, "SEAMLESS_CACHE": str(tmp_path / name)}, "cwd": str(tmp_path)}
    command = ("seamless-run", "-c", "date +%s%N")
    first = run(*command, **at("one"))
    assert first.returncode == 0, first.stderr
    [(name,)] = ResultTable(tmp_path / "one" / "__TOPLEVEL__" / "seamless.db").query('SELECT "checksum" FROM "transformation"')
    assert run("seamless-export", name, "-o", "x.tar", **at("one")).returncode == 0
    assert run("seamless-import", "x.tar", **at("two")).returncode == 0
    assert run(*command, **at("two")).stdout == first.stdout, "it was run again"
    assert run("seamless-fsck", "-v", **at("two")).stdout.startswith(b"3 buffers (")
