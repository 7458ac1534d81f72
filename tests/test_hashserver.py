"""The hashserver over HTTP: what Seamless 1.x and curl see, batches, and the program."""
import gzip
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite.checksum import Checksum
from seamless_lite.errors import CorruptBufferError, SeamlessError
from seamless_lite.folder import Folder
from seamless_lite.hashserver import HashserverClient, HashService, frame
from seamless_lite.httpbase import Listen, start

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = b"some content\n"
CS = Checksum.of(DATA)
OTHER = Checksum.of(b"other")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "store")


@pytest.fixture
def service(folder):
    return HashService(folder)


@pytest.fixture
def running(service):
    with start(service, Listen(host="127.0.0.1", port=0)) as running:
        yield running


@pytest.fixture
def ask(running):
    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        if isinstance(body, (list, dict)):
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body.encode() if isinstance(body, str) else body)
        answer = connection.getresponse()
        answer.data = answer.read()
        connection.close()
        return answer
    return ask


def stored(folder, suffix=""):
    return pathlib.Path(folder.directory) / CS[:2] / (CS + suffix)


def leftovers(folder):
    return [path.name for path in pathlib.Path(folder.directory).rglob("*") if CS + "-" in path.name or CS + "." in path.name]


# ---- one buffer

def test_a_buffer_is_put_and_got(ask):
    assert ask("GET", "/healthcheck").data == b"OK"
    answer = ask("GET", "/" + CS)
    assert (answer.status, answer.data) == (404, b"Not found")
    answer = ask("PUT", "/" + CS.upper(), DATA)
    assert (answer.status, answer.data) == (200, b"OK")
    answer = ask("PUT", "/" + CS, b"not looked at")
    assert (answer.status, answer.data) == (201, b"")
    answer = ask("GET", "/" + CS.upper())
    assert (answer.status, answer.data) == (200, DATA)
    assert answer.getheader("Content-Type") == "application/octet-stream"
    assert answer.getheader("Content-Disposition").startswith("attachment") and CS in answer.getheader("ETag")
    assert answer.getheader("Last-Modified").endswith("GMT") and answer.getheader("Content-Encoding") is None


def test_wrong_content_is_refused_and_leaves_nothing(ask, folder):
    answer = ask("PUT", "/" + CS, b"something else")
    assert (answer.status, answer.data) == (400, b"Incorrect checksum")
    assert ask("PUT", "/" + CS, b"rubbish", Content_Encoding="gzip").data == b"Invalid compressed payload"
    assert folder.has([CS]) == [False] and leftovers(folder) == []


def test_a_damaged_buffer_is_an_error_and_then_not_there(ask, folder):
    folder.put(DATA)
    os.chmod(stored(folder), 0o644)
    stored(folder).write_bytes(b"X" + DATA[1:])
    answer = ask("GET", "/" + CS)
    assert answer.status == 400 and json.loads(answer.data)["message"].startswith("File corruption")
    assert ask("GET", "/" + CS).status == 404
    assert ask("PUT", "/" + CS, DATA).status == 200


@pytest.mark.parametrize("method, path", [
    ("POST", "/" + CS), ("DELETE", "/" + CS), ("HEAD", "/" + CS), ("POST", "/has"), ("DELETE", "/put"),
    ("POST", "/nothing")])
def test_other_methods_are_not_allowed(ask, method, path):
    assert ask(method, path).status == 405


def test_other_paths_are_not_found(ask):
    for path in ("/", "/../etc/passwd", "/" + CS + "/x"):
        answer = ask("GET", path)
        assert (answer.status, json.loads(answer.data)) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("method, path, said", [
    ("GET", "/nothing", "Wrong length"), ("GET", "/" + CS + "0", "Wrong length"), ("PUT", "/has", "Wrong length"),
    ("PUT", "/promise/x", "Wrong length"), ("GET", "/g" + CS[1:], "non-hexadecimal number found in fromhex() arg at position 0")])
def test_a_name_that_is_no_checksum_is_invalid(ask, method, path, said):
    answer = ask(method, path)
    assert (answer.status, json.loads(answer.data)) == (400, {"message": "Invalid data", "exception": {
        "type": "value_error", "loc": ["path", "checksum"], "msg": "Value error, " + said, "input": path.split("/")[-1]}})


