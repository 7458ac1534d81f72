"""httpwire, httpmessage, httpbase, httpclient, signing: real servers, real sockets, broken on purpose."""
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from seamless_lite import httpbase, signing
from seamless_lite.errors import (CacheMissError, ConfigurationError, CorruptBufferError, DeadlineError, JobError,
                                  SeamlessError, ServiceError)
from seamless_lite.httpbase import HttpError, Listen, Reply, Service, start
from seamless_lite.httpclient import HttpClient

SECRET = bytes(range(32))
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Probe(Service):
    """A service with a route for each thing that can be tried."""
    name = "probe"

    def __init__(self, folder):
        super().__init__()
        self.folder, self.calls, self.closed, self.working = str(folder), [], 0, False
        self.release, self.entered = threading.Event(), threading.Event()
        self.routes = [("POST", re.compile("/echo"), self.echo), ("GET", re.compile("/echo"), self.echo),
                       ("POST", re.compile("/small"), lambda request: request.read(100)),
                       ("PUT", re.compile("/digest/([a-z]+)"), self.digest),
                       ("GET", re.compile("/file/([^:]*):?(.*)"), self.file),
                       ("GET", re.compile("/raise/(.*)"), self.fail),
                       ("POST", re.compile("/ignore"), lambda request: None),
                       ("POST", re.compile("/wait"), self.wait)]

    def busy(self):
        return self.working

    def close(self):
        self.closed += 1

    def echo(self, request):
        value = request.json()
        self.calls.append(request.path)
        return value

    def digest(self, request, word):
        found = hashlib.sha256()
        for piece in request.stream(1 << 16):
            found.update(piece)
        self.calls.append(word)
        return {"digest": found.hexdigest(), "declared": request.digest, "length": request.length}

    def file(self, request, name, n):
        path = os.path.join(self.folder, name)
        return Reply(gzip.open(path) if name.endswith(".gz") else open(path, "rb"), length=int(n) if n else None)

    def fail(self, request, how):
        raise {"miss": CacheMissError("no such buffer"), "job": JobError("it failed", traceback="line 1", returncode=3),
               "text": HttpError(404, "", "ERROR: Unknown key"), "plain": HttpError(409, "another one"),
               "bug": KeyError("x")}[how]

    def wait(self, request):
        self.entered.set()
        assert self.release.wait(20)
        return "released"


@contextlib.contextmanager
def probe_at(listen, folder, secret=SECRET):
    service = Probe(folder)
    with start(service, listen, secret=secret) as running:
        client = HttpClient(running.address, secret)
        try:
            yield service, running, client
        finally:
            service.release.set()
            client.close()


@pytest.fixture(params=["unix", "tcp", "unix-open", "tcp-open"])
def probe(request, tmp_path):
    listen = Listen(socket_path=str(tmp_path / "s")) if request.param.startswith("unix") else Listen(host="127.0.0.1", port=0)
    with probe_at(listen, tmp_path, None if request.param.endswith("open") else SECRET) as found:
        yield found


@pytest.fixture
def signed(tmp_path):
    with probe_at(Listen(host="127.0.0.1", port=0), tmp_path) as found:
        yield found


@pytest.fixture
def unsigned(tmp_path):
    with probe_at(Listen(host="127.0.0.1", port=0), tmp_path, None) as found:
        yield found


def connect(running):
    sock = socket.create_connection(("127.0.0.1", running.port))
    sock.settimeout(20)
    return sock


def talk(running, data, shut=False):
    """Send ``data`` and return everything that comes back until the connection closes."""
    with connect(running) as sock:
        sock.sendall(data)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


# --- requests and answers ---------------------------------------------------------------------------------

def test_json_goes_there_and_back(probe):
    service, running, client = probe
    for value in ({"a": [1, None, "é"]}, [], "text", 0, {}):
        assert client.request("POST", "/echo", json=value).json() == value if isinstance(value, (dict, list)) else True
    assert client.request("GET", "/echo", json=[1]).json() == [1]


