"""The client for jobservers of Seamless 1.x, on the routes that ours has for clients of Seamless 1.x."""
import os
import socket
import threading
import time

import pytest

from seamless_lite import celltypes, jobclient1x
from seamless_lite.checksum import Checksum
from seamless_lite.errors import ConfigurationError, DeadlineError, JobCancelledError, JobError, ServiceError
from seamless_lite.httpbase import HttpError, Listen, Reply, Service, start
from seamless_lite.jobclient import JobserverClient
from seamless_lite.jobserver import JobServer
from seamless_lite.session import Session
from seamless_lite.settings import load_settings
from seamless_lite.stores import open_stores
from seamless_lite.transformation import Job, Meta, Recipe

FUNCTION = """
def count(ledger, n):
    import time
    with open(ledger, "a") as file:
        file.write("x")
    if n < 0:
        raise ValueError("below zero")
    time.sleep(n if n > 100 else 0)
    return n + 1
"""


class Without(Service):
    """The same service, which does not know some requests: as Seamless 1.x does not know ``/info``."""

    def __init__(self, service):
        super().__init__()
        self.service, self.busy, self.close = service, service.busy, service.close

    def reply_to(self, request):
        if request.path == "/info" or request.method == "POST" and not request.path.startswith("/cancel-"):
            raise HttpError(404, "", "404: Not Found")
        return self.service.reply_to(request)


@pytest.fixture
def stores(tmp_path):
    spec = {"buffers": {"directory": str(tmp_path / "store")}, "results": {"file": str(tmp_path / "store" / "seamless.db")}}
    (tmp_path / "store").mkdir()
    return open_stores(spec), spec


@pytest.fixture
def server(stores):
    """It records nothing, as theirs."""
    spec = {**stores[1], "results": {}}
    with start(Without(JobServer(1, open_stores(spec), spec)), Listen(host="127.0.0.1", port=0)) as running:
        yield running


class Other(Without):
    """Theirs says with a traceback that an input is missing."""

    def reply_to(self, request):
        reply = super().reply_to(request)
        if isinstance(reply, Reply) and reply.status == 500:
            return Reply(self.TEXT, 500)
        return reply


@pytest.mark.parametrize("text", ["Traceback (most recent call last):\n  File \"x.py\", line 1, in resolve\nseamless.CacheMissError: 123\n\n" + "*" * 50 + "\nprinted",
                                  "seamless.CacheMissError: 123\n"], ids=["with frames", "without"])
def test_an_input_that_is_missing_there_is_made_again(stores, make_job, text):
    Other.TEXT = text
    with start(Other(JobServer(1, open_stores({**stores[1], "results": {}}), {**stores[1], "results": {}})), Listen(host="127.0.0.1", port=0)) as server:
        value = '{"jobserver": [{"remote_url": "%s"}], "buffer": [{"remote_directory": "%s"}]}' % (server.address, stores[1]["buffers"]["directory"])
        session = Session(load_settings("/", environ={"SEAMLESS_REMOTE_CLIENTS": value}))
        session._stores = stores[0]
        try:
            first, second = make_job(5), make_job(6)
            client = jobclient1x.connect(server.address, stores[0])
            made = client.run(first).result
            client.close()
            os.unlink(stores[0].buffers.path(made))
            second = second.recipe._replace(pins={**second.recipe.pins, "n": ("mixed", None, made)})
            assert session.run(second, buffers=first.buffers).buffer == b"7\n"
        finally:
            session.close()
    assert make_job.ledger.read_text() == "xxx"


@pytest.fixture
def client(server, stores):
    client = jobclient1x.connect(server.address, stores[0])
    assert isinstance(client, jobclient1x.JobserverClient1x)
    yield client
    client.close()


@pytest.fixture
def make_job(tmp_path):
    def make(n, **meta):
        buffers = {}

        def pin(value, *celltype):
            data = celltypes.serialize(value, celltype[0])
            buffers[Checksum.of(data)] = data
            return (*celltype, Checksum.of(data))
        pins = {"code": pin(FUNCTION, "python", "transformer"), "ledger": pin(str(tmp_path / "ledger"), "str", None), "n": pin(n, "mixed", None)}
        return Job(Recipe("python", pins), Meta(**meta), buffers)
    make.ledger = tmp_path / "ledger"
    return make


def begun(ledger):
    end = time.monotonic() + 30
    while not ledger.exists() or not ledger.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_is_run_and_recorded(client, make_job, stores):
    outcome = client.run(make_job(5))
    assert (outcome.result, outcome.buffer) == (Checksum.of(b"6\n"), b"6\n") and outcome.runtime["wall_time_seconds"] > 0
    assert stores[0].results.get(make_job(5).checksum) == outcome.result
    assert client.run(make_job(6, scratch=True)).buffer == b"7\n"