@pytest.mark.parametrize("wanted, status, content", [
    ("bytes=0-3", 206, DATA[:4]), ("bytes=5-", 206, DATA[5:]), ("bytes=-4", 206, DATA[-4:]), ("bytes=3-1000", 206, DATA[3:]),
    ("bytes=-1000", 206, DATA), ("bytes=100-", 416, None), ("bytes=0-1,3-4", 200, DATA), ("lines=1-2", 200, DATA)])
def test_a_range_of_bytes_can_be_asked_for(ask, folder, wanted, status, content):
    folder.put(DATA)
    answer = ask("GET", "/" + CS, Range=wanted)
    assert answer.status == status
    if status == 206:
        first = DATA.index(content)
        assert answer.getheader("Content-Range") == "bytes %d-%d/%d" % (first, first + len(content) - 1, len(DATA))
    if content is not None:
        assert answer.data == content


# ---- compression

def zstd(data):
    if shutil.which("zstd") is None:
        pytest.skip("no program zstd")
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("coding, suffix, compress", [("gzip", ".gz", gzip.compress), ("zstd", ".zst", zstd)])
def test_a_compressed_upload_is_stored_and_served_as_it_is(ask, folder, coding, suffix, compress):
    packed = compress(DATA)
    assert ask("PUT", "/" + CS, packed, Content_Encoding=coding).status == 200
    assert stored(folder, suffix).read_bytes() == packed and not stored(folder).exists()
    assert json.loads(ask("GET", "/buffer-length", [CS]).data) == [len(DATA)]
    answer = ask("GET", "/" + CS, Accept_Encoding="gzip, deflate, zstd")
    assert (answer.getheader("Content-Encoding"), answer.data) == (coding, packed)
    for accepted in ({}, {"Accept_Encoding": "identity"}, {"Accept_Encoding": "br"}, {"Accept_Encoding": coding + ";q=0"}):
        answer = ask("GET", "/" + CS, **accepted)
        assert (answer.getheader("Content-Encoding"), answer.data) == (None, DATA)
    answer = ask("GET", "/" + CS, Accept_Encoding=coding, Range="bytes=0-3")
    assert (answer.status, answer.data) == (206, DATA[:4])


def test_the_preferred_form_is_served(ask, folder):
    folder.put(DATA)
    stored(folder, ".gz").write_bytes(gzip.compress(DATA))
    stored(folder, ".zst").write_bytes(zstd(DATA))
    codings = {"zstd;q=0.5, gzip;q=0.9": "gzip", "zstd, gzip": "zstd", "gzip;q=0.2, identity;q=0.3": None, "br": None, "*": None}
    for accepted, coding in codings.items():
        assert ask("GET", "/" + CS, Accept_Encoding=accepted).getheader("Content-Encoding") == coding


def test_an_unknown_content_encoding_is_ignored(ask, folder):
    assert ask("PUT", "/" + CS, DATA, Content_Encoding="br").status == 200
    assert folder.get(CS) == DATA


# ---- lists and promises

def test_lists_are_answered_in_order(ask, folder):
    folder.put_many([DATA, b""])
    empty = Checksum.of(b"")
    asked = [CS.upper(), OTHER, empty]
    assert json.loads(ask("GET", "/has", asked).data) == [True, False, True]
    assert json.loads(ask("GET", "/has-now", asked).data) == [True, False, True]
    assert json.loads(ask("GET", "/buffer-length", asked).data) == [len(DATA), 0, 0]
    assert json.loads(ask("GET", "/has", []).data) == []


@pytest.mark.parametrize("body", ["[", {"a": 1}, ["abc"], [1], None, "[" * 10000])
def test_an_invalid_list_is_a_400(ask, body):
    for path in ("/has", "/has-now", "/buffer-length"):
        assert ask("GET", path, body).status == 400
    if isinstance(body, list):
        assert set(json.loads(ask("GET", "/has", body).data)["exception"]) == {"type", "loc", "msg", "input"}


def test_a_promise_counts_until_it_is_kept(ask):
    answer = ask("PUT", "/promise/" + CS)
    assert (answer.status, json.loads(answer.data)) == (202, {"checksum": CS, "expires_in": 600.0})
    assert json.loads(ask("GET", "/has", [CS, OTHER]).data) == [True, False]
    assert json.loads(ask("GET", "/has-now", [CS]).data) == [False]
    assert json.loads(ask("GET", "/buffer-length", [CS]).data) == [True]
    got = []
    reader = threading.Thread(target=lambda: got.append(ask("GET", "/" + CS).data))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    ask("PUT", "/" + CS, DATA)
    reader.join(10)
    assert got == [DATA]


