"""Their client on our servers: those that their launcher finds on PATH, and those that run already."""
import hashlib
import json
import os
import pathlib
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.request

import pytest
from wire import PROGRAMS, ROOT, WAIT_S, Ledger, Servers, clients, wait_for

pytestmark = pytest.mark.interop
CLUSTER = """\
local_cluster: here
here:
  type: local
  workers: 2
  frontends:
    - hashserver: {bufferdir: %(folder)s/buffers, conda: null, network_interface: 127.0.0.1, port_start: 49200, port_end: 65500}
      database: {database_dir: %(folder)s/results, conda: null, network_interface: 127.0.0.1, port_start: 49200, port_end: 65500}
      jobserver: {conda: null, network_interface: 127.0.0.1, port_start: 49200, port_end: 65500}
"""
SCRIPT = '''
import json, os, sys, threading
import numpy as np
import seamless, seamless.config
from seamless.transformer import delayed
seamless.config.init()

@delayed
def join(a, b):
    import time
    with open("LEDGER", "a") as ledger:
        ledger.write("x")
    if b == 13:
        print("joining")
        raise ValueError("thirteen brings bad luck")
    if b > 1000:
        time.sleep(b - 1000)
        with open("LEDGER-late", "a") as ledger:
            ledger.write("x")
    return {"sum": float(a.sum()) + b, "double": a * 2}

found = {}
transformations = [join(np.arange(10.0), int(word)) for word in sys.argv[1:]]
for transformation in transformations:
    transformation.construct()
print(json.dumps([str(transformation.transformation_checksum) for transformation in transformations]), flush=True)
for transformation in transformations:
    transformation.start()
for word, transformation in zip(sys.argv[1:], transformations):
    try:
        value = transformation.run()
        found[word] = [value["sum"], value["double"].tolist()]
    except Exception as error:
        found[word] = str(error)
print(json.dumps(found), flush=True)
seamless.close()
'''


class Launched(Servers):
    """Their client in a home of its own, whose launcher starts our servers: wrappers named as theirs come first on PATH."""

    def __init__(self, real, folder, record=False):
        super().__init__(real, folder)
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        for theirs, ours in PROGRAMS.values():
            wrapper = self.bin / theirs
            wrapper.write_text("#!/bin/sh\nPYTHONPATH='%s' SEAMLESS_HOME='%s' exec '%s' '%s' --auth none \"$@\"\n" % (
                ROOT, self.home / ".seamless", sys.executable, ROOT / "bin" / ours))
            wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        (self.home / ".seamless").mkdir()
        (self.home / ".seamless" / "clusters.yaml").write_text(CLUSTER % {"folder": self.folder})
        self.profile = "- cluster: here\n- execution: remote\n- record: %s\n" % str(record).lower()

    def environment(self, who, **variables):
        found = super().environment(who, **variables)
        if who == "theirs":
            found["PATH"] = "%s%s%s" % (self.bin, os.pathsep, found["PATH"])
        return found

    def project(self, name, folder):
        """Make ``folder`` a folder of that project."""
        (folder / "seamless.yaml").write_text("- project: %s\n" % name)
        (folder / "seamless.profile.yaml").write_text(self.profile)

    def record_of(self, service, project):
        """What their launcher knows of the server."""
        return json.loads((self.home / ".remote-http-launcher" / "server" / ("%s-here-rw-%s.json" % (service, project))).read_text())

    def rows(self, project, table="transformation"):
        """The rows of the project's table of results."""
        database = sqlite3.connect("file:%s?mode=ro" % (self.folder / "results" / project / "seamless.db"), uri=True, timeout=WAIT_S)
        try:
            return database.execute("SELECT * FROM " + table).fetchall()
        finally:
            database.close()

    def stop(self):
        for path in (self.home / ".remote-http-launcher" / "server").glob("*.json"):
            pid = json.loads(path.read_text()).get("pid")
            shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
            if str(self.folder) in shown:
                os.kill(pid, signal.SIGTERM)
        super().stop()


@pytest.fixture(scope="module")
def servers(real, tmp_path_factory):
    with Launched(real, tmp_path_factory.mktemp("wire") / "servers") as servers:
        yield servers


@pytest.fixture
def run(servers, tmp_path):
    """Run one of their programs, or the script, in a folder of the project p."""
    ledger = Ledger(tmp_path / "ledger")
    (tmp_path / "script.py").write_text(SCRIPT.replace("LEDGER", str(ledger)))
    servers.project("p", tmp_path)

    def run(*command, wait=True, **variables):
        return (servers.run if wait else servers.begin)("theirs", command, tmp_path, **variables)
    run.folder, run.ledger = tmp_path, ledger
    return run


