"""One store for both: at the same time, through sidecars and job folders, with compressed buffers; and its records."""
import gzip
import hashlib
import json
import pathlib
import shutil
import sqlite3
import sys
import time
import urllib.error
import urllib.request

import pytest

from seamless_lite.checksum import Checksum
from seamless_lite.folder import Folder
from seamless_lite.record import minimal_record
from seamless_lite.resulttable import ResultTable

pytestmark = pytest.mark.interop
FUNCTIONS = pathlib.Path(__file__).parent / "functions"
PACKAGES = {"theirs": "seamless", "ours": "seamless_lite"}
BOTH = pytest.mark.parametrize("first, second", [("theirs", "ours"), ("ours", "theirs")], ids=["from theirs", "from ours"])


@pytest.fixture
def served(shared_lab, tmp_path):
    """A lab whose store has servers of the real package; ``ports`` says where.  Each test has a working folder of its own."""
    lab = shared_lab
    lab.work = tmp_path
    if not hasattr(lab, "ports"):
        (lab.work / "warm.txt").write_text("warm\n")
        assert lab.program("theirs", "seamless-run", "cat", "warm.txt").out == "warm\n"
        records = (lab.homes["theirs"] / ".remote-http-launcher" / "server").glob("*.json")
        lab.ports = {path.name.partition("-")[0]: json.loads(path.read_text())["port"] for path in records}
    lab.ran()
    return lab