def test_a_promise_expires(ask, service, monkeypatch):
    monkeypatch.setattr("seamless_lite.hashserver.PROMISE_S", 0.1)
    for checksum in (OTHER, CS):
        ask("PUT", "/promise/" + checksum)
    assert ask("GET", "/" + CS).status == 404
    assert json.loads(ask("GET", "/has", [CS]).data) == [False]
    ask("PUT", "/promise/" + CS)
    assert list(service._promises) == [CS]


def test_the_second_of_two_uploads_is_told_so_and_readers_wait(ask, running, folder):
    slow = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    slow.putrequest("PUT", "/" + CS)
    slow.putheader("Content-Length", str(len(DATA)))
    slow.endheaders(DATA[:5])
    deadline = time.monotonic() + 10
    while json.loads(ask("GET", "/has-now", [CS]).data) != [True]:
        assert time.monotonic() < deadline
    assert ask("PUT", "/" + CS, DATA).status == 202
    got = []
    readers = [threading.Thread(target=lambda: got.append(ask("GET", "/" + CS).data)),
               threading.Thread(target=lambda: got.append(ask("GET", "/buffer-length", [CS]).data))]
    for reader in readers:
        reader.start()
    readers[0].join(0.2)
    assert got == []
    slow.send(DATA[5:])
    assert slow.getresponse().status == 200
    for reader in readers:
        reader.join(10)
    assert sorted(got) == sorted([DATA, b"[%d]" % len(DATA)])
    slow.close()