def test_many_jobs_are_submitted_and_each_is_told_of_once(client, make_job):
    told, all_told = [], threading.Event()

    def callback(outcome, error):
        told.append(outcome.result)
        if len(told) == 30:
            all_told.set()
    for n in range(30):
        client.submit(make_job(n), callback)
    assert all_told.wait(30)
    assert sorted(told) == sorted(Checksum.of(b"%d\n" % (n + 1)) for n in range(30))


def test_a_job_that_fails_is_run_once(client, make_job, stores):
    error = client.run(make_job(-1)).exception()
    assert isinstance(error, JobError) and error.args[0] == "ValueError: below zero" and str(error).count("Traceback") == 1
    assert make_job.ledger.read_text() == "x" and stores[0].results.get(make_job(-1).checksum) is None


def test_whoever_waits_for_a_cancelled_job_is_told_at_once(client, make_job, stores):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(client.run(make_job(300))))
    thread.start()
    begun(make_job.ledger)
    assert client.cancel([make_job(300).checksum]) == {make_job(300).checksum: "canceled"}
    thread.join(10)
    assert isinstance(outcomes[0].exception(), JobCancelledError)


@pytest.mark.slow
def test_a_job_that_goes_on_over_there_after_a_cancel_is_in_nobodys_way(client, make_job, monkeypatch):
    monkeypatch.setattr(client, "_revoke", lambda id: "running")
    thread = threading.Thread(target=lambda: client.run(make_job(101)))
    thread.start()
    begun(make_job.ledger)
    client.cancel([make_job(101).checksum])
    thread.join(10)
    assert not thread.is_alive()
    told = threading.Event()
    client.submit(make_job(1), lambda *_: None)
    client.submit(make_job(-2), lambda *_: told.set())
    assert client._threads == 3 and not told.is_set()


def test_a_job_that_takes_too_long_is_given_up(client, make_job):
    assert isinstance(client.run(make_job(300, timeout_s=0.5)).exception(), DeadlineError)


def test_a_job_whose_server_dies_is_not_sent_again(make_job, stores):
    """The server takes the request and breaks off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = []

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                asked.append(connection.recv(1 << 20))
                connection.close()
        threading.Thread(target=serve, daemon=True).start()
        client = jobclient1x.JobserverClient1x("http://127.0.0.1:%d" % listening.getsockname()[1], stores[0])
        with pytest.raises(ServiceError, match="broke off") as caught:
            client.run(make_job(1))
        assert caught.value.final and len(asked) == 1
        client.close()
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_closing_ends_the_waiting(client, make_job):
    found = []
    thread = threading.Thread(target=lambda: found.append(pytest.raises(ServiceError, client.run, make_job(300))))
    thread.start()
    begun(make_job.ledger)
    client.close()
    thread.join(10)
    assert "was closed before" in str(found[0].value)


def test_one_of_our_own_is_noticed_and_what_is_no_jobserver_is_refused(stores):
    with start(JobServer(1, *stores), Listen(host="127.0.0.1", port=0)) as running:
        client = jobclient1x.connect(running.address, stores[0])
        assert isinstance(client, JobserverClient)
        client.close()
    with start(Without(Service()), Listen(host="127.0.0.1", port=0)) as running:
        with pytest.raises(ServiceError, match="not a jobserver"):
            jobclient1x.connect(running.address, stores[0])


def test_seamless_remote_clients_names_it(server, stores, make_job, tmp_path):
    folder = stores[1]["buffers"]["directory"]
    value = '{"jobserver": [{"remote_url": "%s"}], "buffer": [{"remote_directory": "%s"}]}' % (server.address, folder)
    settings = load_settings(str(tmp_path), environ={"SEAMLESS_REMOTE_CLIENTS": value, "HOME": str(tmp_path)})
    assert (settings.execution, settings.remote) == ("remote", "jobserver")
    assert load_settings(str(tmp_path), execution="process", environ={"SEAMLESS_REMOTE_CLIENTS": value}).remote is None
    with pytest.raises(ConfigurationError, match="names no jobserver"):
        load_settings(str(tmp_path), execution="remote", environ={"SEAMLESS_REMOTE_CLIENTS": '{"buffer": [{"remote_directory": "/x"}]}'})
    session = Session(settings)
    session._stores = stores[0]
    try:
        job = make_job(1)
        assert session.run(job.recipe, buffers=job.buffers).buffer == b"2\n"
    finally:
        session.close()