def test_a_kept_connection_serves_many_requests(probe):
    service, running, client = probe
    client.request("POST", "/echo", json={})
    wire = client._local.wire
    for n in range(20):
        assert client.request("POST", "/echo", json={"n": n}).json() == {"n": n}
    client.request("GET", "/nothing")
    client.request("POST", "/ignore", body=b"x" * 300000)
    assert client._local.wire is wire and not wire.closed


def test_healthcheck_needs_no_signature_and_info_names_the_service(probe):
    service, running, client = probe
    assert HttpClient(running.address).request("GET", "/healthcheck").body == b"OK"
    assert client.request("GET", "/healthcheck").body == b"OK"
    info = client.request("GET", "/info").json()
    assert info["service"] == "probe" and info["pid"] == os.getpid() and info["protocol"] == signing.PROTOCOL


def test_uploads_stream_from_bytes_paths_and_files(probe, tmp_path):
    service, running, client = probe
    data = os.urandom(3_000_000)
    (tmp_path / "data").write_bytes(b"skipped" + data)
    (tmp_path / "exact").write_bytes(data)
    with open(tmp_path / "data", "rb") as file, open(tmp_path / "exact", "rb", buffering=0) as exact:
        file.read(7)
        answers = [client.request("PUT", "/digest/a", body=data), client.request("PUT", "/digest/a", file=exact),
                   client.request("PUT", "/digest/a", file=file),
                   client.request("PUT", "/digest/a", file=io.BytesIO(data), digest=hashlib.sha256(data).hexdigest())]
    for answer in answers:
        assert answer.json()["digest"] == hashlib.sha256(data).hexdigest() and answer.json()["length"] == len(data)


def test_files_are_sent_whole_in_part_and_decompressed(probe, tmp_path):
    service, running, client = probe
    data = os.urandom(2_500_000)
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(data)
    assert client.request("GET", "/file/plain").body == data
    assert client.request("GET", "/file/plain:1000").body == data[:1000]
    assert client.request("GET", "/file/empty").body == b""
    assert client.request("GET", "/file/x.gz").body == data
    target = io.BytesIO(b"before")
    target.seek(6)
    answer = client.request("GET", "/file/plain", into=target)
    assert answer.body == b"" and target.getvalue() == b"before" + data


@pytest.mark.slow
def test_a_file_that_is_shorter_than_promised_is_an_error_and_not_a_short_answer(probe, tmp_path):
    service, running, client = probe
    (tmp_path / "plain").write_bytes(b"1234")
    with pytest.raises(ServiceError):
        client.request("GET", "/file/plain:5")
    assert client.request("GET", "/file/plain:4").body == b"1234"


def test_errors_arrive_as_the_exceptions_they_were(probe):
    service, running, client = probe
    with pytest.raises(CacheMissError, match="no such buffer"):
        client.request("GET", "/raise/miss")
    with pytest.raises(JobError) as caught:
        client.request("GET", "/raise/job")
    assert (caught.value.traceback, caught.value.returncode) == ("line 1", 3)
    answer = client.request("GET", "/raise/text")
    assert (answer.status, answer.body) == (404, b"ERROR: Unknown key") and answer.headers["content-type"].startswith("text/plain")
    with pytest.raises(SeamlessError, match="another one"):
        client.request("GET", "/raise/plain")
    with pytest.raises(ServiceError, match="probe failed: KeyError"):
        client.request("GET", "/raise/bug")
    assert client.request("GET", "/healthcheck").status == 200
    with pytest.raises(ServiceError, match="answered 404: ERROR: Unknown key"):
        client.request("GET", "/raise/text").expect(200, 201)


