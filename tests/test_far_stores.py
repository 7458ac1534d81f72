"""Sessions whose stores and jobserver are at the other end of a long line: messages are counted, and lines are cut."""
import contextlib
import json
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from longline import LongLine
from seamless_lite import config, delayed, executors, parallel, stores
from seamless_lite.checksum import Checksum
from seamless_lite.database import DatabaseService
from seamless_lite.errors import ServiceError
from seamless_lite.folder import Folder
from seamless_lite.hashserver import HashService
from seamless_lite.httpbase import Listen, Service, start
from seamless_lite.jobclient import JobserverClient
from seamless_lite.jobserver import JobServer
from seamless_lite.resulttable import ResultTable
from seamless_lite.session import Session
from seamless_lite.transformation import Job

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Far:
    """Stores, and a jobserver if one is asked for, behind long lines; ``sessions()`` are those of new programs."""

    def __init__(self, folder, stack, monkeypatch):
        self.folder, self._stack, self._monkeypatch = folder, stack, monkeypatch
        self.buffers, self.results = Folder(folder / "b"), ResultTable(folder / "seamless.db")
        self.lines = {}
        for name, service in (("buffer", HashService(self.buffers)), ("database", DatabaseService(self.results))):
            running = stack.enter_context(start(service, Listen(socket_path=str(folder / name))))
            self.lines[name] = stack.enter_context(LongLine(folder, running.address))
        self.jobs = None

    def jobserver(self, workers=2):
        spec = {"buffers": {"directory": str(self.folder / "b")}, "results": {"file": str(self.folder / "seamless.db")}}
        server = JobServer(workers, stores.open_stores(spec), spec)
        self.jobs = self._stack.enter_context(start(server, Listen(socket_path=str(self.folder / "j"))))
        self.lines["jobs"] = self._stack.enter_context(LongLine(self.folder, self.jobs.address))

    def use(self, *lines):
        """Begin anew, as another program would, through the lines of these names; the others are short."""
        clients = {name: [{"readonly": False, "remote_url": self.lines[name].address if name in lines
                           else "unix://" + str(self.folder / name)}] for name in ("buffer", "database")}
        self._monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps(clients))
        config.close()
        config.init(workdir=self.folder)
        if self.jobs is not None:
            remote = executors.Remote(lambda again: JobserverClient(self.lines["jobs"].address))
            self._stack.callback(remote.close)
            config.session()._executor = lambda meta: remote
        for line in self.lines.values():
            line.reset()

    def turns(self, *names):
        return [self.lines[name].turns for name in names]

    def took(self, **most):
        """No more messages than these; a machine that is busy may stop us in the middle of a batch, which makes it two."""
        return all(self.lines[name].turns <= number + 2 for name, number in most.items())