def values(done):
    assert done.returncode == 0, done
    return json.loads(done.stdout.splitlines()[-1])


# ---- computing

def test_functions_run_on_our_servers_that_their_launcher_started(run, servers):
    wanted = {str(n): [45.0 + n, [2.0 * i for i in range(10)]] for n in (1, 2)}
    done = run("script.py", "1", "2")
    assert values(done) == wanted
    for service in PROGRAMS:
        with urllib.request.urlopen("http://127.0.0.1:%d/info" % servers.record_of(service, "p")["port"], timeout=WAIT_S) as answer:
            assert json.load(answer)["service"] == service
    names = json.loads(done.stdout.splitlines()[0])
    assert set(names) <= {row[0] for row in servers.rows("p")}
    records = {row[0]: json.loads(row[2]) for row in servers.rows("p", "meta_data")}
    for name in names:
        assert (records[name]["execution_mode"], records[name]["remote_target"]) == ("remote", "jobserver")
    assert values(run("script.py", "1", "2")) == wanted
    assert run.ledger.ran() == 2


def test_a_command_with_files_folders_and_variables_runs_once(run, servers):
    (run.folder / "in.txt").write_text("content\n")
    (run.folder / "data").mkdir()
    (run.folder / "data" / "a.txt").write_text("a\n")
    (run.folder / "data" / "b.txt").write_text("b\n")
    for _ in range(2):
        done = run("seamless-run", "-i", "in.txt", "-i", "data", "--metavar", "CPUS=3", "-c",
                   "printf x >> %s; cat in.txt data/*.txt; echo $CPUS" % run.ledger)
        assert (done.returncode, done.stdout) == (0, "content\na\nb\n3\n"), done
    assert run.ledger.ran() == 1


def test_a_function_that_fails_is_run_once_and_its_traceback_is_shown_once(run, servers):
    message = values(run("script.py", "13"))["13"]
    assert message.count("ValueError: thirteen brings bad luck") == 1 and message.count("Traceback") == 1 and "joining" in message
    assert run.ledger.ran() == 1


def test_a_command_that_fails_is_run_once_and_its_error_is_shown_once(run, servers):
    done = run("seamless-run", "-c", "printf x >> %s; echo trouble >&2; exit 3" % run.ledger)
    assert done.returncode and (done.stdout + done.stderr).count("\ntrouble\n") == 1, done
    assert run.ledger.ran() == 1


def test_many_jobs_at_once(run, servers):
    words = [str(n) for n in range(100, 130)]
    found = values(run("script.py", *words))
    assert found == {word: [45.0 + int(word), [2.0 * i for i in range(10)]] for word in words}
    assert run.ledger.ran() == 30


def test_ctrl_c_kills_the_job_and_nothing_is_recorded(run, servers):
    command = "seamless-run", "-c", "printf x >> %s; sleep 3; touch %s-late; echo late" % (run.ledger, run.ledger)
    before = servers.rows("p")
    process = run(*command, wait=False)
    run.ledger.await_one()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    time.sleep(4)
    assert not pathlib.Path("%s-late" % run.ledger).exists() and servers.rows("p") == before
    done = run(*command)
    assert (done.returncode, done.stdout) == (0, "late\n"), done
    assert run.ledger.ran() == 2


def test_their_seamless_cancel_kills_a_function_that_another_process_waits_for(run, servers):
    process = run("script.py", "1020", wait=False)
    [name] = json.loads(process.stdout.readline())
    run.ledger.await_one()
    done = run("seamless-cancel", name)
    assert done.returncode == 0, done
    out, err = process.communicate(timeout=15)              # the job would take 20 s
    assert "canceled" in json.loads(out.splitlines()[-1])["1020"].lower(), (out, err)
    assert name not in {row[0] for row in servers.rows("p")}
    assert not pathlib.Path("%s-late" % run.ledger).exists()


# ---- data