def test_unknown_paths_and_methods_are_refused(probe):
    service, running, client = probe
    answer = client.request("GET", "/nothing")
    assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
    answer = client.request("DELETE", "/echo")
    assert (answer.status, answer.json(), answer.headers["allow"]) == (405, {"detail": "Method Not Allowed"}, "GET, POST")
    assert client.request("HEAD", "/echo").status == 405
    assert client.request("POST", "/healthcheck").status == 405


def test_ipv6_and_port_ranges_are_understood(tmp_path):
    with probe_at(Listen(host="127.0.0.1", port=0), tmp_path) as (_, running, _client):
        with pytest.raises(ServiceError, match="no port from"):
            start(Probe(tmp_path), Listen(host="127.0.0.1", port_range=(running.port, running.port)))
        with pytest.raises(ServiceError, match="port %d is not free" % running.port):
            start(Probe(tmp_path), Listen(host="127.0.0.1", port=running.port))
        first = running.port
    with probe_at(Listen(host="127.0.0.1", port_range=(first, min(first + 50, 65535))), tmp_path) as (_, running, client):
        assert first <= running.port <= first + 50 and client.request("GET", "/info").status == 200
    if os.path.exists("/proc/net/if_inet6"):
        with probe_at(Listen(host="::1", port=0), tmp_path) as (_, running, client):
            assert client.request("GET", "/info").status == 200


# --- signatures -------------------------------------------------------------------------------------------

def test_requests_without_or_with_a_wrong_signature_are_refused_before_any_work(signed):
    service, running, client = signed
    body = b'{"a": 1}'
    other, _ = signing.sign_request(b"y" * 32, "POST", "/echo", hashlib.sha256(body).hexdigest())
    elsewhere, _ = signing.sign_request(SECRET, "POST", "/small", hashlib.sha256(body).hexdigest())
    for header in (None, "Basic abc", "Seamless 1 2 3 4", other, elsewhere):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        connection.request("POST", "/echo", body, {"Authorization": header} if header else {})
        answer = connection.getresponse()
        assert answer.status == 401 and "sign" in json.loads(answer.read())["error"]["message"]
        connection.request("GET", "/healthcheck")       # the connection is in order
        assert connection.getresponse().read() == b"OK"
        connection.close()
    assert service.calls == []


def test_a_body_that_was_changed_on_the_way_is_refused(signed):
    service, running, client = signed
    header, _ = signing.sign_request(SECRET, "POST", "/echo", hashlib.sha256(b'{"a": 1}').hexdigest())
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("POST", "/echo", b'{"a": 2}', {"Authorization": header})
    answer = connection.getresponse()
    assert answer.status == 400 and "signed" in answer.read().decode() and service.calls == []
    connection.close()


def test_a_request_that_is_sent_twice_is_refused(signed):
    service, running, client = signed
    header, _ = signing.sign_request(SECRET, "POST", "/echo", hashlib.sha256(b"{}").hexdigest())
    data = b"POST /echo HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\nAuthorization: " + header.encode() + b"\r\n\r\n{}"
    assert talk(running, data).startswith(b"HTTP/1.1 200 ")
    second = talk(running, data)
    assert second.startswith(b"HTTP/1.1 401 ") and b"sent twice" in second
    assert service.calls == ["/echo"]


def test_a_client_with_another_clock_learns_the_time_and_repeats(signed, monkeypatch):
    service, running, client = signed
    real = time.time
    monkeypatch.setattr(signing.time, "time", lambda: real() - 5000)
    assert client.request("POST", "/echo", json={"a": 1}).json() == {"a": 1}
    assert abs(client._offset_s - 5000) < 5
    assert service.calls == ["/echo"]


def test_a_request_signed_before_the_server_started_is_late(signed):
    nonces = signing.NonceCache()
    assert nonces.in_window(nonces.now()) and not nonces.in_window(nonces.now() - 1)
    assert not nonces.in_window(nonces.now() + 2 * nonces.window_s)
    assert nonces.add("a") and not nonces.add("a")


