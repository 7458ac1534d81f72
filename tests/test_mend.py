"""httpclient with ``mend``: a service that vanishes and is made reachable again, on this machine."""
import io
import re
import socket
import threading

import pytest

from seamless_lite.errors import DeadlineError, ServiceError
from seamless_lite.httpbase import Listen, Service, start
from seamless_lite.httpclient import HttpClient


class Echo(Service):
    name = "echo"

    def __init__(self):
        super().__init__()
        self.routes = [("POST", re.compile("/echo"), lambda request: request.read(1 << 20)),
                       ("GET", re.compile("/long"), lambda request: b"x" * 300000)]


class Place:
    """A service at one address that is stopped and started."""

    def __init__(self, path):
        self.path, self.running, self.mends = str(path), None, 0
        self.address = "unix://" + self.path

    def up(self):
        self.running = start(Echo(), Listen(socket_path=self.path))

    def down(self):
        if self.running:
            self.running.stop()
        self.running = None

    def mend(self):
        self.mends += 1
        if self.running is None:
            self.up()


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "s")
    yield place
    place.down()


class Breaking:
    """Listens at ``path`` and closes the first ``n`` connections, each after ``said`` was sent; then sends ``answer``."""

    def __init__(self, path, n, said=b"", answer=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(path))
        self.sock.listen(20)
        self.n, self.said, self.answer, self.seen = n, said, answer, 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            with sock:
                sock.recv(1 << 16)
                self.seen += 1
                sock.sendall(self.said if self.seen <= self.n else self.answer)


def test_a_service_that_is_gone_is_mended_and_the_request_repeated(place):
    client = HttpClient(place.address, mend=place.mend)
    assert client.request("POST", "/echo", b"one").body == b"one"       # nothing was there at all
    place.down()
    assert client.request("POST", "/echo", b"two").body == b"two"       # there was a kept connection
    assert place.mends == 2
    assert client.request("POST", "/echo", b"three").body == b"three" and place.mends == 2


def test_without_mend_the_error_is_the_one_sentence_as_before(place):
    with pytest.raises(ServiceError, match="nothing answers at") as error:
        HttpClient(place.address).request("GET", "/long")
    assert type(error.value) is ServiceError


def test_what_mend_says_is_what_the_caller_gets(place):
    def mend():
        raise ServiceError("the laptop is under water: dry it")
    with pytest.raises(ServiceError, match="^the laptop is under water"):
        HttpClient(place.address, mend=mend).request("GET", "/long")


def test_a_connection_that_breaks_again_and_again_is_mended_and_half_an_answer_is_not_kept(tmp_path):
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"
    server, mends, into = Breaking(tmp_path / "s", 6, said), [], io.BytesIO(b"before ")
    into.seek(7)
    client = HttpClient("unix://%s" % (tmp_path / "s"), mend=lambda: mends.append(server.seen))
    client.request("GET", "/", into=into)
    assert into.getvalue() == b"before ok"
    assert mends == [4]                     # after the usual attempts, and only then
    server.sock.close()


@pytest.mark.slow
def test_a_request_that_kills_what_it_reaches_is_given_up(tmp_path):
    server, mends = Breaking(tmp_path / "s", 1000), []
    client = HttpClient("unix://%s" % (tmp_path / "s"), mend=lambda: mends.append(1))
    with pytest.raises(ServiceError, match="broke off"):
        client.request("GET", "/")
    assert 1 <= len(mends) <= 10
    server.sock.close()


@pytest.mark.slow
def test_mending_does_not_use_up_the_time_of_the_request(place):
    def slowly():
        threading.Event().wait(0.6)
        place.mend()
    client = HttpClient(place.address, mend=slowly)
    assert client.request("POST", "/echo", b"one", timeout_s=0.5).body == b"one"
    with pytest.raises(DeadlineError):      # but a service that only takes long is not mended
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(place.path + "2")
            silent.listen(5)
            HttpClient("unix://%s2" % place.path, mend=place.mend).request("GET", "/", timeout_s=0.2)
    assert place.mends == 1


def test_threads_that_lose_their_connections_together_all_get_their_answers(place):
    place.up()
    lock, answers = threading.Lock(), []

    def mend():
        with lock:
            place.mend()
    client, barrier, gone = HttpClient(place.address, mend=mend), threading.Barrier(9), threading.Event()

    def one(n):
        first = client.request("POST", "/echo", b"a%d" % n).body
        barrier.wait(10)
        gone.wait(10)
        answers.append((first, client.request("POST", "/echo", b"b%d" % n).body))
    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait(10)
    place.down()
    gone.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [(b"a%d" % n, b"b%d" % n) for n in range(8)]


def test_a_client_that_is_closed_is_not_mended(place):
    closed = []
    client = HttpClient(place.address, mend=lambda: closed.append(client.close()))
    with pytest.raises(ServiceError, match="nothing answers"):
        client.request("GET", "/long")
    assert len(closed) == 1


def test_a_peer_on_another_machine_that_falls_silent_is_noticed(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("seamless_lite.httpclient._LOOPBACK", ())      # as if it were far away
        client = HttpClient("http://127.0.0.1:%d" % server.getsockname()[1])
        with client._open(5) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20000
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
