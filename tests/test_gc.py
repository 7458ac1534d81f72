"""Deleting buffers: what goes, what stays, and that nobody who works in the store meanwhile loses anything."""
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from seamless_lite import cmd_archive, cmd_fsck, cmd_gc, compressed, durable, gc, httpbase, leases, references
from seamless_lite.celltypes import plain_dumps
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError
from seamless_lite.folder import ASIDE, COLLECTING, Folder
from seamless_lite.hashserver import HashserverClient, HashService
from seamless_lite.resulttable import ResultTable
from seamless_lite.session import Session
from seamless_lite.transformation import Recipe

ROOT = pathlib.Path(__file__).resolve().parent.parent
DAY_S = 86400.0


class Store:
    """A buffer folder with its ``seamless.db``."""

    def __init__(self, directory):
        self.directory = directory
        self.folder = Folder(directory)
        self.results = ResultTable(directory / "seamless.db")

    def put(self, data, days=100.0):
        """Store ``data``, last used so many days ago."""
        checksum = self.folder.put(data)
        self.age(checksum, days)
        return checksum

    def age(self, checksum, days):
        for path in self.folder.forms(checksum).values():
            os.utime(path, (time.time() - days * DAY_S,) * 2)

    def run(self, code, inputs, result, celltype="mixed", days=100.0, pin="bytes"):
        """The buffers and the row of a run; returns the transformation."""
        pins = {"code": ("python", None, self.put(code, days)), **{name: (pin, None, value) for name, value in inputs.items()}}
        recipe = Recipe("python", pins, ("result", celltype, None))
        self.put(recipe.buffer, days)
        if result is not None:
            self.results.put(recipe.checksum, result)
        return recipe.checksum

    def there(self):
        return {name for folder, _, names in os.walk(self.directory) for name in names if len(name) == 64 and ".pins" not in folder}

    def gc(self, *options):
        assert cmd_gc.main(["--destination", str(self.directory), *options]) == 0


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- what goes ---------------------------------------------------------------------------------------------

def test_the_least_recently_used_go_first_until_the_rest_fits(store):
    names = [store.put(bytes([n]) * 1000, days) for n, days in enumerate((5, 50, 20, 10, 40))]
    store.gc("--max-size", "3kB")
    assert store.there() == {names[0], names[2], names[3]}


def test_what_was_not_used_for_long_goes_and_the_rest_stays(store):
    old, new = store.put(b"old", 100), store.put(b"new", 80)
    store.gc("--older-than", "90d")
    assert store.there() == {new} and not store.folder.has([old])[0]


def test_what_was_used_lately_stays_whatever_the_limit(store, capsys):
    name = store.put(b"just used", 0.5)
    store.gc("--max-size", "0kB")
    assert store.there() == {name}
    assert "more than --max-size" in capsys.readouterr().out
    store.gc("--max-size", "0kB", "--grace", "1h")
    assert store.there() == set()


def test_without_a_limit_and_with_dry_run_nothing_is_deleted_or_changed(store, capsys):
    name = store.put(b"x" * 5000)

    def state():
        return {path: (path.stat().st_atime_ns, path.stat().st_ctime_ns) for path in store.directory.rglob("*") if path.is_file()}
    before = state()
    store.gc()
    assert "1 buffer (5 kB): may be deleted" in capsys.readouterr().out
    store.gc("--older-than", "90d", "-n")
    out = capsys.readouterr().out
    assert name in out and "older than 90d" in out and "1 buffer (5 kB) would be deleted" in out
    assert state() == before


@pytest.mark.parametrize("use", ["get", "path", "open", "length", "has", "put"])
def test_whoever_asks_for_a_buffer_makes_it_young(store, use):
    name = store.put(b"used")
    if use == "has":
        assert store.folder.has([name]) == [True]
    elif use == "put":
        store.folder.put(b"used")
    else:
        file = getattr(store.folder, use)(name)
        assert file is not None
        if use == "open":
            file.close()
    store.gc("--older-than", "1d")
    assert store.there() == {name}