def ask(port, method, path, body=None, **headers):
    """(status, body) of one request to a server of the real package."""
    request = urllib.request.Request("http://127.0.0.1:%d%s" % (port, path), data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


def database(port, method, **message):
    return ask(port, method, "/", json.dumps(message).encode(), **{"Content-Type": "application/json"})


# --- at the same time -----------------------------------------------------------------------------------------

def test_processes_of_both_write_at_the_same_time_and_nothing_is_lost(lab):
    shutil.copy(FUNCTIONS / "crowd.py", lab.work)
    python = {"theirs": lab.real.python, "ours": sys.executable}
    crowd = [("theirs", 0, 60), ("ours", 30, 90), ("theirs", 60, 120), ("ours", 90, 150), ("ours", 0, 150)]
    processes = [(who, lab.start(who, [python[who], lab.work / "crowd.py", PACKAGES[who], first, last])) for who, first, last in crowd]
    results = {}
    for who, process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, (who, err.decode())
        for n, pair in json.loads(out.splitlines()[-1]).items():
            assert results.setdefault(n, pair) == pair
    assert len(results) == 150
    lab.ran()
    for who in PACKAGES:
        assert lab.script(who, lab.work / "crowd.py", PACKAGES[who], 0, 150) == results
    assert lab.ran() == 0
    with sqlite3.connect("file:%s?mode=ro" % lab.table, uri=True) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for table in "transformation", "rev_transformation", "meta_data":
            assert {tuple(row) for row in db.execute('SELECT "checksum", "result" FROM "%s"' % table)} == \
                {tuple(pair) for pair in results.values()}
    store = Folder(lab.store)
    assert all(store.has([checksum for pair in results.values() for checksum in pair]))
    assert not [path for path in lab.store.rglob("*") if path.is_file() and len(path.name) > 64]      # left-over temp files


# --- sidecars ------------------------------------------------------------------------------------------------

@BOTH
def test_a_sidecar_of_one_is_an_input_of_the_other(served, first, second):
    lab = served
    (lab.work / "a.txt").write_text("x\n%s\n" % first)
    for argv in (["-nd", "-c", "sort a.txt > s.txt"], ["-nd", "-i", "a.txt", "-cp", "res", "-c", "mkdir res; cp a.txt res/x.txt"]):
        done = lab.program(first, "seamless-run", *argv)
        assert done.code == 0, done
    assert not (lab.work / "s.txt").exists() and not (lab.work / "res").exists()
    assert lab.program(second, "seamless-run", "cat", "s.txt").out == "%s\nx\n" % first
    done = lab.program(second, "seamless-run", "-c", "ls res; grep -c x res/*")
    assert done.out == "x.txt\n1\n", done


@BOTH
def test_either_waits_for_the_future_of_the_other(served, first, second):
    lab = served
    (lab.work / "a.txt").write_text("x\n%s\n" % first)
    program = lab.real.bin / "seamless-run" if first == "theirs" else pathlib.Path(__file__).parents[2] / "bin" / "seamless-run"
    python = lab.real.python if first == "theirs" else sys.executable
    slow = lab.start(first, [python, program, "-i", "a.txt", "-c", "sleep 4; sort a.txt > f.txt"])
    future, deadline = lab.work / "f.txt.FUTURE", time.monotonic() + 30
    while not future.exists():
        assert time.monotonic() < deadline and slow.poll() is None, slow.communicate()
        time.sleep(0.05)
    done = lab.program(second, "seamless-run", "cat", "f.txt")
    assert done.out == "%s\nx\n" % first, done
    assert slow.wait(30) == 0
    slow.communicate()


# --- job folders ---------------------------------------------------------------------------------------------

JOBS = {
    "plain": ["cat", "a.txt"],
    "metavar": ["--metavar", "N=4", "--var", "X=é", "-c", "sort -S $N a.txt; echo $X"],
    "conda": ["--conda", "base", "-c", "sort a.txt > s.txt"],
    "folder": ["-i", "d", "-cp", "out", "-c", "cp -r d out"],
}


def test_job_folders_are_the_same(served):
    lab = served
    (lab.work / "a.txt").write_text("b\na\n")
    (lab.work / "d").mkdir()
    (lab.work / "d" / "x.txt").write_text("x\n")
    shown = {}
    for who in PACKAGES:
        done = lab.many(who, [("seamless-run", ["--dry", *upload, "-j", "%s-%s%s" % (who, name, len(upload)), *argv], lab.work)
                              for name, argv in JOBS.items() for upload in ((), ("--upload",))])
        assert [one.code for one in done] == [0] * len(done), done
        shown[who] = [one.out for one in done]
    assert shown["theirs"] == shown["ours"]
    for name in JOBS:
        for kind in "01":
            theirs, ours = ({path.name: path.read_bytes() for path in (lab.work / ("%s-%s%s" % (who, name, kind))).iterdir()}
                            for who in ("theirs", "ours"))
            # Theirs loses the values of --metavar, so that it cannot run such a job folder.
            assert list(json.loads(ours.pop("dunder.json", "{}"))) == (["META__N"] if name == "metavar" else [])
            assert ours == theirs, (name, kind)


@BOTH
def test_the_other_runs_an_uploaded_job(served, first, second):
    lab = served
    (lab.work / "a.txt").write_text("b\n%s\n" % first)
    argv = ["--var", "X=é", "-c", "sort a.txt; echo $X"]
    assert lab.program(first, "seamless-run", "--dry", "--upload", "-j", "job", *argv).code == 0
    assert lab.ran() == 0
    done = lab.program(second, "seamless-run-transformation", lab.work / "job" / "transformation.json.CHECKSUM")
    assert done.code == 0 and lab.ran() > 0, done
    shown = lab.program(first, "seamless-run", *argv)
    assert shown.code == 0 and shown.out == "b\n%s\né\n" % first and lab.ran() == 0, shown
    assert hashlib.sha256(shown.out.encode()).hexdigest() == done.out.strip()


# --- compressed buffers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, encoding", [(".gz", "gzip"), (".zst", "zstd")])
def test_what_their_hashserver_keeps_compressed_is_read_here(served, suffix, encoding):
    data = b"compressed there%5s\n" % suffix.encode() * 100
    name = hashlib.sha256(data).hexdigest()
    assert ask(served.ports["hashserver"], "PUT", "/" + name, _packed(data, suffix), **{"Content-Encoding": encoding})[0] == 200
    assert (served.store / name[:2] / (name + suffix)).exists() and not (served.store / name[:2] / name).exists()
    (served.work / "c.txt.CHECKSUM").write_text(name + "\n")
    done = served.program("ours", "seamless-run", "cat", "c.txt")
    assert done.out.encode() == data, done
    assert served.program("ours", "seamless-run", "wc", "-c", "c.txt").out.split() == ["2200", "c.txt"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_we_keep_compressed_is_read_there(served, suffix):
    data = b"compressed here %s\n" % suffix.encode() * 100
    name = Checksum.of(data)
    Folder(served.store).put_stream(name, [_packed(data, suffix)], suffix)
    assert (served.store / name[:2] / (name + suffix)).exists() and not (served.store / name[:2] / name).exists()
    status, body = ask(served.ports["hashserver"], "GET", "/" + name)
    assert status == 200 and (body == data or _packed(data, suffix) == body)
    if suffix == ".gz":                     # its client does not read .zst: see the table in the README
        (served.work / "c.txt.CHECKSUM").write_text(name + "\n")
        done = served.program("theirs", "seamless-run", "cat", "c.txt")
        assert done.out.encode() == data, done


def _packed(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data, mtime=0)
    import subprocess
    if shutil.which("zstd") is None:
        pytest.skip("there is no program zstd")
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


# --- records -------------------------------------------------------------------------------------------------

def test_their_database_takes_our_rows_and_records(served):
    port, results = served.ports["database"], ResultTable(served.table)
    tf, result, other = ("%064x" % n for n in (1, 2, 3))
    record = minimal_record(tf, result, {"wall_time_seconds": 0.5})
    results.put(tf, result, record)
    assert database(port, "GET", type="transformation", checksum=tf) == (200, result.encode())
    assert json.loads(database(port, "GET", type="rev_transformations", checksum=result)[1]) == [tf]
    assert json.loads(database(port, "GET", type="metadata", checksum=tf)[1]) == record
    assert database(port, "PUT", type="metadata", checksum=tf, result=result, value=record)[0] == 200     # the same again
    theirs = minimal_record(other, result, {})
    assert database(port, "PUT", type="transformation", checksum=other, value=result)[0] == 200
    assert database(port, "PUT", type="metadata", checksum=other, result=result, value=theirs)[0] == 200
    assert results.get(other) == result and sorted(results.reverse(result)) == [tf, other]
    with sqlite3.connect(served.table) as db:
        kept = dict(db.execute('SELECT "checksum", "metadata" FROM "meta_data"'))
    assert json.loads(kept[other]) == theirs and list(json.loads(kept[other])) == list(record)
    assert kept[tf].replace(tf, other).replace("0.5", "0.0") == kept[other]


def test_records_of_real_runs_have_the_same_keys_and_types(served):
    (served.work / "b.txt").write_text("b\n")
    assert served.program("ours", "seamless-run", "wc", "b.txt").code == 0
    with sqlite3.connect("file:%s?mode=ro" % served.table, uri=True) as db:
        rows = [json.loads(row[0]) for row in db.execute('SELECT "metadata" FROM "meta_data" ORDER BY rowid')]
    theirs, ours = rows[0], rows[-1]
    assert list(ours) == list(theirs)
    number = {int: "number", float: "number"}
    for key in theirs:
        if key != "gpu_memory_peak_bytes":
            assert number.get(type(ours[key]), type(ours[key])) == number.get(type(theirs[key]), type(theirs[key])), key


def test_an_irreproducible_transformation_of_theirs_is_no_hit_and_stays_recorded(served):
    port, results = served.ports["database"], ResultTable(served.table)
    tf, result = "%064x" % 11, "%064x" % 12
    results.put(tf, result, minimal_record(tf, result, {}))
    assert database(port, "PUT", type="irreproducible", checksum=tf, result=result)[0] == 200
    assert results.get(tf) is None and results.reverse(result) == []
    results.put(tf, "%064x" % 13, minimal_record(tf, "%064x" % 13, {}))
    status, rows = database(port, "GET", type="irreproducible", checksum=tf)
    assert status == 200 and [row["result"] for row in json.loads(rows)] == [result, "%064x" % 13]
    assert results.get(tf) is None