@pytest.fixture
def far(tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:
        stack.callback(config.close)
        yield Far(tmp_path, stack, monkeypatch)


@delayed
def text(i, n):
    return ("%d " % i) * n


@delayed
def length(value):
    return len(value)


def test_a_thousand_cached_results_take_a_few_messages(far):
    tfs = [text(i, 3) for i in range(1000)]
    data = [b'"%s"\n' % ("%d " % i * 3).encode() for i in range(1000)]
    far.results.put_many((tf.transformation_checksum, result, None) for tf, result in zip(tfs, far.buffers.put_many(data)))
    far.use("buffer", "database")
    assert [tf.value for tf in parallel([text(i, 3) for i in range(1000)])] == ["%d " % i * 3 for i in range(1000)]
    assert far.took(buffer=1, database=1)


@pytest.mark.slow
def test_results_beyond_one_batch_are_read_ahead_in_their_order(far):
    size = 30_000
    tfs = [text(1000 + i, size // 5) for i in range(400)]       # 12 MB
    data = [b'"%s"\n' % ("%d " % (1000 + i) * (size // 5)).encode() for i in range(400)]
    far.results.put_many((tf.transformation_checksum, result, None) for tf, result in zip(tfs, far.buffers.put_many(data)))
    far.use("buffer", "database")
    values = [tf.value for tf in parallel([text(1000 + i, size // 5) for i in range(400)])]
    assert [value[:5] for value in values] == ["%d " % (1000 + i) for i in range(400)]
    assert far.took(buffer=1 + 3, database=1)       # 8 MB with the look-up, then 1, 2 and what is left
    far.use("buffer", "database")
    tfs = list(parallel([text(1000 + i, size // 5) for i in range(400)]))
    far.lines["buffer"].reset()
    assert tfs[390].value.startswith("1390 ")
    assert far.turns("buffer") == [1] and far.lines["buffer"].bytes["down"] < 2 * size, "no other one is asked for"


def test_a_result_whose_bytes_are_gone_is_computed_again(far):
    far.use()
    first = [text(i, 5) for i in range(3)]
    assert [tf.value for tf in parallel(first)] == ["%d " % i * 5 for i in range(3)]
    gone = first[1].result_checksum
    (far.folder / "b" / gone[:2] / gone).unlink()
    far.use("buffer", "database")
    found = list(parallel(text(i, 5) for i in range(3)))
    assert [tf._outcome.cached for tf in found] == [True, False, True]
    assert far.buffers.has([gone]) == [True]


def test_deep_results_are_looked_at_together(far):
    @delayed
    def folder(n):
        return {"%d/%d" % (n, i): b"content %d" % i for i in range(30)}
    folder.celltypes.result = "folder"
    far.use()
    list(parallel([folder(n) for n in range(20)]))
    far.use("buffer", "database")
    found = list(parallel([folder(n) for n in range(20)]))
    assert far.took(buffer=2, database=1)           # the indices, the leaves of all of them
    assert found[3].value["3/29"] == b"content 29"
    assert far.took(buffer=3)                       # the content of 30 files


def test_new_jobs_and_their_outcomes_travel_together(far):
    far.jobserver()
    far.use("buffer", "database")
    assert [tf.value for tf in parallel(text(i, 2) for i in range(200))] == ["%d " % i * 2 for i in range(200)]
    buffers, database, jobs = far.turns("buffer", "database", "jobs")
    assert buffers == 0 and database < 10 and jobs < 60
    far.use("buffer", "database")
    assert text(7, 10000).run() == "7 " * 10000
    assert far.took(buffer=0, database=1, jobs=1)


@pytest.mark.slow
def test_what_becomes_ready_far_away_is_submitted_together(far):
    far.jobserver()
    far.use("buffer", "database")
    assert [tf.value for tf in parallel(length(text(i, 2)) for i in range(100))] == [2 * len("%d " % i) for i in range(100)]
    buffers, database, jobs = far.turns("buffer", "database", "jobs")
    assert buffers == 0 and database < 40 and jobs < 80
    far.use("buffer", "database")
    assert len([tf.value for tf in parallel(length(text(i, 2)) for i in range(100))]) == 100
    assert far.took(buffer=2, database=2) and far.turns("jobs") == [0]


def test_large_arguments_are_pushed_together(far):
    far.jobserver()
    far.use("buffer", "database")
    values = ["%d" % i * 100_000 for i in range(10, 30)]        # 4 MB
    assert [tf.value for tf in parallel(length(value) for value in values)] == [200_000] * 20
    assert far.turns("buffer")[0] <= 8, "one by one it would be 20"


def test_a_slow_iterable_does_not_keep_what_is_there_from_beginning(far):
    far.jobserver()
    far.use("buffer", "database")
    begun = threading.Event()

    def slow():
        yield text(1, 1)
        end = time.monotonic() + 30
        while not begun.is_set() and time.monotonic() < end:
            yield text(1, 1)
            time.sleep(0.02)
            if far.results.get(text(1, 1).transformation_checksum) is not None:
                begun.set()
    assert {tf.value for tf in parallel(slow())} == {"1 "} and begun.is_set()


@pytest.mark.parametrize("direction", ["up", pytest.param("down", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_line_that_is_cut_again_and_again_costs_no_job(far, direction):
    far.jobserver()
    far.use("buffer", "database")
    config.set_nparallel(5)
    values = []
    for tf in parallel(text(i, 1000) for i in range(60)):
        values.append(tf.value)
        if len(values) in (1, 20, 40):
            for line in far.lines.values():
                line.cut_after(direction, 10)
    assert values == ["%d " % i * 1000 for i in range(60)]
    assert far.lines["jobs"].cuts == 3 and far.lines["database"].cuts == 3


# ---- servers that die, and lines that come back

class Restarted:
    """A jobserver at one address that is killed, and started again by ``mend``."""

    def __init__(self, folder):
        self.path = str(folder / "s")
        self.address = "unix://" + self.path
        spec = {"buffers": {"directory": str(folder / "b")}, "results": {"file": str(folder / "r.db")}}
        self._command = [sys.executable, "-m", "seamless_lite.jobserver", "--socket", self.path, "--auth", "none", "--workers", "1",
                         "--stores", json.dumps(spec), "--exit-with-stdin"]
        self.process = None
        self._lock = threading.Lock()
        self.mend()

    def mend(self):
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        self.client().info()

    def client(self):
        """A client as the session makes it."""
        end = time.monotonic() + 20
        while True:
            client = JobserverClient(self.address)
            try:
                client.info()
                return client
            except ServiceError:
                assert time.monotonic() < end
                time.sleep(0.02)

    def kill(self, number=signal.SIGKILL):
        with self._lock:
            self.process.send_signal(number)
            self.process.wait()
            self.process.stdin.close()


@pytest.fixture
def restarted(tmp_path):
    server = Restarted(tmp_path)
    yield server
    if server.process.poll() is None:
        server.kill(signal.SIGTERM)


@delayed
def waits(folder):
    """Says that it began, and goes on when it may."""
    import os
    import time
    open(folder + "/began", "w").close()
    while not os.path.exists(folder + "/go"):
        time.sleep(0.01)
    return "done"


def waiting_job(folder):
    tf = waits(str(folder))
    return Job(tf._recipe, tf._meta, tf._buffers)


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def mending(server):
    return executors.Remote(lambda again: JobserverClient(server.address, mend=server.mend, pid=server.process.pid))


def reconnecting(server):
    """As for services on this machine."""
    def connect(again):
        server.mend()
        return JobserverClient(server.address)
    return executors.Remote(connect)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("way", ["run", "submit"])
@pytest.mark.parametrize("connected", [mending, reconnecting])
def test_jobs_of_a_server_that_dies_are_sent_to_its_successors(restarted, tmp_path, connected, way, number):
    remote, outcomes, job = connected(restarted), [], waiting_job(tmp_path)
    thread = threading.Thread(target=lambda: outcomes.append(remote.run(job) if way == "run" else remote.submit(job).result(60)))
    thread.start()
    for _ in range(2):
        wait_for(tmp_path / "began")
        (tmp_path / "began").unlink()
        restarted.kill(number)
    wait_for(tmp_path / "began")
    (tmp_path / "go").write_text("")
    thread.join(30)
    assert outcomes[0].exception() is None and outcomes[0].result is not None
    remote.close()


@pytest.mark.slow
@pytest.mark.parametrize("connected", [mending, reconnecting])
def test_jobs_whose_server_dies_each_time_are_held_to_be_the_reason(restarted, tmp_path, connected):
    remote, stopping = connected(restarted), threading.Event()

    def kill():
        while not stopping.is_set():
            if (tmp_path / "began").exists():
                (tmp_path / "began").unlink()
                restarted.kill()
            time.sleep(0.01)
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(ServiceError, match="died 5 times|broke off|nothing answers"):
            remote.run(waiting_job(tmp_path))
    finally:
        stopping.set()
        thread.join()
    remote.close()


def test_hundreds_of_jobs_in_flight_all_hear_that_their_server_is_gone(restarted, tmp_path):
    restarted.kill()
    clients = []

    def connect(again):
        clients.append(JobserverClient(restarted.address))
        return clients[-1]
    remote = executors.Remote(connect)
    jobs = [text(i, 7) for i in range(600)]
    futures = [remote.submit(Job(tf._recipe, tf._meta, tf._buffers)) for tf in jobs]
    assert all(isinstance(future.exception(30), ServiceError) for future in futures)
    remote.close()


def test_a_failure_of_this_machine_while_mending_ends_the_jobs_and_not_the_thread_that_sends_them(restarted):
    restarted.kill()

    def mend():
        raise OSError(24, "Too many open files")
    client, ended = JobserverClient(restarted.address, mend=mend), queue.SimpleQueue()
    for i in range(2):                      # the second finds the thread alive
        tf = text(i, 8)
        client.submit(Job(tf._recipe, tf._meta, tf._buffers), lambda outcome, error: ended.put(error))
        assert "Too many open files" in str(ended.get(timeout=30))
    client.close()


class Silent(Service):
    """Takes requests and never answers, until it is told to."""
    name = "jobserver"

    def __init__(self):
        super().__init__()
        self.asked, self.answers = 0, False
        self.routes = [("POST", re.compile("/status"), self.status)]

    def status(self, request):
        self.asked += 1
        request.read()
        if not self.answers:
            self.stopping.wait(5)
        return {"states": {}}


@pytest.mark.slow
def test_a_server_that_is_silent_for_too_long_counts_as_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("seamless_lite.jobclient._GRACE_S", 0.2)
    service, mends = Silent(), []

    def mend():
        mends.append(1)
        service.answers = len(mends) == 2
    with start(service, Listen(socket_path=str(tmp_path / "s"))) as running:
        client = JobserverClient(running.address, mend=mend)
        assert client.status([]) == {} and len(mends) == 2
        client.close()
        service.answers = False
        with pytest.raises(ServiceError, match="did not answer"):
            JobserverClient(running.address).status([])
        service.stopping.set()


@pytest.mark.slow
def test_workers_wait_for_a_line_that_another_process_looks_after(tmp_path):
    path = str(tmp_path / "h")
    opened = stores.open_stores({"buffers": {"address": "unix://" + path, "patient": True}})
    found = []
    thread = threading.Thread(target=lambda: found.append(opened.buffers.has([Checksum.of(b"x")])))
    thread.start()
    time.sleep(0.1)
    assert not found
    with start(HashService(Folder(tmp_path / "b")), Listen(socket_path=path)):
        thread.join(10)
        assert found == [[False]]


def test_workers_do_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE_S", 0.3)
    monkeypatch.setattr(stores, "PAUSE_S", 0.05)
    opened = stores.open_stores({"results": {"address": "unix://%s/none" % tmp_path, "patient": True}})
    with pytest.raises(ServiceError, match="nothing has answered"):
        opened.results.get(Checksum.of(b"x"))


def test_the_secret_of_another_account_comes_from_a_file(tmp_path):
    (tmp_path / "secret").write_text("ab" * 32 + "\n")
    (tmp_path / "secret").chmod(0o600)
    with start(HashService(Folder(tmp_path / "b")), Listen(socket_path=str(tmp_path / "h")), secret=bytes.fromhex("ab" * 32)) as running:
        spec = {"buffers": {"address": running.address, "auth": True, "secret_file": str(tmp_path / "secret")}}
        assert stores.open_stores(spec, b"another").buffers.has([]) == []
        assert stores.open_stores(spec, b"another").buffers.put(b"x") == Checksum.of(b"x")


def test_sessions_without_settings_keep_everything_in_memory():
    session = Session()
    assert not session.store.remote
    session.close()