def test_the_last_use_is_noted_only_now_and_then(store):
    name = store.put(b"used", 0.5 * durable.NOTED_S / DAY_S)
    before = os.stat(store.folder.path(name)).st_atime_ns
    assert store.folder.get(name) == b"used" and store.folder.has([name]) == [True]
    assert os.stat(store.folder.path(name)).st_atime_ns == before


def test_compressed_forms_and_their_lengths_go_too_and_other_files_stay(store):
    data = b"compressed" * 100
    checksum = Checksum.of(data)
    store.folder.put_stream(checksum, [gzip.compress(data)], ".gz")
    store.age(checksum, 100)
    store.put(b"plain")
    (store.directory / "notes.txt").write_text("mine")
    store.gc("--older-than", "90d")
    left = {path.name for path in store.directory.rglob("*") if path.is_file()}
    assert left == {"notes.txt", ".HASHSERVER_PREFIX"}


def test_the_row_of_a_deleted_result_stays(store):
    result = store.put(b'"result"')
    transformation = store.run(b"code", {}, result)
    store.gc("--max-size", "0kB")
    assert store.there() == set() and store.results.get(transformation) == result


# --- what stays --------------------------------------------------------------------------------------------

@pytest.fixture
def figure(store):
    """(transformation, its deep result, all that belongs to it) among other things, all old."""
    leaves = [store.put(b"leaf %d" % n) for n in range(3)]
    index = store.put(plain_dumps({"a": leaves[0], "b": leaves[1]}))
    result = store.put(plain_dumps({"out/x": leaves[2]}))
    transformation = store.run(b"code", {"data": index}, result, "folder", pin="deepcell")
    other = store.put(b"other")
    store.run(b"other code", {"x": other}, store.put(b"other result"))
    return transformation, result, {*leaves, index, result, transformation, Checksum.of(b"code")}


@pytest.mark.parametrize("what", ["transformation", "result", "a file of the result", "FILE.CHECKSUM"])
def test_a_pin_keeps_code_inputs_and_result_with_all_leaves_until_it_is_removed(store, figure, what, tmp_path, capsys):
    transformation, result, closure = figure
    given = {"transformation": transformation, "result": result}.get(what, Checksum.of(b"leaf 2"))
    if what == "FILE.CHECKSUM":
        (tmp_path / "x.CHECKSUM").write_text(given + "\n")
        given = str(tmp_path / "x.CHECKSUM")
    store.gc("--pin", given)
    for name in closure:
        store.age(name, 100)
    store.gc("--max-size", "0kB")
    assert store.there() == closure
    capsys.readouterr()
    store.gc("--pins")
    assert given in capsys.readouterr().out
    store.gc("--unpin", given)
    store.gc("--max-size", "0kB")
    assert store.there() == set()


