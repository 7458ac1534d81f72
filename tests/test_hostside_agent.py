"""The program that runs on other hosts, as they run it: from its source on the oldest Python there is, talked to through pipes."""
import functools
import glob
import hashlib
import io
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
import zlib

import pytest

from seamless_lite import hostagent, hostside, hostsource, shipping
from seamless_lite.launch import PROTOCOL

SERVICE = textwrap.dedent("""
    import json, os, sys
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import socket
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    secret = sys.stdin.readline()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(arguments["--socket"])
        sock.listen(5)
        with open(arguments["--status-file"]) as file:
            record = json.load(file)
        record.update(status="running", words=sys.argv, environment=dict(os.environ), secret=secret)
        with open(arguments["--status-file"] + "~", "w") as file:
            json.dump(record, file)
        os.rename(arguments["--status-file"] + "~", arguments["--status-file"])
        while True:
            connection = sock.accept()[0]
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
            connection.close()
    """)


@functools.lru_cache(maxsize=1)
def oldest():
    """The oldest interpreter from 3.6 on that this machine has."""
    folders = os.environ["PATH"].split(os.pathsep) + ["/usr/bin", "/usr/local/bin"]
    folders += glob.glob(os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".pyenv/versions/3.*/bin"))
    found = {}
    for path in (os.path.join(folder, "python3.%d" % minor) for minor in range(6, 14) for folder in folders):
        if os.access(path, os.X_OK) and not found:
            done = subprocess.run([path, "-c", "import sys; print(sys.executable)"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found = done.stdout.decode().strip() if done.returncode == 0 else {}
    return found or sys.executable


class Talk:
    """A conversation with the agent in a process of its own."""

    def __init__(self, home, python=None, **env):
        variables = {"HOME": str(home), "PATH": os.environ["PATH"], **env}
        loader = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))"
        self.process = subprocess.Popen([python or oldest(), "-ISc", loader], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, cwd="/")
        source = shipping.agent().encode()
        self.process.stdin.write(b"%d\n%s" % (len(source), source))

    def send(self, request, data=b""):
        self.process.stdin.write(json.dumps(dict(request, bytes=len(data)) if data else request).encode() + b"\n" + data)
        self.process.stdin.flush()

    def hear(self):
        for line in self.process.stdout:
            if line.startswith(hostside.MARKER.encode()):
                return json.loads(line[len(hostside.MARKER):])
        return None

    def ask(self, action, payload=b"", **arguments):
        self.send({"action": action, **arguments}, payload)
        answer = self.hear()
        return answer["ok"] if "ok" in answer else answer["error"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(20) is not None


@pytest.fixture
def host(tmp_path):
    """The home folder of a host; what runs there is killed at the end."""
    home = tmp_path / "its home"
    home.mkdir()
    yield home
    run = home / ".seamless" / "run"
    for path in run.glob("*.json") if run.exists() else ():
        record = json.loads(path.read_text())
        if record["node"] == os.uname().nodename and hostside.alive(record):
            os.killpg(record["pid"], signal.SIGKILL)


def a_source(**files):
    """(SHA-256, compressed zip) of a package with a service called echo."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in {"pkg/__init__.py": "", "pkg/echo.py": SERVICE, **files}.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)
    return hashlib.sha256(stream.getvalue()).hexdigest(), zlib.compress(stream.getvalue())


def wish(key="echo-x", **fields):
    return {"service": "echo", "key": key, "args": [], "parameters": {}, "network_interface": None, "port_range": None, "auth": True,
            "idle_timeout_s": 60, "protocol": PROTOCOL, "python": sys.executable, **fields}


def ensure(talk, dist, *wishes):
    return talk.ask("ensure", dist=dist, package="pkg", requests=list(wishes))


def test_a_fresh_host_takes_the_source_and_starts_the_service_in_one_conversation(host):
    dist, data = a_source()
    with Talk(host, SSH_CONNECTION="1.2.3.4") as talk:
        assert ensure(talk, dist, wish()) == {"missing": dist}
        assert talk.ask("receive", data, dist=dist) == {"folder": str(host / ".seamless/dist" / dist)}
        answer = ensure(talk, dist, wish())
    (record,) = answer["records"]
    assert record["started"] and record["status"] == "running" and record["dist"] == dist
    assert record["secret"].strip() == answer["secret"] == (host / ".seamless/secret").read_text().strip()
    assert record["environment"]["PYTHONPATH"] == str(host / ".seamless/dist" / dist) and "SSH_CONNECTION" not in record["environment"]
    assert "uses Python %s" % sys.executable in answer["notes"][0]
    for path in (host / ".seamless", host / ".seamless/run", host / ".seamless/dist"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with Talk(host) as talk:                # the service has outlived the conversation
        (again,) = ensure(talk, dist, wish())["records"]
        assert (again["pid"], again["started"]) == (record["pid"], False)
        assert [record["key"] for record in talk.ask("services")] == ["echo-x"]
        assert "uses Python" in talk.ask("logs", which="echo-x") and talk.ask("logs", which="nothing") is None
        assert talk.ask("stop", which="echo-x") == [record["name"]] and talk.ask("services") == []


def test_versions_live_side_by_side(host):
    (old, old_data), (new, new_data) = a_source(), a_source(**{"pkg/more.py": ""})
    with Talk(host) as talk:
        talk.ask("receive", old_data, dist=old)
        talk.ask("receive", new_data, dist=new)
        first, second = (ensure(talk, dist, wish())["records"][0] for dist in (old, new))
        assert first["pid"] != second["pid"] and first["name"] != second["name"]
        assert [ensure(talk, dist, wish())["records"][0]["pid"] for dist in (old, new)] == [first["pid"], second["pid"]]


@pytest.mark.parametrize("change", [{"args": ["x", "y"]}, {"protocol": PROTOCOL + 1}, {"parameters": {"a": 1}}, {"auth": False}])
def test_whatever_matters_makes_another_service(host, change):
    dist, data = a_source()
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        one, two = ensure(talk, dist, wish(), wish(**change))["records"]
        assert one["pid"] != two["pid"] and one["name"] != two["name"]


def test_two_clients_at_once_end_with_one_source_and_one_service(host):
    dist, data = a_source()
    found, barrier = [], threading.Barrier(4)

    def client():
        with Talk(host) as talk:
            talk.ask("services")
            barrier.wait(20)
            assert ensure(talk, dist, wish()) == {"missing": dist}
            barrier.wait(20)
            talk.ask("receive", data, dist=dist)
            found.append(ensure(talk, dist, wish())["records"][0])
    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({record["pid"] for record in found}) == 1 and sum(record["started"] for record in found) == 1
    assert sorted(name for name in os.listdir(host / ".seamless/dist") if name != "pythons.json") == [dist]


def test_an_upload_that_is_cut_off_leaves_nothing(host):
    dist, data = a_source()
    talk = Talk(host)
    talk.process.stdin.write(json.dumps({"action": "receive", "dist": dist, "bytes": len(data)}).encode() + b"\n" + data[:-1])
    talk.process.stdin.close()
    assert talk.process.stdout.read().strip() == b"" and talk.process.wait(20) == 0
    talk.process.stdout.close()
    assert not (host / ".seamless/dist").exists()


def test_an_upload_that_was_changed_on_the_way_is_refused(host):
    dist, data = a_source()
    with Talk(host) as talk:
        for wrong in (data[:-30], b"y" + data[1:], zlib.compress(b"no zip")):
            assert "is not the one that was sent" in talk.ask("receive", wrong, dist=dist)
        garbage = zlib.compress(b"no zip")
        assert "cannot be unpacked" in talk.ask("receive", garbage, dist=hashlib.sha256(b"no zip").hexdigest())
        assert "does not name a source" in ensure(talk, "../../x", wish())
    assert os.listdir(host / ".seamless/dist") in ([], ["pythons.json"])


def test_a_source_that_lost_a_file_is_sent_again(host):
    dist, data = a_source()
    folder = host / ".seamless/dist" / dist
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        (folder / "pkg/echo.py").write_text("")
        assert ensure(talk, dist, wish()) == {"missing": dist}
        talk.ask("receive", data, dist=dist)
        assert (folder / "pkg/echo.py").read_text() == SERVICE and ensure(talk, dist, wish())["records"][0]["started"]
        (folder / "MANIFEST.json").unlink()
        assert ensure(talk, dist, wish()) == {"missing": dist}
    assert sorted(name for name in os.listdir(host / ".seamless/dist") if name != "pythons.json") == [dist]


def test_old_sources_and_what_killed_clients_left_are_removed_but_not_that_of_a_living_service(host):
    (old, old_data), (used, used_data), (new, new_data) = a_source(**{"pkg/a.py": "1"}), a_source(), a_source(**{"pkg/b.py": "2"})
    dist = host / ".seamless/dist"
    with Talk(host) as talk:
        for sha256, data in ((old, old_data), (used, used_data), (new, new_data)):
            talk.ask("receive", data, dist=sha256)
        ensure(talk, used, wish())
        leftover = dist / (".%s.1-abc" % old)
        leftover.mkdir()
        (dist / "something of the user").mkdir()
        for path in (dist / old, dist / used, leftover, dist / "something of the user"):
            os.utime(path, (time.time() - 40 * 86400,) * 2)
        ensure(talk, new, wish())
    assert {path.name for path in dist.iterdir()} == {used, new, "something of the user", "pythons.json"}


def test_a_service_that_does_not_start_is_one_sentence_and_the_others_run(host):
    dist, data = a_source(**{"pkg/dies.py": "import sys\nprint('last words', file=sys.stderr)\nsys.exit(7)\n"})
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        good, bad = ensure(talk, dist, wish(), wish(service="dies", key="dies-x"))["records"]
    assert good["started"] and "the dies did not start: it ended with exit code 7" in bad["error"] and bad["error"].endswith("last words")


def test_what_a_full_disk_cut_of_the_compiled_source_is_made_again(host):
    dist, data = a_source()
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        ensure(talk, dist, wish())
        talk.ask("stop", which="echo-x")
        (compiled,) = (host / ".seamless/dist" / dist / "pkg/__pycache__").glob("__init__*.pyc")
        os.truncate(str(compiled), 20)
        (record,) = ensure(talk, dist, wish())["records"]
    assert record["status"] == "running" and compiled.stat().st_size > 20


def test_nothing_is_started_on_a_disk_with_no_room(host, monkeypatch):
    monkeypatch.setenv("SEAMLESS_HOME", str(host))
    monkeypatch.setattr(hostside, "ROOM_BYTES", 1 << 80)
    (record,) = hostside.ensure([{"name": "x-12345678", "argv": ["/bin/false"], "args": [], "env": {}, "unset": [], "secret": "", "idle_timeout_s": 1,
                                  "record": {"service": "x"}}])
    assert "(No space left on device): make room there" in record["error"] and os.listdir(str(host / "run")) == []


@pytest.mark.slow
def test_what_it_does_not_understand_is_one_sentence(host):
    with Talk(host) as talk:
        assert talk.ask("dance") == "there is no action 'dance'"
        assert "not understood: TypeError" in talk.ask("stop") and ensure(talk, "0" * 64, {}) == {"missing": "0" * 64}
        dist, data = a_source()
        talk.ask("receive", data, dist=dist)
        assert "not understood: KeyError: 'service'" in ensure(talk, dist, {})
        assert talk.ask("services") == []
    for garbage in (b"hello\n", b"[]\n", b'{"action": "services", "bytes": -1}\n', b'{"action": "services", "bytes": "x"}\n', b"\xff\n"):
        with Talk(host) as talk:
            talk.process.stdin.write(garbage)
            talk.process.stdin.flush()
            assert "not understood" in talk.hear()["error"] and talk.hear() is None


def test_a_home_that_cannot_be_written_is_replaced_by_a_private_folder(host, tmp_path, monkeypatch):
    monkeypatch.setattr(hostsource, "_writable", lambda path, real=hostsource._writable: not path.startswith(str(host)) and real(path))
    monkeypatch.setenv("HOME", str(host))
    monkeypatch.delenv("SEAMLESS_HOME")
    path, note = hostsource.choose_home()
    assert path == "/tmp/seamless-%d" % os.geteuid() and stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert note.startswith("%s/.seamless cannot be written on " % host) and note.endswith("are kept in " + path)
    monkeypatch.setattr(hostsource, "_writable", lambda path: False)
    monkeypatch.setattr(hostside, "private_folder", lambda path: path)
    with pytest.raises(hostside.HostError, match="there is no place for our files on .*set SEAMLESS_HOME in your shell's start-up file"):
        hostsource.choose_home()


def test_a_full_disk_is_one_sentence_with_the_path_and_the_cure(host, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(hostside.HostError) as caught:
        hostagent.act(str(host / ".seamless"), {"action": "receive", "dist": a_source()[0]}, a_source()[1])
    text = str(caught.value)
    assert str(host) in text and "No space left on device" in text and "make room there, or set SEAMLESS_HOME" in text


def test_uninstall_stops_everything_and_leaves_only_what_is_the_users(host):
    dist, data = a_source()
    home = host / ".seamless"
    store = host / "store of mine"
    store.mkdir()
    (store / "buffer").write_bytes(b"x" * 1000)
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        (home / "clusters-data" / "project" / "ab").mkdir(parents=True)
        (home / "clusters-data" / "project" / "ab" / "result").write_bytes(b"y" * 500)
        (home / "clusters.yaml").write_text("")
        one, two = ensure(talk, dist, wish(), wish(key="hashserver-x", args=["--directory", str(store)]))["records"]
        done = talk.ask("uninstall")
        assert sorted(done["stopped"]) == sorted([one["name"], two["name"]]) and not hostside.alive(one) and not hostside.alive(two)
        assert [str(home / "clusters-data"), 500] in done["kept"] and done["left"] == ["clusters-data", "clusters.yaml"]
        assert sorted(os.listdir(home)) == done["left"] and (store / "buffer").exists()
        (home / "clusters.yaml").unlink()
        done = talk.ask("uninstall", data=True)
        assert done["kept"] == done["left"] == [] and not home.exists() and (store / "buffer").exists()


def test_uninstall_leaves_what_others_put_into_folders_that_are_called_like_ours(host):
    home = host / ".seamless"
    mine = [home / "run" / "thesis.txt", home / "dist" / "release-1.tar", home / "tmp" / "x", home / "cache" / "letters" / "a.txt"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (home / "run" / "old.log").write_text("ours")
    with Talk(host) as talk:
        talk.ask("uninstall", data=True)
    assert all(path.read_text() == "mine" for path in mine) and not (home / "run" / "old.log").exists()


def test_uninstall_does_not_pull_the_carpet_from_under_services_on_other_hosts_with_the_same_home(host):
    dist, data = a_source()
    with Talk(host) as talk:
        talk.ask("receive", data, dist=dist)
        (record,) = ensure(talk, dist, wish())["records"]
        path = host / ".seamless/run" / (record["name"] + ".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "node": "elsewhere"}))
        assert "services of yours run on elsewhere with the same home" in talk.ask("uninstall")
        assert (host / ".seamless/dist" / dist).exists()
        path.write_text(json.dumps({**json.loads(path.read_text()), "node": os.uname().nodename}))


@pytest.mark.slow
def test_a_client_that_is_killed_in_the_middle_of_a_start_leaves_a_service_with_a_record(host):
    dist, data = a_source(**{"pkg/slow.py": "import time\ntime.sleep(1)\n" + SERVICE})
    talk = Talk(host)
    talk.ask("receive", data, dist=dist)
    talk.send({"action": "ensure", "dist": dist, "package": "pkg", "requests": [wish(service="slow", key="slow-x")]})
    run, end = host / ".seamless/run", time.monotonic() + 20
    while not list(run.glob("*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    talk.process.kill()
    talk.process.communicate()
    (path,) = run.glob("*.json")
    pid = json.loads(path.read_text())["pid"]
    with Talk(host) as talk:
        (record,) = ensure(talk, dist, wish(service="slow", key="slow-x"))["records"]
    assert (record["pid"], record["started"]) == (pid, False)
