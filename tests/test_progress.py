"""What a person at a terminal is told: transfers that take a while, and what jobs wait for."""
import io
import re
import threading
import time
import types

import pytest

from seamless_lite import executors, progress, queuewatch, transfer
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError
from seamless_lite.folder import Folder
from seamless_lite.hashserver import HashserverClient, HashService
from seamless_lite.httpbase import Listen, Service, start
from seamless_lite.jobclient import JobserverClient
from seamless_lite.progress import Progress, size_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=terminal))      # pytest puts its own sys.stderr back
    monkeypatch.setattr(progress, "_EVERY_S", 0)
    return terminal


def test_a_large_transfer_is_told_with_an_estimate_and_the_line_is_removed(terminal):
    with Progress("upload", 40_000_000, "seamless-run") as shown:
        shown.add(10_000_000)
        shown.add(10_000_000)
    lines = terminal.getvalue().split("\r")
    assert re.match(r"seamless-run: upload 10 MB of 40 MB, about \d+ s left", lines[1])
    assert "20 MB of 40 MB" in lines[2] and lines[-1] == "\033[K"


@pytest.mark.parametrize("total, who", [(1000, "seamless-run"), (40_000_000, None)])
def test_small_transfers_and_quiet_programs_tell_nothing(terminal, total, who):
    with Progress("upload", total, who) as shown:
        shown.add(total)
    assert terminal.getvalue() == ""


def test_nothing_is_told_if_nobody_looks(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("upload", 40_000_000, "seamless-run") as shown:
        shown.add(40_000_000)
    assert stream.getvalue() == ""
    monkeypatch.setattr("sys.stderr", None)
    Progress("upload", 40_000_000, "seamless-run").add(1)


def test_what_is_sent_or_written_again_counts_once(terminal):
    with Progress("upload", 40_000_000, "x") as shown:
        file = shown.reading(io.BytesIO(bytes(1000)))
        file.read(600)
        file.seek(0, io.SEEK_END)
        file.seek(0)
        assert shown._done == 0 and len(file.read()) == 1000 and shown._done == 1000
        into = shown.writing(io.BytesIO())
        into.write(bytes(700))
        into.seek(0)
        into.truncate()
        into.write(bytes(500))
        into.seek(0)
        assert len(into.read()) == 500 and shown._done == 1500


def test_pushing_large_files_shows_progress_and_arrives(terminal, tmp_path):
    datas = [b"%d" % i * 3_000_000 for i in range(3)]
    files = {}
    for i, data in enumerate(datas):
        (tmp_path / str(i)).write_bytes(data)
        files[Checksum.of(data)] = str(tmp_path / str(i))
    with start(HashService(Folder(tmp_path / "far")), Listen(socket_path=str(tmp_path / "h")), secret=b"s" * 32) as running:
        client = HashserverClient(running.address, b"s" * 32)
        assert transfer.push(client, {}, files, "seamless-run") == 3
        assert [client.get(name) for name in files] == datas
        client.close()
    assert "of 9 MB" in terminal.getvalue()


@pytest.mark.parametrize("size, text", [(0, "0 bytes"), (999, "999 bytes"), (12345678, "12.35 MB"), (5e15, "5000 TB"), (2e16, "2e+04 TB")])
def test_sizes_are_readable(size, text):
    assert size_text(size) == text


# ---- waiting for a cluster

class Queue(Service):
    """The part of a daskserver that says what is waited for."""
    name = "daskserver"

    def __init__(self):
        super().__init__()
        self.cluster, self.asked = {}, threading.Semaphore(0)

    def info(self):
        self.asked.release()
        return {"cluster": self.cluster}


def state(pending, running, reason, tasks):
    return {"workers": running, "pending_jobs": pending, "running_jobs": running, "reason": reason, "waiting_tasks": tasks,
            "sentence": "%d SLURM jobs pending (%s), %d tasks waiting" % (pending, reason, tasks)}


@pytest.fixture
def queue(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(queuewatch, "FIRST_S", 0.05)
    monkeypatch.setattr(queuewatch, "AGAIN_S", 0.02)
    service = Queue()
    with start(service, Listen(socket_path=str(tmp_path / "q"))) as running:
        service.client = JobserverClient(running.address)
        yield service
        service.client.close()


def looks(queue, times):
    """It was asked so often, and what was answered has been told."""
    for _ in range(times + 1):
        assert queue.asked.acquire(timeout=10)


def test_what_jobs_wait_for_is_told_when_it_changes_but_not_for_each_task(queue, terminal):
    queue.cluster = state(2, 0, "Resources", 40)
    watch = queuewatch.QueueWatch(lambda: queue.client, "seamless-run")
    with watch:
        looks(queue, 3)
        queue.cluster = state(2, 0, "Resources", 39)
        looks(queue, 3)
        queue.cluster = state(1, 1, "Priority", 38)
        looks(queue, 3)
        queue.cluster = state(0, 2, None, 38)
        looks(queue, 3)
    assert terminal.getvalue().replace("\r\033[K", "").splitlines() == [
        "seamless-run: waiting: 2 SLURM jobs pending (Resources), 40 tasks waiting",
        "seamless-run: waiting: 1 SLURM jobs pending (Priority), 38 tasks waiting"]


def test_the_watch_ends_with_the_jobs_and_begins_again(queue, terminal):
    watch = queuewatch.QueueWatch(lambda: queue.client, "x")
    for _ in range(2):
        watch.begin()
        watch.begin()
        looks(queue, 1)
        watch.end()
        assert watch._thread is not None
        watch.end()
        end = time.monotonic() + 10
        while watch._thread is not None:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_short_jobs_and_quiet_programs_ask_nothing(queue, terminal, monkeypatch):
    monkeypatch.setattr(queuewatch, "FIRST_S", 30)
    watch = queuewatch.QueueWatch(lambda: queue.client, "x")
    watch.begin()
    watch.close()
    silent = queuewatch.QueueWatch(lambda: queue.client, None)
    silent.begin()
    assert silent._thread is None and not queue.asked.acquire(timeout=0.1)


def test_a_server_without_a_queue_is_asked_once(queue, terminal):
    queue.cluster = None
    watch = queuewatch.QueueWatch(lambda: queue.client, "x")
    watch.begin()
    looks(queue, 0)
    assert not queue.asked.acquire(timeout=0.2)
    watch.close()


def test_a_server_that_cannot_be_asked_is_asked_again(queue, terminal):
    clients = [None, JobserverClient("unix:///nowhere/at/all"), queue.client]
    queue.cluster = state(1, 0, "Resources", 1)
    watch = queuewatch.QueueWatch(lambda: clients.pop(0) if len(clients) > 1 else clients[0], "x")
    with watch:
        looks(queue, 2)
    assert terminal.getvalue().count("waiting: 1 SLURM") == 1


def test_jobs_that_cannot_be_sent_leave_no_watch_behind(terminal):
    def fail(again):
        raise SeamlessError("no server")
    remote = executors.Remote(fail, who="x")
    for _ in range(3):
        with pytest.raises(SeamlessError):
            remote.submit(None)
    assert remote._queue._jobs == 0