def test_a_pin_of_what_is_not_there_is_refused(store, capsys):
    store.put(b"x")
    assert cmd_gc.main(["--destination", str(store.directory), "--pin", "0" * 64]) == 1
    assert "neither a buffer nor a result" in capsys.readouterr().err
    assert cmd_gc.main(["--destination", str(store.directory), "--unpin", "0" * 64]) == 1


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("is_deep", [True, False])
def test_what_makes_a_missing_input_again_is_kept_and_what_makes_that(store, pinned, is_deep):
    leaf = Checksum.of(b"scratch leaf")
    scratch = store.put(plain_dumps({"a": leaf})) if is_deep else Checksum.of(b"scratch")
    before = Checksum.of(b"scratch before")
    source = store.put(b"source")
    first = store.run(b"first", {"x": source}, before)
    second = store.run(b"second", {"x": before}, scratch, "deepcell")
    result = store.put(b"result")
    third = store.run(b"third", {"x": scratch}, result, pin="deepcell")
    store.put(b"other")
    kept = {source, first, second, third, *map(Checksum.of, (b"first", b"second", b"third"))} | {scratch} & store.there()
    if pinned:
        store.gc("--pin", result)
        kept.add(result)
    for name in store.there():
        store.age(name, 0 if name == third and not pinned else 100)
    store.gc("--max-size", "0kB")
    assert store.there() == kept


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_all_that_an_index_too_large_to_be_read_at_once_may_refer_to_is_kept(store, monkeypatch, suffix):
    leaves = store.folder.put_many(b"leaf %d" % n for n in range(300))
    data = plain_dumps({"file %d" % n: name for n, name in enumerate(leaves)})
    index = Checksum.of(data)
    store.folder.put_stream(index, [gzip.compress(data) if suffix else data], suffix)
    store.put(b"other")
    for module in (gc, references):
        monkeypatch.setattr(module, "LARGEST", 1000, raising=False)
    monkeypatch.setattr(compressed, "CHUNK", 1000)
    store.gc("--pin", index)
    for name in (index, *leaves):
        store.age(name, 100)
    store.gc("--max-size", "0kB")
    assert store.there() == {*leaves, index} - ({index} if suffix else set())


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_seamless_db_that_says_nothing_of_what_must_stay_is_refused(store, tmp_path, capsys, is_empty):
    name, file = store.put(b"x"), tmp_path / "shared.db"
    if is_empty:
        file.write_bytes(b"")
    else:                                       # an older Seamless made it
        ResultTable(file).put("1" * 64, name)
        ResultTable(file).write(lambda db: db.execute("DROP TABLE irreproducible_transformation"))
    options = ["--destination", str(store.directory), "--max-size", "0kB", "--share-with", str(file)]
    assert cmd_gc.main(options) == is_empty and store.there() == {name}
    assert ("%s has no table of transformations" % file in capsys.readouterr().err) == is_empty


@pytest.mark.parametrize("mark", [".HASHSERVER_PREFIX", "seamless.db"])
def test_neither_of_two_stores_deletes_what_lies_in_the_folder_that_they_share(store, mark):
    first = store.put(b"pinned")                # the subproject "ab" of Seamless 1.x, and the buffers ab...
    part = store.directory / first[:2]
    (part / mark).write_bytes(b"")
    inner, other = Store(part), store.put(b"other")
    inner.put(b"its own")
    inner.gc("--max-size", "0kB")
    assert store.there() == {first, other}
    mine = inner.put(b"its own")
    store.gc("--max-size", "0kB")
    assert store.there() == {first, mine}


def test_what_another_seamless_db_refers_to_is_kept(store, figure, tmp_path):
    transformation, result, closure = figure
    ResultTable(tmp_path / "shared.db").put(transformation, result)
    store.gc("--max-size", "0kB", "--share-with", str(tmp_path / "shared.db"))
    assert store.there() == closure
    assert cmd_gc.main(["--destination", str(store.directory), "--max-size", "0kB", "--share-with", "no.db"]) == 1


def test_a_transformation_that_was_submitted_lately_keeps_its_inputs(store, figure):
    transformation, result, closure = figure
    store.age(transformation, 0)                # as a lease does
    leaf = Checksum.of(b"leaf 2")
    store.gc("--max-size", "0kB")
    assert store.there() == closure - {result, leaf}


def test_transformations_that_arrive_while_buffers_are_deleted_keep_their_inputs(store):
    data = store.put(b"input")
    others = [store.put(b"%d" % n) for n in range(10)]
    survey = gc.Survey(str(store.directory), store.results)
    victims = survey.choose(0, None)
    recipe = Recipe("python", {"code": ("python", None, others[0]), "x": ("bytes", None, data)})
    store.put(recipe.buffer, 0)
    done = gc.Collected()
    with gc.collecting(str(store.directory)):
        gc.collect(survey, victims, done)
    assert store.there() == {recipe.checksum, data, others[0]} and done.count == 9 and done.spared == 2


