"""``seamless-service-*``: services by what they serve."""
import json
import os
import pathlib
import pty
import subprocess
import sys

import pytest

from seamless_lite import cmd_service_family as family
from seamless_lite.folder import Folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLUSTERS = """\
loc:
  frontends:
    - hostname: localhost
      hashserver: {{bufferdir: {0}/buffers}}
      database: {{database_dir: {0}/results}}
      jobserver: {{}}
away:
  frontends:
    - hostname: no-such-host.invalid
      hashserver: {{bufferdir: /far/buffers}}
      database: {{database_dir: /far/results}}
"""
QUEUES = """\
hpc:
  type: slurm
  default_queue: q1
  queues:
    q1: {conda: base, walltime: "00:10:00", cores: 1, memory: 1GB, maximum_jobs: 1}
    q2: {conda: base, walltime: "00:10:00", cores: 1, memory: 1GB, maximum_jobs: 1}
  frontends:
    - hostname: localhost
      daskserver: {}
"""


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(CLUSTERS.format(tmp_path))
    (tmp_path / "seamless.yaml").write_text("- cluster: loc\n- project: p\n- stage s:\n    - execution: process\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    run("stop", "--cluster", "loc")


def run(name, *words, stdin=subprocess.DEVNULL):
    done = subprocess.run([sys.executable, str(ROOT / "bin" / ("seamless-service-" + name)), *words], stdin=stdin,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def resolved(*words):
    code, out, err = run("resolve", *words)
    assert code == 0, err
    return json.loads(out)


def test_a_service_has_the_key_and_the_folder_that_seamless_gives_it(place):
    # what the real program answers for this cluster
    assert resolved("--service", "hashserver", "--cluster", "loc", "--project", "p", "--stage", "s") == {
        "cluster": "loc", "key": "hashserver-loc-rw-p--STAGE-s", "log_path": None, "mode": "rw", "project": "p", "queue": None,
        "service": "hashserver", "ssh_hostname": None, "stage": "s", "subproject": None, "substage": None,
        "workdir": str(place / "buffers/p/STAGE-s")}
    assert resolved("--service", "jobserver", "--cluster", "loc", "--project", "p", "--subproject", "a/b", "--stage", "s", "--substage",
                    "t")["key"] == "jobserver-loc-rw-p--a--b--STAGE-sSUBSTAGE-t"
    assert resolved("--service", "pure-daskserver", "--cluster", "loc", "--project", "p", "--queue", "q")["key"] == "pure-daskserver-loc-q"
    assert resolved("--service", "database", "--project", "SEAMLESS_CACHE", "--cluster", "away")["ssh_hostname"] == "no-such-host.invalid"
    assert resolved("--service", "database")["workdir"] == str(place / "results/p"), "what is not said is in the folder's files"
    (place / "other").mkdir()
    assert resolved("--service", "database", "--workdir", str(place / "other"), "--cluster", "loc", "--project", "x")["project"] == "x"


def test_the_queue_of_the_folder_counts_for_a_pure_daskserver(place, home):
    (home / ".seamless/clusters.yaml").write_text(QUEUES)
    (place / "seamless.yaml").write_text("- cluster: hpc\n- project: p\n- execution: remote\n- remote: daskserver\n- persistent: false\n"
                                         "- queue: q2\n")
    found = resolved("--service", "pure-daskserver")
    assert found["key"] == "pure-daskserver-hpc-q2" and found["queue"] == "q2"
    assert run("stop", "--service", "pure-daskserver")[1] == "pure-daskserver-hpc-q2: not running\n"
    assert resolved("--service", "pure-daskserver", "--queue", "q1")["key"] == "pure-daskserver-hpc-q1"


def test_ps_of_a_cluster_asks_its_hosts(place):
    code, out, err = run("ps", "--cluster", "away")
    assert code == 1 and out == "" and "no-such-host.invalid" in err
    assert run("ps", "--cluster", "away", "--client") == (0, "", "")
    assert "'cluster' is 'nowhere'" in run("ps", "--cluster", "nowhere")[2]


@pytest.mark.parametrize("parts", [
    dict(service="hashserver", cluster="a-b", mode="rw", project="p-q", subproject=None, stage=None, substage=None),
    dict(service="database", cluster="c", mode="ro", project="p", subproject="a/b", stage="s", substage=None),
    dict(service="jobserver", cluster="c", mode="rw", project="p", subproject=None, stage="s", substage="t"),
    dict(service="daskserver", cluster="c", mode="rw", project="p", subproject="a", stage=None, substage=None)])
def test_the_names_are_found_in_the_key_again(parts):
    middle = ("--" + parts["subproject"].replace("/", "--") if parts["subproject"] else "") + (
        "--STAGE-" + parts["stage"] + ("SUBSTAGE-" + parts["substage"] if parts["substage"] else "") if parts["stage"] else "")
    assert family._parts("%(service)s-%(cluster)s-%(mode)s-%(project)s" % parts + middle) == parts


@pytest.mark.slow
def test_services_are_listed_looked_at_stopped_and_forgotten(place):
    assert subprocess.run([sys.executable, str(ROOT / "bin/seamless-init")], stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    code, out, _ = run("ps", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["service"], row["cluster"], row["project"], row["process"]) for row in rows] == [
        ("database", "loc", "p", "running"), ("hashserver", "loc", "p", "running"), ("jobserver", "loc", "p", "running")]
    assert run("ps", "--project", "other")[1] == "" and run("ps", "--status", "starting")[1] == ""
    table = run("ps", "--service", "database", "--server")[1].splitlines()
    assert table[0].split() == ["SERVICE", "CLUSTER", "PROJECT", "STAGE", "PROCESS", "HOST", "PORT"] and len(table) == 2
    record = json.loads(run("inspect", "--service", "jobserver")[1])
    assert record["key"] == "jobserver-loc-rw-p" and os.path.exists(record["log"])
    assert resolved("--service", "jobserver")["log_path"] == record["log"]
    code, out, err = run("rm", "--service", "jobserver")
    assert code == 1 and "runs: stop it first" in err
    code, out, err = run("clear", "--service", "hashserver", "-y")
    assert code == 1 and "is in use by" in err
    assert run("stop", "--service", "jobserver")[:2] == (0, "jobserver-loc-rw-p: stopped\n")
    assert run("stop", "--service", "jobserver")[:2] == (0, "jobserver-loc-rw-p: not running\n")
    code, out, _ = run("logs", "--service", "jobserver", "--tail", "1")
    assert code == 0 and out.count("\n") <= 1
    assert run("rm", "--service", "jobserver")[1] == "removed %s\n" % record["log"] and not os.path.exists(record["log"])
    assert run("logs", "--service", "jobserver")[0] == 1 and run("inspect", "--service", "jobserver")[0] == 1
    assert sorted(run("stop", "--cluster", "loc")[1].splitlines()) == ["database-loc-rw-p: stopped", "hashserver-loc-rw-p: stopped"]
    assert run("ps")[:2] == (0, "")


def test_storage_is_listed_and_cleared_and_nothing_else(place):
    store = Folder(str(place / "buffers/p"))
    rows = [json.loads(line) for line in run("ps", "--persistent", "--json")[1].splitlines()]
    assert [(row["service"], row["persistent"], row["size"]) for row in rows] == [("database", "absent", None), ("hashserver", "absent", None)]
    checksum = store.put(b"12345")
    (place / "buffers/p/mine.txt").write_text("not a buffer")
    rows = [json.loads(line) for line in run("ps", "--persistent", "--json", "--service", "hashserver")[1].splitlines()]
    assert [(row["persistent"], row["size"], row["process"]) for row in rows] == [("populated", 7, None)]
    code, _, err = run("clear", "--service", "hashserver")
    assert code == 1 and "refused; answer yes at a terminal, or add -y" in err and store.has([checksum]) == [True]
    main, terminal = pty.openpty()
    os.write(main, b"maybe\nn\n")
    assert run("clear", "--service", "hashserver", stdin=terminal)[0] == 1 and store.has([checksum]) == [True]
    os.write(main, b"y\n")
    assert run("clear", "--service", "hashserver", stdin=terminal)[1] == "removed 2 entries from %s\n" % (place / "buffers/p")
    assert os.listdir(place / "buffers/p") == ["mine.txt"]
    (place / "results/p").mkdir(parents=True)
    (place / "results/p/seamless.db").write_bytes(b"")
    assert run("clear", "--service", "database", "-y")[0] == 0 and os.listdir(place / "results/p") == []


@pytest.mark.parametrize("words, code, sentence", [
    (("stop",), 2, "say which: --service KIND"),
    (("inspect",), 2, "--service"),
    (("resolve", "--service", "nonsense"), 2, "invalid choice"),
    (("resolve", "--service", "hashserver", "--cluster", "nowhere"), 1, "'cluster' is 'nowhere'"),
    (("resolve", "--service", "hashserver", "--frontend-name", "x"), 1, "has no frontend with the hostname 'x'"),
    (("clear", "--service", "jobserver"), 2, "stores nothing that could be cleared"),
    (("clear", "--service", "hashserver", "--cluster", "away"), 1, "is on no-such-host.invalid: run seamless-service-clear there"),
    (("logs", "--service", "hashserver", "--tail", "0"), 2, "a number of lines, from 1")])
def test_wrong_words_are_one_sentence(place, words, code, sentence):
    found, out, err = run(*words)
    assert (found, out) == (code, "") and sentence in err