def test_nonces_are_forgotten_only_when_they_are_too_late_anyway(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(signing.time, "monotonic", lambda: now[0])
    nonces = signing.NonceCache(window_s=10)
    assert nonces.add("a")
    for _ in range(4):
        now[0] += 5
        assert nonces.add(str(now[0]))
        assert not nonces.add("a")
    now[0] += 50
    assert nonces.add("b") and len(nonces._young) + len(nonces._old) == 1


def test_a_client_with_another_secret_is_told_the_cure(signed):
    service, running, client = signed
    with pytest.raises(ServiceError, match="does not accept our secret"):
        HttpClient(running.address, b"z" * 32).request("GET", "/info")


def test_a_client_with_a_secret_refuses_a_server_that_does_not_know_it(unsigned):
    service, running, client = unsigned
    with pytest.raises(ServiceError, match="without the signature"):
        HttpClient(running.address, SECRET).request("GET", "/info")


@pytest.mark.parametrize("what", ["body", "status", "nonce"])
def test_an_answer_that_was_changed_or_belongs_to_another_request_is_refused(what):
    """A man in the middle who knows no secret: it changes the body or the status, or answers with an earlier answer."""
    def answer(sock):
        head = sock.recv(65536).decode()
        nonce = re.search(r"Seamless \d+ (\w+)", head)[1] if what != "nonce" else "0" * 32
        signature = signing.sign_answer(SECRET, nonce, 200, hashlib.sha256(b"good").hexdigest())
        sock.sendall(b"HTTP/1.1 %d OK\r\nContent-Length: 4\r\nSeamless-Signature: %s\r\n\r\n%s"
                     % (201 if what == "status" else 200, signature.encode(), b"evil" if what == "body" else b"good"))
    with fake_server(answer) as address:
        with pytest.raises(CorruptBufferError if what == "body" else ServiceError):
            HttpClient(address, SECRET).request("GET", "/info")


def test_signed_errors_and_large_answers_are_checked_too(signed, tmp_path):
    service, running, client = signed
    assert client.request("GET", "/raise/text").signed and client.request("GET", "/nothing").signed
    digest = hashlib.sha256(b"x").hexdigest()
    assert client.request("PUT", "/digest/a", body=b"x").json()["declared"] == digest


def test_the_secret_is_made_once_private_and_read_back(home):
    path = home / ".seamless" / "secret"
    found = []
    threads = [threading.Thread(target=lambda: found.append(signing.load_secret())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8 and len(found[0]) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["secret"]


def test_a_secret_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    path = tmp_path / "secret"
    signing.load_secret(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="can be read by other users"):
        signing.load_secret(path)
    path.chmod(0o600)
    path.write_text("hello")
    with pytest.raises(ConfigurationError, match="holds no secret"):
        signing.load_secret(path)
    if os.geteuid() == 0:
        path.write_text("ab" * 32)
        os.chown(path, 12345, -1)
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            signing.load_secret(path)


# --- what other clients, and other things, send ---------------------------------------------------------------

@pytest.mark.parametrize("garbage", [
    b"hello\r\n\r\n", b"GET /echo\r\n\r\n", b"get /echo HTTP/1.1\r\n\r\n", b"GET /echo HTTP/2.0\r\n\r\n", b"\x16\x03\x01\x00\n\n",
    b"GET /echo HTTP/1.1\r\nno colon\r\n\r\n", b"GET /echo HTTP/1.1\r\n folded: 1\r\n\r\n", b"GET /echo HTTP/1.1\r\nbad name: 1\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST /echo HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
    b"GET /echo HTTP/1.1\r\n" + b"a: b\r\n" * 20000 + b"\r\n"])
def test_garbage_is_answered_with_400_and_the_server_lives_on(unsigned, garbage):
    service, running, client = unsigned
    answer = talk(running, garbage)
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert client.request("POST", "/echo", json=[1]).json() == [1]


def test_bodies_that_are_no_json_are_answered_with_400(unsigned):
    service, running, client = unsigned
    for body in (b"", b"{", b"\xff\xfe", b"[" * 200000):
        with pytest.raises(SeamlessError, match="not JSON"):
            client.request("POST", "/echo", body=body)
    assert client.request("POST", "/echo", json=[1]).json() == [1]


def test_chunked_requests_are_read(unsigned):
    service, running, client = unsigned
    data = os.urandom(200000)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("PUT", "/digest/a", iter([data[:7], data[7:100000], data[100000:]]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    answer = json.loads(connection.getresponse().read())
    assert answer == {"digest": hashlib.sha256(data).hexdigest(), "declared": None, "length": None}
    connection.close()
    answer = talk(running, b"POST /echo HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
                           b"2;name=value\r\n[1\r\n1\r\n]\r\n0\r\nTrailer: x\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n[1]")


def test_two_requests_at_once_are_answered_in_order(unsigned):
    service, running, client = unsigned
    one = b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\n%s\r\n[%d]"
    answer = talk(running, one % (b"", 1) + one % (b"Connection: close\r\n", 2))
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and answer.index(b"[1]") < answer.index(b"[2]")


def test_old_clients_get_their_connection_closed(unsigned):
    service, running, client = unsigned
    assert talk(running, b"GET /healthcheck HTTP/1.0\r\n\r\n").endswith(b"OK")
    assert talk(running, b"GET /healthcheck HTTP/1.1\nConnection: close\n\n").endswith(b"OK")


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(unsigned):
    service, running, client = unsigned
    with connect(running) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")
    assert talk(running, b"POST /nothing HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n").startswith(b"HTTP/1.1 404 ")


def test_a_body_that_is_too_long_is_answered_with_413(probe):
    service, running, client = probe
    assert client.request("POST", "/small", body=b"x" * 100).status == 200
    for length in (101, 5_000_000, 100_000_000):
        with pytest.raises(SeamlessError, match="longer than 100 bytes"):
            client.request("POST", "/small", body=b"x" * length)
    assert client.request("POST", "/small", body=b"x").body == b"x"


def test_a_client_that_goes_on_sending_after_the_refusal_can_still_read_it(unsigned):
    service, running, client = unsigned
    with connect(running) as sock:
        sock.sendall(b"POST /small HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 413"
        sock.sendall(b"x" * 20_000_000)


def test_a_chunked_body_that_is_too_long_is_answered_with_413(unsigned):
    service, running, client = unsigned
    answer = talk(running, b"POST /small HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"x" * 100 + b"\r\n"
                  + b"1\r\nx\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_upload_that_is_cut_off_changes_nothing_and_the_server_lives_on(unsigned):
    service, running, client = unsigned
    for data in (b"PUT /digest/cut HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc", b"PUT /digest/cut HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
                 b"PUT /digest/cut HTTP/1.1\r\nContent-Le"):
        assert talk(running, data, shut=True) == b""
    assert client.request("GET", "/healthcheck").status == 200 and service.calls == []


def test_a_client_that_is_slow_on_purpose_is_cut_off(unsigned, monkeypatch):
    service, running, client = unsigned
    monkeypatch.setattr(httpbase, "PAUSE_S", 0.2)
    assert talk(running, b"POST /echo HTTP/1.1\r\nContent-Length: 10\r\n\r\n{") == b""
    monkeypatch.setattr(httpbase, "KEEP_ALIVE_S", 0.2)
    assert talk(running, b"POST /echo HT") == b""
    assert talk(running, b"") == b""


def test_too_many_connections_get_a_clear_answer(probe):
    service, running, client = probe
    running._server._most = 2
    others = [HttpClient(running.address, client._secret) for _ in range(2)]
    for other in others:
        assert other.request("GET", "/info").status == 200
    with pytest.raises(ServiceError, match="too many connections"):
        client.request("GET", "/info")
    others[0].close()
    end = time.monotonic() + 20
    while len(running._server._connections) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert client.request("GET", "/info").status == 200
    others[1].close()


# --- the client -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def fake_server(*answers):
    """A server that handles one connection with each of the functions ``answers``, and then listens no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def run():
            for answer in answers:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(20)
                    answer(sock)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield "http://127.0.0.1:%d" % listener.getsockname()[1]
        thread.join(20)
        assert not thread.is_alive()


def respond(data, close=True):
    def answer(sock):
        sock.recv(65536)
        sock.sendall(data)
    return answer


OK = respond(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")


def test_a_connection_that_went_stale_is_replaced_silently():
    with fake_server(OK, OK, OK) as address:
        client = HttpClient(address)
        for _ in range(3):
            assert client.request("GET", "/").body == b"OK"


def test_a_broken_connection_is_tried_a_few_times_and_then_reported():
    calls = []
    with fake_server(*[lambda sock: calls.append(sock.recv(65536))] * 4) as address:
        with pytest.raises(ServiceError, match="broke off"):
            HttpClient(address).request("GET", "/x")
    assert len(calls) == 4


@pytest.mark.slow
def test_an_answer_that_ends_too_early_is_an_error():
    cut = respond(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    chunked = respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n")
    endless = respond(b"HTTP/1.1 200 OK\r\n\r\n12345")
    with fake_server(*[cut] * 4, *[chunked] * 4, endless) as address:
        for words in ("broke off", "broke off", "how long"):
            with pytest.raises(ServiceError, match=words):
                HttpClient(address).request("GET", "/")


def test_a_download_that_broke_off_starts_again_at_the_beginning_of_the_file():
    cut = respond(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
    whole = respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    with fake_server(cut, whole) as address:
        client, into = HttpClient(address), io.BytesIO()
        assert client.request("GET", "/", into=into).body == b"" and into.getvalue() == b"abc"


def test_something_that_is_no_http_server_is_named():
    with fake_server(respond(b"220 mail ESMTP\r\n\r\n"), respond(b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n")) as address:
        for _ in range(2):
            with pytest.raises(ServiceError, match="does not speak HTTP"):
                HttpClient(address).request("GET", "/")


def test_nothing_there_is_a_sentence_with_the_address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address in ("http://127.0.0.1:%d" % port, "unix://%s/none" % tmp_path):
        with pytest.raises(ServiceError, match="nothing answers at " + re.escape(address)):
            HttpClient(address).request("GET", "/")
    for address in ("ftp://x", "http://nohost", "127.0.0.1:80", ""):
        with pytest.raises(ServiceError, match="is not an address"):
            HttpClient(address)


@pytest.mark.slow
def test_a_service_that_does_not_answer_in_time_is_a_deadline_error(probe):
    service, running, client = probe
    with pytest.raises(DeadlineError, match="within 0.2 s"):
        client.request("POST", "/wait", timeout_s=0.2)
    silent = HttpClient(running.address, client._secret, read_timeout_s=0.2)
    with pytest.raises(DeadlineError):
        silent.request("POST", "/wait")
    service.release.set()
    assert client.request("POST", "/echo", json=[1], timeout_s=20).json() == [1]


def test_a_server_that_never_accepts_is_given_up(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        fillers = []
        try:
            while True:                             # until the backlog is full
                filler = socket.socket(socket.AF_UNIX)
                filler.setblocking(False)
                fillers.append(filler)
                filler.connect(path)
        except OSError:
            pass
        with pytest.raises(ServiceError, match="did not accept"):
            HttpClient("unix://" + path, connect_timeout_s=0.2).request("GET", "/")
        with pytest.raises(DeadlineError):
            HttpClient("unix://" + path).request("GET", "/", timeout_s=0.2)
        for filler in fillers:
            filler.close()


def test_closing_a_client_ends_the_waiting_of_its_threads(probe):
    service, running, client = probe
    found = []

    def wait():
        with pytest.raises(ServiceError) as caught:
            client.request("POST", "/wait")
        found.append(caught.value)
    thread = threading.Thread(target=wait)
    thread.start()
    assert service.entered.wait(20)
    client.close()
    thread.join(20)
    assert len(found) == 1 and client.request("POST", "/echo", json=[1]).json() == [1]


def test_many_threads_share_a_client(probe):
    service, running, client = probe
    found = []

    def work(k):
        for n in range(20):
            found.append(client.request("POST", "/echo", json=[k, n]).json() == [k, n])
    threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 320


def test_a_forked_child_opens_its_own_connection(probe):
    service, running, client = probe
    client.request("POST", "/echo", json=[])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if all(client.request("POST", "/echo", json=[n]).json() == [n] for n in range(20)) else 2
        finally:
            os._exit(code)
    for n in range(20):
        assert client.request("POST", "/echo", json=[-n]).json() == [-n]
    assert os.waitpid(pid, 0)[1] == 0


def test_a_server_that_stops_frees_its_threads_sockets_and_files(tmp_path):
    count = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    before, threads = count(), set(threading.enumerate())
    with probe_at(Listen(socket_path=str(tmp_path / "s")), tmp_path) as (service, running, client):
        client.request("POST", "/echo", json=[])
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
    assert service.closed == 1 and service.stopping.is_set() and not (tmp_path / "s").exists()
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert set(threading.enumerate()) <= threads and count() <= before


# --- the program ----------------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import argparse, os, re, sys
    from seamless_lite import httpbase
    class Small(httpbase.Service):
        name = "small"
        routes = [("POST", re.compile("/work"), lambda request: setattr(service, "left", request.json()) or "OK")]
        left = 0
        def busy(self):
            self.left = max(0, self.left - 1)
            return self.left > 0
        def close(self):
            print("closed", self.left, flush=True)
    parser = argparse.ArgumentParser()
    httpbase.service_arguments(parser)
    service = Small()
    sys.exit(httpbase.run_service(lambda args: service, parser.parse_args()))
    """)


@contextlib.contextmanager
def program(*args, secret=SECRET, **options):
    """The small service above as a process; its pipes are read at the end."""
    env = {**os.environ, "PYTHONPATH": ROOT}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=env, **options)
    try:
        if secret:
            process.stdin.write(secret.hex().encode() + b"\n")
            process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def await_running(path, process, status="running"):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            record = json.loads(path.read_text())
            if record.get("status") == status:
                return record
        if process.poll() is not None and status == "running":
            break
        time.sleep(0.01)
    pytest.fail("the service is not %s: %s" % (status, process.stderr.read() if process.poll() is not None else ""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_in_good_order(tmp_path, number):
    status = tmp_path / "status.json"
    status.write_text('{"status": "starting", "other": [1]}')
    with program("--status-file", status, "--socket", tmp_path / "s", "--secret-stdin") as process:
        record = await_running(status, process)
        assert record == {"status": "running", "other": [1], "socket": str(tmp_path / "s"), "pid": process.pid}
        assert HttpClient("unix://%s/s" % tmp_path, SECRET).request("GET", "/info").json()["pid"] == process.pid
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == b"closed 0\n" and b"Traceback" not in err
    assert not (tmp_path / "s").exists()
    assert json.loads(status.read_text())["status"] == "stopped"
    assert sorted(os.listdir(tmp_path)) == ["status.json"]


@pytest.mark.slow
def test_the_idle_exit_waits_for_work_that_no_request_waits_for(tmp_path):
    status = tmp_path / "status.json"
    status.write_text("{}")
    with program("--status-file", status, "--port-range", 20000, 40000, "--auth", "none", "--timeout", "0.2", secret=None) as process:
        record = await_running(status, process)
        assert 20000 <= record["port"] <= 40000
        HttpClient("http://127.0.0.1:%d" % record["port"]).request("POST", "/work", json=10)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == b"closed 0\n" and b"idle for 0.2 s" in err
    assert json.loads(status.read_text()) == {**record, "status": "stopped"}


def test_a_private_service_ends_with_its_standard_input(tmp_path):
    status = tmp_path / "status.json"
    status.write_text("{}")
    with program("--status-file", status, "--socket", tmp_path / "s", "--secret-stdin", "--exit-with-stdin") as process:
        await_running(status, process)
        process.stdin.close()
        assert process.wait(20) == 0
    assert not (tmp_path / "s").exists()


def test_a_program_that_cannot_listen_says_why_and_marks_its_status_file(tmp_path):
    status = tmp_path / "status.json"
    status.write_text('{"status": "starting"}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with program("--status-file", status, "--port", port, "--auth", "none", secret=None) as process:
            out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and b"port %d is not free" % port in err and b"Traceback" not in err and out == b"closed 0\n"
    record = json.loads(status.read_text())
    assert record["status"] == "failed" and "is not free" in record["error"]


@pytest.mark.parametrize("words", [("--port", "-3"), ("--port", "65536"), ("--port-range", "1", "x"), ("--timeout", "-1"),
                                   ("--timeout", "nan"), ("--port", "0", "--port-range", "1", "2")])
def test_numbers_that_cannot_be_are_wrong_usage(words):
    with program(*words, "--auth", "none", secret=None) as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 2 and out == b"" and b"error: argument --" in err


def test_a_socket_of_a_dead_service_is_replaced_and_that_of_a_living_one_is_not(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with probe_at(Listen(socket_path=path), tmp_path) as (_, _running, client):
        with pytest.raises(ServiceError, match="another service listens"):
            start(Probe(tmp_path), Listen(socket_path=path))
        assert client.request("GET", "/info").status == 200
    with pytest.raises(ServiceError, match="longer than 100 bytes"):
        start(Probe(tmp_path), Listen(socket_path="/tmp/" + "x" * 100))


@pytest.mark.parametrize("content, message", [("[]", "does not hold a JSON object"), ("{", "cannot be read")])
def test_a_status_file_that_is_no_json_object_ends_the_program(tmp_path, content, message):
    status = tmp_path / "status.json"
    status.write_text(content)
    with program("--status-file", status, "--auth", "none", secret=None) as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and message.encode() in err and status.read_text() == content


def test_a_status_file_may_appear_later(tmp_path):
    status = tmp_path / "status.json"
    with program("--status-file", status, "--auth", "none", "--socket", tmp_path / "s", secret=None) as process:
        time.sleep(0.05)
        (tmp_path / "x").write_text("{}")
        os.rename(tmp_path / "x", status)
        await_running(status, process)


def test_a_program_without_its_secret_does_not_start(tmp_path):
    for text, message in ((b"", b"ended before the secret"), (b"abc", b"ended before the secret"), (b"abc\n", b"holds no secret")):
        with program("--secret-stdin", "--port", "0", secret=None) as process:
            out, err = process.communicate(text, timeout=20)
        assert process.returncode == 1 and message in err and b"Traceback" not in err


def test_open_to_everybody_is_said_aloud(tmp_path):
    status = tmp_path / "status.json"
    status.write_text("{}")
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        with program("--status-file", status, "--auth", "none", "--host", host, "--port", 0, secret=None) as process:
            await_running(status, process)
            process.terminate()
            out, err = process.communicate(timeout=20)
        assert (b"everybody who can reach it" in err) is warned
        status.write_text("{}")


def test_a_server_started_by_hand_uses_the_users_secret(tmp_path, home):
    status = tmp_path / "status.json"
    status.write_text("{}")
    with program("--status-file", status, "--socket", tmp_path / "s", secret=None) as process:
        await_running(status, process)
        assert HttpClient("unix://%s/s" % tmp_path, signing.load_secret()).request("GET", "/info").status == 200