def test_what_the_hashserver_of_seamless_was_sent_again_is_not_deleted(store):
    name = store.put(b"x")
    survey = gc.Survey(str(store.directory))
    time.sleep(0.02)
    os.chmod(store.folder.forms(name)[""], 0o444)      # all that it does
    done = gc.Collected()
    with gc.collecting(str(store.directory)):
        gc.collect(survey, survey.choose(0, None), done)
    assert store.there() == {name} and done.spared == 1


def test_inputs_that_are_only_named_are_young_when_a_job_is_submitted(store, figure):
    index = Checksum.of(plain_dumps({"a": Checksum.of(b"leaf 0"), "b": Checksum.of(b"leaf 1")}))
    session = Session()
    session._stores = type("Stores", (), {"buffers": store.folder, "results": store.results, "close": lambda self: None})()
    session.supply.push([(Recipe("python", {"x": ("deepcell", None, index)}), {}, {})])
    session.close()
    store.gc("--max-size", "0kB")
    assert {index, Checksum.of(b"leaf 0"), Checksum.of(b"leaf 1")} == store.there()


def test_a_lease_uses_what_is_needed_again_and_again_and_ends_with_its_owner(monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.01)

    class Owner:
        times = 0

        def __init__(self):
            self.lease = leases.Lease(self.renew)
            self.lease.begin()
            self.lease.begin()

        def renew(self):
            Owner.times += 1
            raise OSError("no space left on device") if Owner.times % 2 else SeamlessError("the store is away")
    owner = Owner()
    thread = owner.lease._thread
    deadline = time.monotonic() + 10
    while Owner.times < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Owner.times >= 3
    del owner
    thread.join(10)
    assert not thread.is_alive()


# --- with others in the store ------------------------------------------------------------------------------

def start(code, *arguments, **environment):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT), **environment))