def test_upload_download_resolve_and_run_transformation(run, servers):
    data = bytes(range(256)) * 5000
    (run.folder / "file.bin").write_bytes(data)
    (run.folder / "tree" / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt"):
        (run.folder / "tree" / name).write_text("this is %s\n" % name)
    done = run("seamless-upload", "-y", "file.bin", "tree")
    assert done.returncode == 0, done
    name = hashlib.sha256(data).hexdigest()
    assert (run.folder / "file.bin.CHECKSUM").read_text().strip() == name
    assert (servers.folder / "buffers" / "p" / name[:2] / name).read_bytes() == data
    (run.folder / "file.bin").unlink()
    for path in ("a.txt", "sub/b.txt"):
        (run.folder / "tree" / path).unlink()
    done = run("seamless-download", "-y", "file.bin.CHECKSUM", "tree.CHECKSUM")
    assert done.returncode == 0, done
    assert (run.folder / "file.bin").read_bytes() == data
    assert (run.folder / "tree" / "sub" / "b.txt").read_text() == "this is sub/b.txt\n"
    assert run("seamless-resolve", name, "--output", "again").returncode == 0
    assert (run.folder / "again").read_bytes() == data
    done = run("script.py", "7")
    [transformation] = json.loads(done.stdout.splitlines()[0])
    done = run("seamless-run-transformation", transformation)
    result = dict(servers.rows("p"))[transformation]
    assert done.returncode == 0 and result in done.stdout, done


# ---- servers that run already

def test_servers_that_run_already_are_used_when_the_records_of_their_launcher_name_them(run, servers, tmp_path):
    """The records are all that their client needs (http.md section 6): it starts nothing."""
    hashserver, database, lists = servers.stores("ours")
    jobserver = servers.start("ours", "jobserver", "--workers", "1", parameters=json.loads(lists))
    records = servers.home / ".remote-http-launcher" / "client"
    records.mkdir(parents=True, exist_ok=True)
    for service, server in (("hashserver", hashserver), ("database", database), ("jobserver", jobserver)):
        (records / ("%s-here-rw-named.json" % service)).write_text(json.dumps({"hostname": "127.0.0.1", "port": server.port, "parameters": dict(
            json.loads(lists), record=False)} if service == "jobserver" else {"hostname": "127.0.0.1", "port": server.port}))
    servers.project("named", run.folder)
    done = run("script.py", "5")
    assert values(done)["5"][0] == 50.0 and run.ledger.ran() == 1
    [name] = json.loads(done.stdout.splitlines()[0])
    assert database.ask("GET", "/", {"type": "transformation", "checksum": name})[0] == 200
    assert not list((servers.home / ".remote-http-launcher" / "server").glob("*-named.json"))


def test_seamless_remote_clients_may_name_our_stores(run, servers):
    hashserver, database, lists = servers.stores("ours")
    for name in ("seamless.yaml", "seamless.profile.yaml"):
        (run.folder / name).unlink()
    for _ in range(2):
        done = run("seamless-run", "-c", "printf x >> %s; echo done" % run.ledger, SEAMLESS_REMOTE_CLIENTS=clients(hashserver, database))
        assert (done.returncode, done.stdout) == (0, "done\n"), done
    assert run.ledger.ran() == 1


def test_servers_live_while_they_are_asked_for_their_health_and_end_when_they_are_idle(servers, tmp_path):
    """Their clients ask every 30 s; here it is ten times in each idle time."""
    more = {"hashserver": (tmp_path, "--writable"), "database": (tmp_path / "seamless.db", "--writable"), "jobserver": ("--workers", "1")}
    lists = {"buffer": [{"readonly": False, "remote_directory": str(tmp_path)}], "database": []}
    started = [servers.start("ours", service, *words, timeout=2, parameters=lists) for service, words in more.items()]
    end = time.monotonic() + 5
    while time.monotonic() < end:
        assert [server.ask("GET", "/healthcheck")[:2] for server in started] == [(200, b"OK")] * 3
        time.sleep(0.2)
    assert [server.process.wait(30) for server in started] == [0, 0, 0]


# ---- record mode

def test_their_record_mode_runs_on_our_jobserver(real, tmp_path):
    """Ours needs no probes of the machine beforehand, and writes a full record."""
    with Launched(real, tmp_path / "servers", record=True) as servers:
        work = tmp_path / "work"
        work.mkdir()
        ledger = Ledger(tmp_path / "ledger")
        (work / "script.py").write_text(SCRIPT.replace("LEDGER", str(ledger)))
        servers.project("p", work)
        for _ in range(2):
            done = servers.run("theirs", ["script.py", "3"], work)
            assert values(done)["3"][0] == 48.0
        [name] = json.loads(done.stdout.splitlines()[0])
        [record] = [json.loads(row[2]) for row in servers.rows("p", "meta_data") if row[0] == name]
        assert record["tf_checksum"] == name and record["remote_target"] == "jobserver" and record["environment"]
        assert ledger.ran() == 1
