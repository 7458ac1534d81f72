"""hostside and launch, with a small service in a copy of the package under another name: real processes, really killed."""
import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = ("errors httpwire httpmessage statusfile signing httpbase httpclient processes hostside conda hostpython hostsource leftovers hostagent "
           "hosts shipping launch")
PACKAGE = "carried under.another_name".replace(" ", "_")
ECHO = textwrap.dedent('''
    """A service for the tests: says its arguments, and can be made to fail in several ways."""
    import argparse, os, re, signal, subprocess, sys, time
    from . import httpbase
    class Echo(httpbase.Service):
        name = "echo"
        def __init__(self, args):
            super().__init__()
            self.args = args
        def info(self):
            return {"words": self.args.words, "path": sys.path, "environment": dict(os.environ), "cwd": os.getcwd(), "argv": sys.argv}
    def make(args):
        if args.die:
            print("line of the log\\nlast words", file=sys.stderr, flush=True)
            os._exit(7)
        if args.child:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(args.child, "w") as file:
                file.write(str(child.pid))
        time.sleep(args.delay)
        if args.deaf:
            signal.signal = lambda *args: None
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        return Echo(args)
    if __name__ == "__main__":
        parser = argparse.ArgumentParser()
        httpbase.service_arguments(parser)
        parser.add_argument("words", nargs="*")
        parser.add_argument("--delay", type=float, default=0)
        parser.add_argument("--die", action="store_true")
        parser.add_argument("--deaf", action="store_true")
        parser.add_argument("--child")
        sys.exit(httpbase.run_service(make, parser.parse_args()))
    ''')


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the package under another name, not installed, in a path that needs care."""
    folder = tmp_path_factory.mktemp("it's a $HOME; checkout")
    package = folder.joinpath(*PACKAGE.split("."))
    package.mkdir(parents=True)
    for parent in (package, package.parent):
        (parent / "__init__.py").write_text("")
    for name in MODULES.split():
        shutil.copy(os.path.join(ROOT, "seamless_lite", name + ".py"), package)
    (package / "echo.py").write_text(ECHO)
    return folder


@pytest.fixture
def launch(checkout, home, monkeypatch):
    """The launch module of the copy; all services that a test leaves running are killed."""
    monkeypatch.syspath_prepend(str(checkout))
    module = importlib.import_module(PACKAGE + ".launch")
    yield module
    for record in module.services():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(record["pid"], signal.SIGKILL)
    module.hostside._reap()


def spec(launch, *args, key="echo-test", **fields):
    return launch.ServiceSpec("echo", key, tuple(args), **fields)


def info(launch, connection):
    client = launch.HttpClient(connection.address, connection.secret)
    try:
        return client.request("GET", "/info").json()
    finally:
        client.close()


def dead(launch, pid):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        launch.hostside._reap()
        if launch.hostside.identity(pid) is None:
            return True
        time.sleep(0.01)
    return False


def run_files(home):
    return sorted(os.listdir(home / ".seamless" / "run"))


def test_a_service_is_started_once_and_found_again(launch, home):
    first = launch.ensure(spec(launch, "a", "b c"))
    second = launch.ensure(spec(launch, "a", "b c"))
    assert first.started and not second.started and first.pid == second.pid and first.address == second.address
    assert info(launch, first)["words"] == ["a", "b c"]
    assert first.address.startswith("unix://") and len(first.secret) == 32
    (record,) = launch.services()
    assert (record["service"], record["key"], record["pid"], record["status"]) == ("echo", "echo-test", first.pid, "running")
    run = home / ".seamless" / "run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in run.iterdir())
    assert [name.rpartition(".")[2] for name in run_files(home)] == ["json", "log", "sock"]


def test_whatever_matters_makes_another_service(launch):
    one = spec(launch, "a")
    others = [spec(launch, "b"), spec(launch, "a", key="echo-other"), spec(launch, "a", parameters={"x": 1}), spec(launch, "a", auth=False),
              spec(launch, "a", port_range=(20000, 40000))]
    found = launch.ensure_all([one] + others)
    assert len({connection.pid for connection in found}) == 6
    assert [connection.pid for connection in launch.ensure_all([one] + others)] == [connection.pid for connection in found]
    assert found[4].secret is None and found[5].address.startswith("http://127.0.0.1:")
    assert launch.ensure(spec(launch, "a", idle_timeout_s=3)).pid == found[0].pid
    assert len(launch.services()) == 6


def test_a_changed_package_never_meets_an_old_service(launch, checkout, monkeypatch):
    first = launch.ensure(spec(launch))
    os.utime(checkout.joinpath(*PACKAGE.split(".")) / "echo.py", (1, 1))
    assert launch.ensure(spec(launch)).pid != first.pid


def test_a_service_on_a_network_interface_is_reached_over_loopback(launch):
    connection = launch.ensure(spec(launch, port_range=(20000, 40000), network_interface="0.0.0.0"))
    assert connection.address.startswith("http://127.0.0.1:") and info(launch, connection)["pid"] == connection.pid


def test_the_secret_is_neither_in_the_arguments_nor_in_the_environment_nor_in_the_record(launch, home):
    connection = launch.ensure(spec(launch))
    known = info(launch, connection)
    (record,) = launch.services()
    for text in (json.dumps(known), json.dumps(record), launch.logs("echo-test")):
        assert connection.secret.hex() not in text
    assert (home / ".seamless" / "secret").read_text().strip() == connection.secret.hex()


def test_the_service_gets_the_users_environment_and_finds_the_package(launch, checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("SOMETHING", "its value")
    monkeypatch.setenv("PYTHONPATH", "relative")
    monkeypatch.chdir(tmp_path)
    known = info(launch, launch.ensure(spec(launch)))
    assert known["environment"]["SOMETHING"] == "its value" and known["cwd"] == "/"
    assert known["environment"]["PYTHONPATH"] == os.pathsep.join([str(checkout), str(tmp_path / "relative")])


def test_an_installed_package_is_not_put_before_the_standard_library(launch, monkeypatch):
    monkeypatch.setattr(importlib.import_module(PACKAGE + ".processes"), "__file__", "/usr/lib/python3/site-packages/carried_under/another_name/processes.py")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert launch._environment() == {}


RACER = textwrap.dedent("""
    import importlib, json, sys
    sys.path.insert(0, sys.argv[1])
    launch = importlib.import_module(sys.argv[2] + ".launch")
    print("ready", flush=True)
    sys.stdin.readline()
    found = launch.ensure_all([launch.ServiceSpec("echo", key, ("--delay", "0.1")) for key in sys.argv[3:]])
    print(json.dumps([[c.key, c.pid, c.started] for c in found]))
    """)


def test_processes_that_start_at_once_end_with_one_service_each(launch, checkout):
    keys = ["echo-a", "echo-b"]
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(checkout), PACKAGE] + (keys if n % 2 else keys[::-1]),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in range(6)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    found = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    for key in keys:
        mine = [connection for connections in found for connection in connections if connection[0] == key]
        assert len({pid for _, pid, _ in mine}) == 1 and sum(started for _, _, started in mine) == 1
    assert len(launch.services()) == 2


def test_threads_that_start_at_once_end_with_one_service(launch):
    found, barrier = [], threading.Barrier(5)

    def work():
        barrier.wait()
        found.append(launch.ensure(spec(launch)))
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({connection.pid for connection in found}) == 1 and sum(connection.started for connection in found) == 1


def test_a_killed_service_is_replaced_and_its_files_are_removed(launch, home):
    first = launch.ensure(spec(launch))
    os.kill(first.pid, signal.SIGKILL)
    assert dead(launch, first.pid)
    second = launch.ensure(spec(launch))
    assert second.started and second.pid != first.pid and info(launch, second)["pid"] == second.pid
    os.kill(second.pid, signal.SIGKILL)
    assert dead(launch, second.pid)
    assert launch.services() == []
    assert [name.rpartition(".")[2] for name in run_files(home)] == ["log"]


@pytest.mark.slow
def test_a_service_that_does_not_answer_is_replaced(launch, monkeypatch):
    monkeypatch.setattr(launch.hostside, "ANSWER_S", 0.2)
    monkeypatch.setattr(launch, "QUICK_S", 0.2)
    monkeypatch.setattr(launch.hostside, "STOP_S", 0.2)
    first = launch.ensure(spec(launch))
    os.kill(first.pid, signal.SIGSTOP)
    second = launch.ensure(spec(launch))
    assert second.started and second.pid != first.pid and dead(launch, first.pid)


def test_a_service_that_ended_when_it_was_idle_is_started_again(launch):
    first = launch.ensure(spec(launch, idle_timeout_s=0.2))
    assert dead(launch, first.pid)
    second = launch.ensure(spec(launch))
    assert second.started and second.pid != first.pid
    assert "idle for 0.2 s" in launch.logs("echo-test")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "running"}', '{"status": "running", "pid": 1, "node": NODE, "port": 1}',
                                     '{"status": "running", "pid": "x", "node": NODE}', '{"status": "starting", "pid": null, "pid_started": null, "node": NODE}'])
@pytest.mark.slow
def test_a_record_that_means_nothing_is_replaced(launch, home, content):
    first = launch.ensure(spec(launch))
    launch.stop("echo-test")
    run = home / ".seamless" / "run"
    (log,) = run.glob("*.log")
    log.with_suffix(".json").write_text(content.replace("NODE", json.dumps(os.uname().nodename)))
    second = launch.ensure(spec(launch))
    assert second.started and second.pid != first.pid


def test_the_number_of_a_dead_service_given_to_another_process_is_left_alone(launch, home):
    launch.ensure(spec(launch))
    (record,) = launch.services()
    path = home / ".seamless" / "run" / (record["name"] + ".json")
    launch.stop("echo-test")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        path.write_text(json.dumps({**record, "pid": innocent.pid}))
        assert launch.stop("echo-test") == []
        path.write_text(json.dumps({**record, "pid": innocent.pid}))
        assert launch.ensure(spec(launch)).started
        assert innocent.poll() is None
        innocent.communicate(b"\n")


def test_a_service_of_another_host_is_left_alone(launch, home):
    launch.ensure(spec(launch))
    (record,) = launch.services()
    launch.stop("echo-test")
    path = home / ".seamless" / "run" / (record["name"] + ".json")
    path.write_text(json.dumps({**record, "node": "elsewhere"}))
    assert [record["node"] for record in launch.services()] == ["elsewhere"]
    with pytest.raises(launch.ServiceError, match="runs on elsewhere: stop it there"):
        launch.stop("echo-test")
    path.unlink()


def test_stopping_ends_the_service_and_everything_of_it_but_the_log(launch, home):
    one, two = launch.ensure_all([spec(launch), spec(launch, key="echo-other")])
    (name,) = launch.stop("echo-test")
    assert dead(launch, one.pid) and name.startswith("echo-test-")
    assert info(launch, two)["pid"] == two.pid
    assert launch.stop("echo-test") == [] and launch.stop("nothing") == []
    (record,) = launch.services()
    assert launch.stop(record) == [record["name"]]
    assert [name.rpartition(".")[2] for name in run_files(home)] == ["log", "log"]
    assert "the echo stopped" in launch.logs("echo-other") and launch.logs("nothing") is None


def test_a_service_that_does_not_listen_to_sigterm_is_killed_with_its_children(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.hostside, "STOP_S", 0.2)
    connection = launch.ensure(spec(launch, "--deaf", "--child", str(tmp_path / "child")))
    launch.stop("echo-test")
    assert dead(launch, connection.pid) and dead(launch, int((tmp_path / "child").read_text()))


def test_a_service_that_dies_at_its_start_shows_the_end_of_its_log(launch, home):
    with pytest.raises(launch.ServiceError) as caught:
        launch.ensure(spec(launch, "--die"))
    text = str(caught.value)
    assert "the echo did not start: it ended with exit code 7" in text and text.endswith("line of the log\nlast words")
    assert str(home / ".seamless" / "run") in text
    assert [name.rpartition(".")[2] for name in run_files(home)] == ["log"]
    with pytest.raises(launch.ServiceError, match="No module named"):
        launch.ensure(launch.ServiceSpec("nosuchmodule", "nosuch"))


def test_one_that_fails_does_not_take_the_others_with_it(launch):
    with pytest.raises(launch.ServiceError, match="exit code 7"):
        launch.ensure_all([spec(launch), spec(launch, "--die", key="echo-bad")])
    assert not launch.ensure(spec(launch)).started


def test_a_service_that_cannot_listen_says_so(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(launch.ServiceError, match="the echo did not start: no port from %d" % port):
            launch.ensure(spec(launch, port_range=(port, port)))
    assert launch.services() == []


@pytest.mark.slow
def test_a_service_that_is_too_slow_is_given_up_and_ended(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.hostside, "START_S", 1.0)
    with pytest.raises(launch.ServiceError, match="not ready within 1 s"):
        launch.ensure(spec(launch, "--delay", "600", "--child", str(tmp_path / "child")))
    assert dead(launch, int((tmp_path / "child").read_text())) and launch.services() == []


def starter(checkout, tmp_path):
    """A process that is in the middle of starting a slow service, and the numbers of the service and its child."""
    child = tmp_path / "child"
    code = RACER.replace('"--delay", "0.1"', '"--delay", "1", "--child", %r' % str(child))
    process = subprocess.Popen([sys.executable, "-c", code, str(checkout), PACKAGE, "echo-test"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    end = time.monotonic() + 20
    while not (child.exists() and child.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return process, int(child.read_text())


def test_an_interrupted_start_leaves_nothing_running(launch, checkout, tmp_path, home):
    process, child = starter(checkout, tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert dead(launch, child) and [name.rpartition(".")[2] for name in run_files(home)] == ["log"]


@pytest.mark.slow
def test_what_a_killed_starter_was_starting_is_found_by_the_next_one(launch, checkout, tmp_path):
    process, child = starter(checkout, tmp_path)
    (record,) = launch.services()
    process.kill()
    process.communicate()
    connection = launch.ensure(launch.ServiceSpec("echo", "echo-test", ("--delay", "1", "--child", str(tmp_path / "child"))))
    assert connection.pid == record["pid"] and not connection.started


def test_a_starter_that_dies_before_it_gave_the_secret_leaves_nothing_running(launch, tmp_path, home):
    start = launch.hostside.Start(launch.hostside.run_folder(), launch._request(spec(launch), b"x" * 32))
    code = textwrap.dedent("""
        import importlib, json, os, sys
        sys.path.insert(0, sys.argv[1])
        hostside = importlib.import_module(sys.argv[2] + ".hostside")
        hostside._write_record = lambda run, name, record: (print(record["pid"], flush=True), os._exit(0))
        hostside.Start(hostside.run_folder(), json.loads(sys.argv[3])).begin()
        """)
    out = subprocess.run([sys.executable, "-c", code, sys.path[0], PACKAGE, json.dumps(start.request)], stdout=subprocess.PIPE)
    assert dead(launch, int(out.stdout))


def test_a_long_path_gets_its_socket_in_a_short_private_folder(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("SEAMLESS_HOME", str(tmp_path / ("x" * 90)))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/seamless-test-%d" % os.getpid())
    os.mkdir(os.environ["XDG_RUNTIME_DIR"], 0o700)
    try:
        connection = launch.ensure(spec(launch))
        assert connection.address.startswith("unix://" + os.environ["XDG_RUNTIME_DIR"] + "/seamless/")
        assert info(launch, connection)["pid"] == connection.pid
        assert launch.stop("echo-test") and os.listdir(os.environ["XDG_RUNTIME_DIR"] + "/seamless") == []
    finally:
        shutil.rmtree(os.environ["XDG_RUNTIME_DIR"])


def test_a_run_folder_that_is_open_is_closed_and_one_of_somebody_else_refused(launch, home):
    run = home / ".seamless" / "run"
    run.mkdir(parents=True)
    run.chmod(0o777)
    launch.services()
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    if os.geteuid() == 0:
        os.chown(run, 12345, -1)
        with pytest.raises(launch.ServiceError, match="not a folder of yours"):
            launch.ensure(spec(launch))
        os.chown(run, 0, -1)


def test_a_module_that_is_needed_and_missing_is_one_sentence_that_names_the_extra(launch):
    with pytest.raises(launch.ConfigurationError, match=r"the echo needs no_such_module, .* pip install 'seamless_lite\[dask\]', or name"):
        launch.ensure(spec(launch, needs=("json", "no_such_module")))
    assert launch.ensure(spec(launch, needs=("json",))).started


def test_without_a_tunnel_a_service_needs_a_port_that_others_see(launch):
    place = launch.Place(ssh="nowhere.example", hostname="its.name", tunnel=False)
    for fields in ({}, {"port_range": (20000, 40000)}, {"port_range": (20000, 40000), "network_interface": "127.0.0.1"}):
        with pytest.raises(launch.ConfigurationError, match="the echo on its.name cannot be reached without a tunnel"):
            launch.ensure(spec(launch, place=place, **fields))


def test_a_port_that_is_wanted_and_free_is_taken(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.hostside._ports(None, (port, port + 5), port) == ["--port-range", str(port), str(port + 5)]
    assert launch.hostside._ports("127.0.0.1", (port, port + 5), port) == ["--port", str(port)]
    assert launch.hostside._ports(None, (port + 1, port + 5), port) == ["--port-range", str(port + 1), str(port + 5)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with nothing in it; its bin folder."""
    folder = tmp_path_factory.mktemp("its environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return folder / "bin"


def test_a_python_that_is_named_is_used_on_this_machine(launch, environment, home):
    place = launch.Place(python=str(environment / "python3"))
    first, second = launch.ensure(spec(launch, "a", place=place)), launch.ensure(spec(launch, "a", place=place))
    assert first.started and not second.started and (first.pid, first.address, first.secret) == (second.pid, second.address, second.secret)
    assert launch.ensure(spec(launch, "a")).pid != first.pid
    known = info(launch, first)
    (folder,) = (path for path in (home / ".seamless" / "dist").iterdir() if path.is_dir())
    assert str(folder) in known["path"] and any(path.startswith(str(environment.parent)) for path in known["path"])
    assert first.mend is None and first.forward("tls://1.2.3.4:5") == "tls://1.2.3.4:5"
    assert "uses Python %s" % (environment / "python3") in launch.logs(first.name)


def test_a_python_that_is_named_and_missing_or_too_little_is_one_sentence(launch, environment):
    with pytest.raises(launch.ServiceError, match="'python: /no/python': there is no such interpreter on .*: /no/python does not exist"):
        launch.ensure(spec(launch, place=launch.Place(python="/no/python")))
    with pytest.raises(launch.ServiceError, match=r"python3 .* is without no_such_module"):
        launch.ensure(spec(launch, needs=("no_such_module",), place=launch.Place(python=str(environment / "python3"))))
    with pytest.raises(launch.ServiceError, match="conda environment nosuchenvironment"):
        launch.ensure(spec(launch, place=launch.Place(conda="nosuchenvironment")))


def test_services_of_two_pythons_are_started_together_and_come_back_in_order(launch, environment):
    place = launch.Place(python=str(environment / "python3"))
    found = launch.ensure_all([spec(launch, key="echo-%d" % n, place=place if n % 2 else launch.HERE) for n in range(4)])
    assert [connection.key for connection in found] == ["echo-%d" % n for n in range(4)]
    assert [connection.place == place for connection in found] == [False, True, False, True]
    assert [record["key"] for record in launch.far(place, "services")] == ["echo-%d" % n for n in range(4)]
    with pytest.raises(launch.ServiceError, match="exit code 7"):
        launch.ensure_all([spec(launch), spec(launch, "--die", place=place)])


def test_a_private_service_ends_with_its_owner_or_when_it_is_closed(launch, checkout, home):
    private = launch.Private(spec(launch, "mine"))
    assert info(launch, private.connection)["words"] == ["mine"]
    private.close()
    private.close()
    assert dead(launch, private.connection.pid) and run_files(home) == []
    code = RACER.replace("launch.ensure_all([", "p = launch.Private(").replace("for key in sys.argv[3:]])", ")").replace(
        ", key,", ", 'echo-private',").replace("print(json.dumps([[c.key, c.pid, c.started] for c in found]))",
                                               "print(p.connection.pid, flush=True); import os; os._exit(9)")
    racer = subprocess.run([sys.executable, "-c", code, str(checkout), PACKAGE], input=b"go\n", stdout=subprocess.PIPE)
    assert dead(launch, int(racer.stdout.split()[1])) and launch.services() == []


def test_a_private_service_that_does_not_start_leaves_nothing(launch, home):
    with pytest.raises(launch.ServiceError, match="last words"):
        launch.Private(spec(launch, "--die"))
    assert launch.services() == []


def test_old_logs_are_removed(launch, home):
    launch.ensure(spec(launch))
    launch.stop("echo-test")
    (log,) = (home / ".seamless" / "run").glob("*.log")
    launch.services()
    assert log.exists()
    os.utime(log, (time.time() - 8 * 86400,) * 2)
    launch.services()
    assert not log.exists()


def test_what_cannot_be_reached_without_a_tunnel_names_the_cure(launch, home):
    place = launch.Place(ssh="far", hostname="127.0.0.1", tunnel=False)
    with pytest.raises(launch.ServiceError, match="firewall is in between: remove 'tunnel: false'"):
        launch._reach(spec(launch, place=place), {"name": "echo-1", "port": 1, "pid": 1, "started": False}, b"secret")


@pytest.mark.parametrize("error, told", [("it died", "on n1, it died"), ("/x cannot be written on n1 (full)",) * 2])
def test_an_error_names_its_host_once(launch, error, told):
    with pytest.raises(launch.ServiceError) as caught:
        launch._records({"node": "n1", "records": [{"error": error}]}, launch.Place(ssh="far"))
    assert str(caught.value) == told and caught.value.final