def end(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err.decode()[-3000:]
    return out.decode()


#: It is slow to rename, so that others come in between.
COLLECT = """\
import os, sys, time
from seamless_lite import gc
from seamless_lite.errors import SeamlessError
from seamless_lite.resulttable import ResultTable
directory, seconds, grace = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
rename = os.rename
os.rename = lambda old, new: (time.sleep(0.003), rename(old, new), time.sleep(0.003))
done, end = gc.Collected(), time.time() + seconds
while time.time() < end:
    try:
        with gc.collecting(directory):
            survey = gc.Survey(directory, ResultTable(directory + "/seamless.db", writable=False), grace)
            gc.take_back(survey)
            gc.collect(survey, survey.choose(0, None), done)
    except SeamlessError as exc:
        if "another seamless-gc" not in str(exc):
            raise
print(done.count)
"""

#: What a writer was told to be there must be there, for the time of the grace: 0.6 s, less what the machine is slow.
WRITE = """\
import os, random, sys, time
from seamless_lite import durable
durable.NOTED_S = 0.1
from seamless_lite.checksum import Checksum
from seamless_lite.folder import Folder
folder, end = Folder(sys.argv[1]), time.time() + float(sys.argv[2])
datas = [b"buffer %d" % n for n in range(40)]
names = [Checksum.of(data) for data in datas]
told = stored = 0
while time.time() < end:
    n = random.randrange(len(datas))
    asked = time.time()
    if folder.has([names[n]])[0]:
        told += 1
    else:
        folder.put(datas[n])
        stored += 1
    time.sleep(random.random() * 0.2)
    use = random.choice(("get", "length", "path", "has"))
    found = (folder.has([names[n]])[0] or None) if use == "has" else getattr(folder, use)(names[n])
    if time.time() - asked < 0.4:
        assert found is not None, "%s: %s was lost %.3f s after it was said to be there" % (use, names[n], time.time() - asked)
print(told, stored)
"""


@pytest.mark.slow
def test_nobody_loses_what_he_was_told_to_be_there_while_two_delete_all_they_can(store):
    store.put(b"something")
    store.results.put("1" * 64, "2" * 64)
    writers = [start(WRITE, store.directory, 2.5) for _ in range(4)]
    collectors = [start(COLLECT, store.directory, 2.5, 0.6) for _ in range(2)]
    told, stored = map(sum, zip(*(map(int, end(writer).split()) for writer in writers)))
    deleted = sum(int(end(collector)) for collector in collectors)
    assert told > 5 and stored > 5 and deleted > 5, (told, stored, deleted)
    left = {path.name for path in store.directory.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith(ASIDE) or name in (".LOCK", COLLECTING)]


JOBS = """\
import sys, time, random
from seamless_lite import delayed, config
config.init()

@delayed
def square(n):
    import time
    time.sleep(0.02)
    return n * n

@delayed
def total(parts, n):
    return sum(parts) + n

@delayed
def text(n):
    return {"a": "text %d" % n, "b": n}

text.celltypes.result = "deepcell"

@delayed
def length(index):
    import time
    time.sleep(0.02)
    return len(index)

length.celltypes.index = "deepcell"
end, runs = time.time() + float(sys.argv[1]), 0
while time.time() < end:
    n = random.randrange(30)
    first = square(n)
    assert total([n, 1], first).run() == n + 1 + n * n
    batch = [text(random.randrange(30)) for _ in range(10)]
    for transformation in batch:
        transformation.start()
    for transformation in batch:
        assert sorted(transformation.value) == ["a", "b"]
    assert length(batch[0]).run() == 2
    runs += 1
print(runs)
"""
SITE = """\
from seamless_lite import durable, leases
durable.NOTED_S, leases.RENEW_S = 0.1, 0.2
"""


#: 30 jobs for at most two processes, each with an input too large to travel along: the last ones wait much longer than the grace.
QUEUE = """\
import random
from seamless_lite import delayed, config
config.init()

@delayed
def slow(text):
    import time
    time.sleep(0.4)
    return text[:10]

batch = [slow("%d" % n * 100000) for n in range(30)]
for transformation in batch:
    transformation.start()
print(len([transformation.value for transformation in batch]))
"""


def run_while_collecting(home, tmp_path, execution, code, processes):
    """Run the program that often while all that is older than 1.5 s is deleted; returns what it printed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    (tmp_path / "seamless.yaml").write_text("- execution: %s\n" % execution)
    environment = {"PYTHONPATH": "%s:%s" % (site, ROOT), "TMPDIR": str(tmp_path)}
    workers = [subprocess.Popen([sys.executable, "-c", code, "6"], cwd=tmp_path, env={**os.environ, **environment},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(processes)]
    folder = home / ".seamless" / "cache" / "__TOPLEVEL__"
    deadline = time.monotonic() + 30
    while not (folder / "seamless.db").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    collector = start(COLLECT, folder, 6, 1.5)
    printed = [int(end(worker)) for worker in workers]
    assert int(end(collector)) > 5
    return printed


@pytest.mark.parametrize("execution", ["process", "spawn"])
@pytest.mark.slow
def test_no_job_fails_and_every_result_can_be_read_while_all_that_is_old_is_deleted(home, tmp_path, execution):
    assert min(run_while_collecting(home, tmp_path, execution, JOBS, 2)) > 3


@pytest.mark.parametrize("execution", ["process", "spawn"])
@pytest.mark.slow
def test_jobs_that_are_queued_for_long_do_not_lose_their_inputs(home, tmp_path, execution):
    assert run_while_collecting(home, tmp_path, execution, QUEUE, 1) == [30]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use", ["get", "has", "length", "path", "put"])
@pytest.mark.slow
def test_a_use_at_the_very_moment_of_the_deletion_is_not_overlooked(store, monkeypatch, when, use):
    name, rename, found = store.put(b"data"), os.rename, []

    def somebody():
        found.append(store.folder.put(b"data") if use == "put" else store.folder.has([name])[0] or None if use == "has"
                     else getattr(store.folder, use)(name))

    def interrupted(old, new):
        monkeypatch.setattr(os, "rename", rename)
        if when == "before":
            somebody()
        rename(old, new)
        if when == "after":
            somebody()
    monkeypatch.setattr(os, "rename", interrupted)
    store.gc("--older-than", "90d")
    assert len(found) == 1 and found[0] is not None
    assert store.there() == {name} and store.folder.get(name) == b"data"


def test_what_was_read_by_others_since_it_was_listed_stays(store):
    name = store.put(b"x")
    survey = gc.Survey(str(store.directory))
    path = store.folder.forms(name)[""]
    before = os.stat(path).st_atime_ns
    pathlib.Path(path).read_bytes()
    if os.stat(path).st_atime_ns == before:
        pytest.skip("this file system does not note that a file is read")
    with gc.collecting(str(store.directory)):
        gc.collect(survey, survey.choose(0, None), gc.Collected())
    assert store.there() == {name}


def test_a_reader_that_reads_goes_on_reading(store):
    data = os.urandom(1 << 20)
    name = store.put(data)
    with store.folder.open(name) as file:
        begin = file.read(1000)
        store.age(name, 100)
        store.gc("--max-size", "0kB")
        assert store.there() == set() and begin + file.read() == data


def test_after_a_kill_in_the_middle_all_that_is_there_is_whole_and_the_next_run_completes_it(store):
    names = store.folder.put_many(b"%d" % n * 1000 for n in range(500))
    for name in names:
        store.age(name, 100)
    code = COLLECT.replace("rename = os.rename", "unlink = os.unlink\nos.unlink = lambda path: (print(flush=True), unlink(path))\nrename = os.rename")
    process = start(code, store.directory, 60, 3600)
    process.stdout.readline()                   # it deletes
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    left = store.there()
    files = {path.name for path in store.directory.rglob("*") if path.is_file()}
    assert left and len(left) < len(names)
    aside = {name[:-len(ASIDE)] for name in files if name.endswith(ASIDE)}
    for name in aside:
        assert store.folder.has([name]) == [True]               # taken back by who needs it
    for name in sorted(left)[:50] + sorted(aside):
        assert store.folder.get(name) is not None
    missing = next(iter(set(names) - left - aside))
    assert store.folder.has([missing]) == [False]
    for name in left | aside:
        store.age(name, 100)
    store.gc("--max-size", "0kB")
    assert {path.name for path in store.directory.rglob("*") if path.is_file()} == {".HASHSERVER_PREFIX", "seamless.db"} & files


def test_what_a_killed_run_left_aside_is_taken_back_by_the_next(store):
    name = store.put(b"x", 10)
    path = store.folder.forms(name)[""]
    os.rename(path, path + ASIDE)
    store.gc("--older-than", "90d")
    assert store.folder.get(name) == b"x"


def test_what_was_left_aside_does_not_replace_what_was_stored_again(store):
    name = store.put(b"x")
    path = store.folder.forms(name)[""]
    os.rename(path, path + ASIDE)
    store.folder.put(b"x")
    store.gc("--older-than", "90d")
    assert store.there() == {name} and not os.path.exists(path + ASIDE)


def test_when_it_is_interrupted_all_files_have_their_names(store, monkeypatch):
    names = set(store.folder.put_many(b"%d" % n for n in range(30)))
    for name in names:
        store.age(name, 100)
    unlink = os.unlink

    def interrupted(path):
        if str(path).endswith(ASIDE):
            monkeypatch.setattr(os, "unlink", unlink)
            raise KeyboardInterrupt
        unlink(path)
    monkeypatch.setattr(os, "unlink", interrupted)
    assert cmd_gc.main(["--destination", str(store.directory), "--older-than", "90d"]) == 130
    left = {path.name for path in store.directory.rglob("*") if path.is_file()}
    assert store.there() == names and not [name for name in left if name.endswith(ASIDE) or name in (".LOCK", COLLECTING)]


def test_only_one_deletes_at_a_time(store, capsys):
    store.put(b"x")
    with gc.collecting(str(store.directory)):
        assert cmd_gc.main(["--destination", str(store.directory), "--older-than", "90d"]) == 1
        assert "another seamless-gc" in capsys.readouterr().err
        store.gc("--older-than", "90d", "-n")
    store.gc("--older-than", "90d")
    assert store.there() == set()


def test_a_folder_that_somebody_else_has_locked_is_left_alone(store):
    name = store.put(b"x")
    lock = store.directory / name[:2] / ".LOCK"
    lock.write_text("")
    store.gc("--older-than", "90d")
    assert store.there() == {name} and lock.exists()


def test_a_use_through_a_hashserver_is_noted_as_well(store):
    names = [store.put(b"%d" % n) for n in range(4)]
    with_service = httpbase.start(HashService(store.folder), httpbase.Listen(host="127.0.0.1"))
    try:
        client = HashserverClient(with_service.address)
        assert client.has(names[:1]) == [True] and client.get(names[1]) == b"1"
        client.put_many([b"2"])
    finally:
        with_service.stop()
    store.gc("--older-than", "90d")
    assert store.there() == set(names[:3])


# --- the command -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    (["--older-than", "3"], "takes a number and min, h, d, w or y"), (["--max-size", "big"], "takes a number and a unit"),
    (["--max-size", "1GB", "--grace", "5min"], "at least"), (["--database", "x"], "needs --destination"),
    (["--max-size", "50"], "takes a number and a unit"), (["--max-size=-1GB"], "takes a number"), (["--max-size", "nan"], "takes a number"), (["--pin", "nothing"], "neither a checksum")])
def test_wrong_usage_is_one_sentence(store, options, sentence, capsys):
    store.put(b"x")
    options = options if "--database" in options else ["--destination", str(store.directory), *options]
    assert cmd_gc.main(options) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_all_look_for_seamless_db_in_the_folder_itself_and_nowhere_else(store, tmp_path, capsys):
    made = store.run(b"code", {}, store.put(b"result"))
    os.rename(store.results.path, tmp_path / "seamless.db")
    for database in ((), ("--database", str(tmp_path / "seamless.db"))):
        words = ["--destination", str(store.directory), *database]
        assert cmd_gc.main([*words, "--pin", made, "--max-size", "0kB"]) == (0 if database else 1)
        assert ("give it with --database" in capsys.readouterr().err) != bool(database)
        assert cmd_fsck.main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(database) / 2
        assert cmd_archive.export([*words, made, "-o", str(tmp_path / "x.tar")]) == 0
        assert "%d results" % (len(database) / 2) in capsys.readouterr().err
    missing = ["--destination", str(store.directory), "--database", str(tmp_path / "no.db")]
    for main, more in ((cmd_gc.main, []), (cmd_fsck.main, []), (cmd_archive.export, [made, "-o", "-"])):
        assert main([*missing, *more]) == 1 and "there is no file" in capsys.readouterr().err


def test_what_is_printed_may_go_nowhere(store, monkeypatch):
    store.put(b"old")
    monkeypatch.setattr(sys, "stdout", None)        # ">&-"
    store.gc()


def test_the_store_of_the_configuration_is_meant_without_a_destination(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEAMLESS_CACHE", str(tmp_path / "cache"))
    assert cmd_gc.main([]) == 1 and "there is no buffer folder" in capsys.readouterr().err
    store = Store(tmp_path / "cache" / "__TOPLEVEL__")
    store.put(b"x")
    assert cmd_gc.main(["--older-than", "90d"]) == 0 and store.there() == set()


def test_a_store_on_another_host_is_a_sentence_that_says_what_to_run_there(home, tmp_path, monkeypatch, capsys):
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(textwrap.dedent("""\
        far:
          frontends:
            - hostname: elsewhere.example
              hashserver: {bufferdir: /data/buffers}
              database: {database_dir: /data/results}
        """))
    (tmp_path / "seamless.yaml").write_text("- project: p\n- cluster: far\n")
    monkeypatch.chdir(tmp_path)
    assert cmd_gc.main(["--max-size", "1GB"]) == 1
    assert "ssh elsewhere.example seamless-gc --destination /data/buffers/p --database /data/results/p/seamless.db" in capsys.readouterr().err
