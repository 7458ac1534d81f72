"""The program seamless-service on this machine: real services, the words it prints, its exit codes."""
import os
import signal
import subprocess
import sys

import pytest

from seamless_lite import cmd_service, launch
from test_architecture import PACKAGE

PROGRAM = os.path.join(os.path.dirname(str(PACKAGE)), "bin", "seamless-service")


def run(*words):
    done = subprocess.run([sys.executable, PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def services(home):
    """A hashserver and a database."""
    store = home / "store"
    store.mkdir()
    found = launch.ensure_all([launch.ServiceSpec("hashserver", "hashserver-t", (str(store), "--writable")),
                               launch.ServiceSpec("database", "database-t", (str(store / "seamless.db"), "--writable"))])
    yield found
    for record in launch.services():
        os.kill(record["pid"], signal.SIGKILL)
    launch.hostside._reap()


def test_services_are_listed_shown_and_stopped(services):
    code, out, err = run("ps")
    assert (code, err) == (0, "") and [line.split()[0] for line in out.splitlines()] == ["KEY", "database-t", "hashserver-t"]
    assert str(services[0].pid) in out and services[0].address in out
    assert run("ps", "localhost")[1] == out
    code, out, err = run("logs", "hashserver-t")
    assert (code, err) == (0, "") and "the hashserver listens" in out
    code, out, err = run("stop", "hashserver-t")
    assert (code, err) == (0, "") and out == "stopped %s\n" % services[0].name
    assert run("stop", services[1].name, "localhost")[1] == "stopped %s\n" % services[1].name
    assert run("ps") == (0, "", "seamless-service: no service of yours runs on this machine\n")
    assert "the hashserver stopped" in run("logs", services[0].name)[1]


def test_all_are_stopped_at_once(services):
    code, out, err = run("stop", "--all")
    assert code == 0 and len(out.splitlines()) == 2 and launch.services() == []
    assert run("stop", "--all") == (0, "", "seamless-service: no service of yours runs on this machine\n")


def test_when_all_are_stopped_what_a_killed_one_left_goes_too(home, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "seamless-dask-1").mkdir()
    (tmp_path / "seamless-dask-1/lock").write_text(os.uname().nodename)     # which nobody holds
    assert run("stop", "--all")[0] == 0
    assert not (tmp_path / "seamless-dask-1").exists()


def test_what_is_not_there_is_one_sentence_and_exit_code_1(home):
    code, out, err = run("stop", "nosuch")
    assert (code, out) == (1, "") and err == ("seamless-service: no service with the key or name nosuch runs on this machine; "
                                              "'seamless-service ps' lists those that run\n")
    code, out, err = run("logs", "nosuch")
    assert (code, out) == (1, "") and err == "seamless-service: there is no log of a service with the key or name nosuch on this machine\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["ps", "a", "b"], ["stop"], ["logs"], ["uninstall"], ["stop", "--all", "a", "b"],
                                   ["ps", "--all"], ["stop", "x", "--data"], ["--nosuch"]])
def test_wrong_usage_is_exit_code_2(home, words):
    code, out, err = run(*words)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("seamless-service: ")
    assert not (home / ".seamless").exists()


def test_the_help_says_all_there_is(home):
    code, out, err = run("--help")
    assert code == 0
    for word in ("ps [HOST]", "stop KEY|NAME|--all [HOST]", "logs KEY|NAME [HOST]", "uninstall HOST", "--data", "exit codes", "examples", "-v"):
        assert word in out
    done = subprocess.run([sys.executable, "-m", "seamless_lite", "service", "ps"], cwd=str(PACKAGE.parent), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and b"no service of yours" in done.stderr


def test_uninstalling_this_machine_keeps_results_and_what_the_user_wrote(services, home):
    folder = home / ".seamless"
    (folder / "cache" / "project" / "ab").mkdir(parents=True)
    (folder / "cache" / "project" / "ab" / "buffer").write_bytes(b"x" * 2048)
    (folder / "clusters.yaml").write_text("")
    code, out, err = run("uninstall", "localhost")
    assert (code, err) == (0, "")
    node = os.uname().nodename
    assert sorted(out.splitlines()[:2]) == sorted("stopped " + service.name for service in services)
    assert "kept %s on %s: 2.05 kB of stored results" % (folder / "cache", node) in out and str(home / "store") in out
    assert out.splitlines()[-1] == "%s on %s still holds cache, clusters.yaml" % (folder, node)
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "clusters.yaml"] and (home / "store").exists()
    assert run("uninstall", "localhost", "--data")[1].endswith("still holds clusters.yaml\n")


def test_a_host_is_found_by_its_names_in_the_cluster_files(home):
    (home / ".seamless").mkdir(exist_ok=True)
    (home / ".seamless" / "clusters.yaml").write_text("""
wrong: {frontends: [{hostname: a.org, bufferdir: 3}]}
other: {frontends: [{hostname: login, ssh_hostname: b.org, hashserver: {bufferdir: /x}}]}
mine: {frontends: [{hostname: a.org, ssh_hostname: login, hashserver: {bufferdir: /x}, jobserver: {python: /opt/py}}]}
""")
    places = {name: cmd_service._place(name) for name in ("a.org", "login", "b.org", "c.org", "localhost", None)}
    assert places["a.org"] == places["login"] == launch.Place("login", python="/opt/py")
    assert places["b.org"] == launch.Place("b.org") and places["c.org"] == launch.Place("c.org")
    assert places["localhost"] == places[None] == launch.HERE