def test_an_upload_that_is_cut_leaves_nothing(ask, running, folder):
    cut = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    cut.putrequest("PUT", "/" + CS)
    cut.putheader("Content-Length", str(len(DATA)))
    cut.endheaders(DATA[:5])
    deadline = time.monotonic() + 10
    while not leftovers(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cut.sock.close()
    while running.service._uploads or leftovers(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask("GET", "/" + CS).status == 404
    assert ask("PUT", "/" + CS, DATA).status == 200


def test_a_server_for_reading_only_refuses_to_write(folder, tmp_path):
    folder.put(DATA)
    service = HashService(Folder(folder.directory, writable=False))
    with start(service, Listen(socket_path=str(tmp_path / "s"))) as running:
        client = HashserverClient(running.address)
        for write in (lambda: client.put(b"new"), lambda: client.put_many([b"new", b"newer"])):
            with pytest.raises(SeamlessError, match="for reading only: start it with --writable"):
                write()
        assert client.request("PUT", "/promise/" + CS).status == 404
        assert client.request("PUT", "/nothing").status == 405
        assert client.get(CS) == DATA


# ---- batches

def test_a_batch_is_verified_before_anything_is_stored(ask, folder):
    answer = ask("POST", "/put", frame(OTHER, b"other") + frame(CS, b"wrong"))
    assert answer.status == 400 and CS.encode() in answer.data
    assert folder.has([CS, OTHER]) == [False, False]
    for body in (b"rubbish", frame(CS, DATA)[:-1], CS.encode() + b" 99999999999\n"):
        assert ask("POST", "/put", body).status == 400
    assert json.loads(ask("POST", "/put", frame(OTHER, b"other") + frame(CS, DATA)).data) == {"stored": 2}
    assert [folder.get(CS), folder.get(OTHER)] == [DATA, b"other"]


def test_the_client_speaks_with_a_server_that_has_no_batches(folder, tmp_path):
    service = HashService(folder)
    service.routes = [route for route in service.routes if route[0] != "POST"]
    with start(service, Listen(socket_path=str(tmp_path / "s"))) as running:
        client = HashserverClient(running.address)
        assert client.put_many([DATA, b"other"]) == [CS, OTHER]
        assert [client.get(CS), client.get(OTHER), client.get("0" * 64)] == [DATA, b"other", None]


def test_the_client_does_not_take_another_content(folder, tmp_path):
    class Liar(HashService):
        def get(self, request, name):
            return b"something else"
    with start(Liar(folder), Listen(socket_path=str(tmp_path / "s"))) as running:
        client = HashserverClient(running.address)
        for read in (client.get, client.open):
            with pytest.raises(CorruptBufferError, match="sent something else"):
                read(CS)


def test_the_client_treats_a_damaged_buffer_as_not_there(folder, tmp_path, caplog):
    folder.put(DATA)
    with start(HashService(Folder(folder.directory, writable=False)), Listen(socket_path=str(tmp_path / "s"))) as running:
        os.chmod(stored(folder), 0o644)
        stored(folder).write_bytes(b"X" + DATA[1:])
        client = HashserverClient(running.address)
        assert client.get(CS) is None and client.open(CS) is None
    assert "damaged buffer" in caplog.text


# ---- the program

@pytest.fixture
def program(tmp_path):
    children = []

    def run(*args, command=(sys.executable, "-m", "seamless_lite.hashserver"), **options):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        children.append(subprocess.Popen([*command, *map(str, args)], env=env, stderr=subprocess.PIPE, **options))
        return children[-1]
    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


def await_status(path):
    deadline = time.monotonic() + 20
    while json.loads(path.read_text()).get("status") != "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return json.loads(path.read_text())


def test_the_program_runs_through_a_symlink_and_serves_curl(program, tmp_path):
    link = tmp_path / "hs"
    link.symlink_to(ROOT / "bin" / "seamless-hashserver")
    status = tmp_path / "status.json"
    status.write_text('{"mine": 1}')
    child = program(tmp_path / "store", "--writable", "--auth", "none", "--status-file", status, "--layout", "flat",
                    command=(sys.executable, str(link)), cwd=tmp_path)
    found = await_status(status)
    assert found["mine"] == 1
    if shutil.which("curl"):
        url = "http://127.0.0.1:%d/%s" % (found["port"], CS)
        (tmp_path / "data").write_bytes(DATA)
        subprocess.run(["curl", "-sf", "-T", str(tmp_path / "data"), url], check=True)
        assert subprocess.run(["curl", "-sf", url], stdout=subprocess.PIPE, check=True).stdout == DATA
        assert (tmp_path / "store" / CS).read_bytes() == DATA
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 0


def test_the_program_needs_a_folder_unless_it_may_write(program, tmp_path):
    child = program(tmp_path / "nothing", "--auth", "none")
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 1 and b"does not exist" in errors and b"Traceback" not in errors


def test_extra_folders_are_served(program, tmp_path):
    Folder(tmp_path / "one").put(DATA)
    Folder(tmp_path / "two").put(b"other")
    program(tmp_path / "three", "--writable", "--socket", tmp_path / "s", "--auth", "none",
            "--extra-dirs", "%s;%s" % (tmp_path / "one", tmp_path / "two"))
    client = HashserverClient("unix://%s" % (tmp_path / "s"))
    deadline = time.monotonic() + 20
    while not os.path.exists(tmp_path / "s"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [client.get(CS), client.get(OTHER)] == [DATA, b"other"]
    client.close()


def test_old_temporary_files_go_when_a_writable_server_starts(program, tmp_path):
    Folder(tmp_path / "store").put(DATA)
    old = tmp_path / "store" / CS[:2] / (CS + "-0123abcd")
    old.write_bytes(b"")
    os.utime(old, (1, 1))
    program(tmp_path / "store", "--writable", "--socket", tmp_path / "s", "--auth", "none")
    deadline = time.monotonic() + 20
    while old.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_gigabyte_goes_through_little_memory(program, tmp_path):
    source = tmp_path / "big"
    with open(source, "wb") as file:
        for i in range(1024):
            file.write(b"%08d" % i * (1 << 17))
    checksum = Checksum.of_file(source)
    child = program(tmp_path / "store", "--writable", "--socket", tmp_path / "s", "--auth", "none")
    client = HashserverClient("unix://%s" % (tmp_path / "s"))
    deadline = time.monotonic() + 20
    while not os.path.exists(tmp_path / "s"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.put_file(source, checksum)
    with client.open(checksum) as file:
        assert file.seek(0, os.SEEK_END) == 1 << 30
    with open("/proc/%d/status" % child.pid) as status:
        [peak] = [line for line in status if line.startswith("VmHWM")]
    assert int(peak.split()[1]) < 64 << 10
    client.close()
