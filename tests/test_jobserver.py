"""The jobserver with real workers, real stores and real HTTP: in this process, or as the program."""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from seamless_lite import celltypes
from seamless_lite.checksum import Checksum
from seamless_lite.cpus import usable_cpus
from seamless_lite.errors import SeamlessError, ServiceError
from seamless_lite.httpbase import Listen, start
from seamless_lite.httpclient import HttpClient
from seamless_lite.jobclient import JobserverClient
from seamless_lite.jobserver import JobServer, main
from seamless_lite.processes import MARK
from seamless_lite.stores import open_stores
from seamless_lite.transformation import Job, Meta, Recipe
from seamless_lite.worker import run_job

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECRET = b"0123456789abcdef0123456789abcdef"
PATIENCE_S = 20


def make_job(source, meta=Meta(), output=("result", "mixed", None), language="python", **values):
    """A job whose buffers all travel inside it."""
    buffers = {}

    def pin(value, celltype, sub=None):
        data = celltypes.serialize(value, celltype)
        buffers[Checksum.of(data)] = data
        return celltype, sub, Checksum.of(data)
    code = pin(source, "python", "transformer") if language == "python" else pin(source, "text")
    pins = {"code": code, **{name: pin(value, "mixed") for name, value in values.items()}}
    return Job(Recipe(language, pins, output), meta, buffers)


def add(i):
    return make_job("def add(a):\n    return a + 1\n", a=i)


def until(condition, what="it did not happen"):
    end = time.monotonic() + PATIENCE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "store").mkdir()
    return {"buffers": {"directory": str(tmp_path / "store")}, "results": {"file": str(tmp_path / "store" / "seamless.db")}}


@pytest.fixture
def make_server(spec, tmp_path, monkeypatch):
    """``make_server(workers)`` -> a client of a jobserver that runs in this process."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    running, clients = [], []

    def make(workers=2, secret=SECRET):
        server = JobServer(workers, open_stores(spec), spec)
        running.append(start(server, Listen(str(tmp_path / "s")), secret=secret))
        clients.append(JobserverClient(running[-1].address, secret))
        clients[-1].server = server
        return clients[-1]
    yield make
    for client in clients:
        client.close()
    for one in running:
        one.stop()
    assert not list((tmp_path / "tmp").glob("seamless-jobs-*")), "the folder of the pool was left"
    assert not [pid for pid, mark in marked() if mark.startswith("%d-" % os.getpid())], "a process was left"


def marked():
    """(pid, mark) of all processes that a worker pool started."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                environ = pathlib.Path("/proc", name, "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            for mark in re.findall(r"(?:^|\0)%s=([^\0]*)" % MARK, environ):
                yield int(name), mark


@pytest.fixture
def client(make_server):
    return make_server()


def slow(path, **meta):
    """A job that says its pid in a file and then sleeps."""
    return make_job("def slow(path):\n    import os, time\n    with open(path, 'w') as f: f.write(str(os.getpid()))\n    time.sleep(300)\n",
                    Meta(**meta), path=str(path))


def in_background(function, *args, **kwargs):
    """Call it in a thread; the list gets the value, or the exception."""
    values = []

    def call():
        try:
            values.append(function(*args, **kwargs))
        except SeamlessError as exc:
            values.append(exc)
    threading.Thread(target=call, daemon=True).start()
    return values


def begun(path):
    return int(until(lambda: path.exists() and path.read_text(), "the job did not begin"))


def kind(outcome):
    return (outcome.error or {}).get("kind")


# --- jobs and what is kept of them

def test_a_result_is_stored_with_its_row_its_record_and_its_recipe(client, spec):
    job = add(41)
    outcome = client.run(job)
    assert outcome.buffer == b"42\n" and not outcome.cached
    stores = open_stores(spec)
    assert stores.results.get(job.checksum) == outcome.result and stores.buffers.get(outcome.result) == b"42\n"
    assert stores.buffers.get(job.checksum) == job.recipe.buffer
    (text,), = stores.results.query("SELECT metadata FROM meta_data")
    assert list(json.loads(text)) == [
        "schema_version", "tf_checksum", "result_checksum", "seamless_version", "execution_mode", "remote_target",
        "wall_time_seconds", "cpu_time_user_seconds", "cpu_time_system_seconds", "memory_peak_bytes", "gpu_memory_peak_bytes"]
    assert json.loads(text)["remote_target"] == "jobserver"
    stores.close()


def test_a_known_job_is_answered_from_the_table(client):
    job = add(1)
    first = client.run(job)
    again = client.run(job)
    assert again.cached and (again.result, again.buffer) == (first.result, first.buffer)


def test_a_known_result_whose_bytes_are_gone_is_computed_again(client, spec):
    outcome = client.run(add(1))
    path = next(pathlib.Path(spec["buffers"]["directory"]).rglob(str(outcome.result)))
    path.unlink()
    assert not client.run(add(1)).cached and path.exists()


def test_a_forgotten_result_is_computed_again_although_the_server_remembers_the_job(client):
    client.run(add(1))
    client.server.jobs.stores.results.forget(add(1).checksum)
    assert not client.run(add(1)).cached


def test_a_failure_comes_with_the_users_traceback_and_is_not_recorded(client, spec):
    job = make_job("def bad(a):\n    return 1 / a\n", a=0)
    outcome = client.run(job)
    assert kind(outcome) == "JobError" and "return 1 / a" in outcome.error["traceback"]
    assert "seamless_lite" not in outcome.error["traceback"]
    assert client.server.jobs.stores.results.get(job.checksum) is None
    assert client.status([job.checksum])[job.checksum]["state"] == "failed"


COUNT = "def count(path, word):\n    with open(path, 'a') as f: f.write('x')\n    raise ValueError(word)\n"


def test_a_failed_job_that_is_asked_for_again_runs_again(client, tmp_path):
    job = make_job(COUNT, path=str(tmp_path / "n"), word="a")
    client.run(job)
    client.run(job)
    assert (tmp_path / "n").read_text() == "xx"


def test_a_repeated_request_does_not_run_a_failed_job_again(client, tmp_path):
    job = make_job(COUNT, path=str(tmp_path / "n"), word="b")
    body = {"client": "c", "token": "t", "jobs": [job.to_dict()], "wait": 20}
    answers = [client._post("/jobs", body, 20) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2] and "b" in str(answers[0])
    assert (tmp_path / "n").read_text() == "x"


def test_the_same_job_in_flight_runs_once_for_all_who_ask(make_server, tmp_path):
    make_server(4)
    code = "def f(path):\n    import time\n    with open(path, 'a') as f: f.write('x')\n    time.sleep(0.3)\n    return 7\n"
    job = make_job(code, path=str(tmp_path / "n"))
    others = [JobserverClient("unix://" + str(tmp_path / "s"), SECRET) for _ in range(5)]
    values = [in_background(other.run, job) for other in others]
    until(lambda: all(values))
    assert {value.buffer for value, in values} == {b"7\n"} and (tmp_path / "n").read_text() == "x"


def test_a_job_that_calls_itself_something_else_is_refused_and_costs_no_other(client):
    bad = {**add(1).to_dict(), "checksum": "0" * 64}
    answer = client._post("/jobs", {"client": "c", "jobs": [bad, add(2).to_dict()], "wait": 20}, 20)
    assert "calls itself" in answer["outcomes"]["0" * 64]["error"]["message"]
    assert answer["outcomes"][add(2).checksum]["result"]


def test_scratch_results_travel_and_are_not_stored(client, spec):
    job = make_job("def f(n):\n    return 'x' * n\n", Meta(scratch=True), n=200_000)
    outcome = client.run(job)
    assert len(outcome.buffer) == 200_003 and Checksum.of(outcome.buffer) == outcome.result
    stores = open_stores(spec)
    assert stores.results.get(job.checksum) == outcome.result and stores.buffers.get(outcome.result) is None
    stores.close()


def test_a_result_is_kept_if_anybody_who_waits_wants_it_kept(client, tmp_path, spec):
    code = "def f(path):\n    import os, time\n    while not os.path.exists(path): time.sleep(0.01)\n    return 1\n"
    path = str(tmp_path / "go")
    scratch = in_background(client.run, make_job(code, Meta(scratch=True), path=path))
    until(lambda: client.server.jobs.in_flight)
    kept = in_background(client.run, make_job(code, path=path))
    until(lambda: len(next(iter(client.server.jobs._entries.values())).askers) == 2)
    (tmp_path / "go").write_text("")
    until(lambda: scratch and kept)
    assert open_stores(spec).buffers.get(kept[0].result) == b"1\n"


def test_a_large_result_is_in_the_store_and_not_in_the_outcome(client):
    outcome = client.run(make_job("def f(n):\n    return 'x' * n\n", n=200_000))
    assert outcome.buffer is None and client.server.jobs.stores.buffers.length(outcome.result) == 200_003


def test_a_shell_job_runs_and_its_stderr_is_its_log(client):
    outcome = client.run(make_job("echo warning >&2; echo $a > RESULT", language="bash", output=("result", "bytes", None), a=5))
    assert outcome.buffer == b"5\n" and "warning" in outcome.logs


def test_runtime_figures_count_children(client):
    code = "def f():\n    import subprocess, sys\n    subprocess.run([sys.executable, '-c', 'x = bytes([1]) * 200_000_000; sum(range(2_000_000))'])\n    return 1\n"
    runtime = client.run(make_job(code)).runtime
    assert runtime["memory_peak_bytes"] > 150_000_000 and runtime["cpu_time_user_seconds"] > 0 < runtime["wall_time_seconds"]


# --- many

def submit_all(client, jobs, callback):
    for job in jobs:
        client.submit(job, lambda outcome, error=None, job=job: callback(job, outcome, error))


def test_many_jobs_come_back_each_with_its_own_outcome(client):
    outcomes, done = {}, threading.Event()

    def collect(job, outcome, error):
        outcomes[job.checksum] = outcome or error
        if len(outcomes) == 200:
            done.set()
    jobs = [add(i) for i in range(200)]
    submit_all(client, jobs, collect)
    assert done.wait(PATIENCE_S)
    assert [outcomes[job.checksum].buffer for job in jobs] == [b"%d\n" % (i + 1) for i in range(200)]
    until(lambda: client._sender is None and client._waiter is None, "the threads of the client stay")


def test_known_failed_and_new_jobs_together(client):
    client.run(add(1))
    jobs = [add(1), make_job("def f():\n    raise ValueError('no')\n"), add(2)]
    values, done = [], threading.Event()
    submit_all(client, jobs, lambda job, outcome, error: (values.append((job, outcome)), len(values) == 3 and done.set()))
    assert done.wait(PATIENCE_S)
    found = {job.checksum: outcome for job, outcome in values}
    assert found[jobs[0].checksum].cached and kind(found[jobs[1].checksum]) == "JobError" and found[jobs[2].checksum].buffer == b"3\n"


def test_a_client_that_was_forgotten_sends_its_jobs_again(client, tmp_path):
    code = "def f(path):\n    import os, time\n    while not os.path.exists(path): time.sleep(0.01)\n    return 1\n"
    values = []
    client.submit(make_job(code, path=str(tmp_path / "go")), lambda outcome, error=None: values.append(outcome or error))
    until(lambda: client._waiter is not None)
    with client.server.jobs._lock:
        forgotten = client.server.jobs._clients.pop(client.name)
        forgotten.arrived.notify_all()
    (tmp_path / "go").write_text("")
    assert until(lambda: values)[0].buffer == b"1\n"


def test_outcomes_are_told_again_until_they_are_acknowledged(client):
    client._post("/jobs", {"client": "c", "jobs": [slow("/dev/null/x").to_dict()], "wait": 0}, 0)
    first = client._post("/wait", {"client": "c", "after": 0, "timeout": 20}, 20)
    again = client._post("/wait", {"client": "c", "after": 0, "timeout": 20}, 20)
    assert first == again and len(first["outcomes"]) == 1
    assert client._post("/wait", {"client": "c", "after": first["last"], "timeout": 0.01}, 20)["outcomes"] == []


@pytest.mark.slow
def test_a_hundred_thousand_queued_jobs(make_server, tmp_path, spec, request):
    if os.path.isdir("/dev/shm"):           # 200,000 small files
        folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        request.addfinalizer(folder.cleanup)
        spec["buffers"]["directory"] = folder.name
    client = make_server(1)
    client.submit(slow(tmp_path / "pid"), lambda *_: None)
    begun(tmp_path / "pid")
    for first in range(0, 100_000, 5000):
        jobs = [add(i) for i in range(first, first + 5000)]
        client._post("/jobs", {"client": "c", "jobs": [job.to_dict() for job in jobs], "wait": 0}, 120)
    assert client.server.jobs.in_flight == 100_001
    assert client.status([add(99_999).checksum])[add(99_999).checksum]["state"] == "queued"


# --- cancelling, limits, deaths

def test_cancel_kills_the_job_and_tells_its_client(client, tmp_path):
    job = slow(tmp_path / "pid")
    values = in_background(client.run, job)
    pid = begun(tmp_path / "pid")
    assert client.cancel([job.checksum]) == {job.checksum: "canceled"}
    assert kind(until(lambda: values)[0]) == "JobCancelledError"
    assert not os.path.exists("/proc/%d" % pid)
    assert client.cancel([job.checksum]) == {job.checksum: "canceled"}


def test_a_job_that_is_asked_for_while_it_is_being_killed_runs_again(client, tmp_path):
    job = slow(tmp_path / "pid")
    values = in_background(client.run, job)
    old = begun(tmp_path / "pid")
    (tmp_path / "pid").unlink()
    with client.server.jobs._lock:
        assert client.server.jobs._withdraw(str(job.checksum), lambda asker: True)
    again = in_background(client.run, job)
    time.sleep(0.05)
    client.server.pool.cancel(str(job.checksum))
    assert begun(tmp_path / "pid") != old and kind(until(lambda: values)[0]) == "JobCancelledError" and not again


def test_cancel_lets_the_job_live_while_another_client_waits_unless_forced(client, tmp_path):
    other = JobserverClient("unix://" + str(tmp_path / "s"), SECRET)
    job, mine, theirs = slow(tmp_path / "pid"), [], []
    client.submit(job, lambda outcome, error=None: mine.append(outcome))
    begun(tmp_path / "pid")
    other.submit(job, lambda outcome, error=None: theirs.append(outcome))
    until(lambda: other._waiter is not None)
    assert client.cancel([job.checksum]) == {job.checksum: "running"}
    assert kind(until(lambda: mine)[0]) == "JobCancelledError" and not theirs
    assert client.cancel([job.checksum], force=True) == {job.checksum: "canceled"}
    assert kind(until(lambda: theirs)[0]) == "JobCancelledError"


@pytest.mark.slow
def test_a_repeated_request_for_a_cancelled_job_does_not_join_the_run_of_somebody_else(client, tmp_path):
    job = slow(tmp_path / "pid")
    body = {"client": "c", "token": "t", "jobs": [job.to_dict()], "wait": 1}
    assert client._post("/jobs", body, 1) == {"outcomes": {}}
    begun(tmp_path / "pid")
    (tmp_path / "pid").unlink()
    client.cancel([job.checksum], force=True)
    others = in_background(client.run, job)
    begun(tmp_path / "pid")
    error = client._post("/jobs", body, 1)["outcomes"][job.checksum]["error"]
    assert error["kind"] == "JobCancelledError" and not others


# --- jobs that are the same and want something else

GATED = "def f(path):\n    import os, time\n    print('run', flush=True)\n    open(path + '.n', 'a').write('x')\n    while not os.path.exists(path): time.sleep(0.01)\n    return 1\n"
AGAIN = Meta(scratch=True, fresh=True)


def gated(tmp_path, meta=Meta()):
    return make_job(GATED, meta, path=str(tmp_path / "go"))


def waiting(client, count):
    """Wait until so many runs are noted for later."""
    until(lambda: sum(map(len, client.server.jobs._later.values())) == count)


@pytest.fixture
def other(client, tmp_path):
    other = JobserverClient("unix://" + str(tmp_path / "s"), SECRET)
    yield other
    other.close()


def test_a_job_that_is_only_computed_again_is_not_what_others_get(client, other, tmp_path, spec):
    values = [in_background(client.run, gated(tmp_path, AGAIN))]
    until((tmp_path / "go.n").exists)
    heard = []
    values += [in_background(other.run, gated(tmp_path), on_log=heard.append), in_background(client.run, gated(tmp_path)),
               in_background(other.run, gated(tmp_path, AGAIN))]
    waiting(client, 1)
    until(lambda: len(client.server.jobs._later[gated(tmp_path).checksum][0].askers) == 2)
    until(lambda: len(client.server.jobs._entries[gated(tmp_path).checksum].askers) == 2)
    (tmp_path / "go").write_text("")
    assert {until(lambda: value)[0].buffer for value in values} == {b"1\n"} and (tmp_path / "go.n").read_text() == "xx"
    assert b"".join(heard) == b"run\n"
    stores = open_stores(spec)
    assert stores.results.get(gated(tmp_path).checksum) == values[1][0].result and stores.buffers.has([values[1][0].result]) == [True]
    stores.close()
    assert not client.server.jobs.in_flight and not client.server.jobs._later


def test_a_known_result_is_given_while_it_is_computed_again(client, other, tmp_path):
    (tmp_path / "go").write_text("")
    client.run(gated(tmp_path))
    (tmp_path / "go").unlink()
    values = in_background(client.run, gated(tmp_path, AGAIN))
    until(lambda: (tmp_path / "go.n").read_text() == "xx")
    assert other.run(gated(tmp_path)).cached and not values
    (tmp_path / "go").write_text("")
    assert not until(lambda: values)[0].cached


def test_what_a_run_that_is_being_recorded_was_not_asked_to_keep_is_run_again_for_who_wants_it_kept(client, other, tmp_path, monkeypatch):
    """The commit takes so long that somebody asks meanwhile."""
    table, committing, go = client.server.jobs.stores.results, threading.Event(), threading.Event()
    put_many = table.put_many

    def slowly(*args):
        committing.set()
        assert go.wait(20)
        return put_many(*args)
    monkeypatch.setattr(table, "put_many", slowly)
    (tmp_path / "go").write_text("")
    scratch = in_background(client.run, gated(tmp_path, Meta(scratch=True)))
    assert committing.wait(20)
    kept = in_background(other.run, gated(tmp_path))
    until(lambda: client.server.jobs._later or len(client.server.jobs._entries[gated(tmp_path).checksum].askers) == 2)
    go.set()
    assert until(lambda: scratch and kept) and client.server.jobs.stores.buffers.has([kept[0].result]) == [True]


@pytest.mark.parametrize("written_first", [True, False])
def test_a_job_that_is_written_to_a_folder_and_the_one_that_runs_are_two(make_server, tmp_path, written_first):
    client = make_server(1)
    other = JobserverClient("unix://" + str(tmp_path / "s"), SECRET)
    hold = in_background(client.run, make_job(GATED, path=str(tmp_path / "hold")))
    until((tmp_path / "hold.n").exists)
    job = make_job("cat n > RESULT; exit 3", output=("result", "bytes", None), language="bash", n=5)
    metas = [Meta(job_folder=str(tmp_path / "job")), Meta()] if written_first else [Meta(), Meta(job_folder=str(tmp_path / "job"))]
    values = []
    for one, meta in zip((client, other), metas):
        values.append(in_background(one.run, job._replace(meta=meta)))
        until(lambda: client.server.jobs.in_flight == len(values) + 1)
    (tmp_path / "hold").write_text("")
    assert [kind(until(lambda: value)[0]) for value in values] == (["JobWritten", "JobError"] if written_first else ["JobError", "JobWritten"])
    assert until(lambda: hold) and (tmp_path / "job" / "transform.sh").exists()
    other.close()


def test_one_client_submits_a_job_and_the_same_to_be_written(client, tmp_path):
    job, told = make_job("cat n > RESULT", output=("result", "bytes", None), language="bash", n=5), {}
    for name, meta in (("written", Meta(job_folder=str(tmp_path / "job"))), ("run", Meta())):
        client.submit(job._replace(meta=meta), lambda outcome, error, name=name: told.update({name: outcome}))
    until(lambda: len(told) == 2)
    assert kind(told["written"]) == "JobWritten" and told["run"].buffer == b"5\n"


def test_a_job_that_waits_for_another_run_can_be_cancelled(client, other, tmp_path):
    values = in_background(client.run, gated(tmp_path, AGAIN))
    until((tmp_path / "go.n").exists)
    theirs = in_background(other.run, gated(tmp_path))
    waiting(client, 1)
    assert other.cancel([gated(tmp_path).checksum]) == {gated(tmp_path).checksum: "running"}
    assert kind(until(lambda: theirs)[0]) == "JobCancelledError" and not values
    (tmp_path / "go").write_text("")
    assert until(lambda: values)[0].buffer == b"1\n" and (tmp_path / "go.n").read_text() == "x"
    until(lambda: not client.server.jobs.in_flight)


def test_a_driver_on_one_worker_whose_child_is_being_computed_again(make_server, tmp_path):
    """The child waits for the other run, and then needs the slot of the driver."""
    client = make_server(1)
    child = "def f(path):\n    import os, time\n    open(path, 'a').write('x')\n    while os.path.getsize(path) < 2: time.sleep(0.01)\n    return 4\n"
    path = tmp_path / "n"
    job = make_job(child, path=str(path))
    values = in_background(client.run, job._replace(meta=AGAIN))
    until(path.exists)
    driver = in_background(client.run, nested("return call(%r, path=path)" % child, path=str(path)))
    until(lambda: client.server.jobs.in_flight == 2)
    client.server.pool.workers = 2          # the driver begins, and asks
    client.server.pool.prestart()
    with client.server.pool._changed:
        client.server.pool._dispatch()
    waiting(client, 1)
    client.server.pool.workers = 1
    path.write_text("xx")
    assert until(lambda: values)[0].buffer == b"4\n" and until(lambda: driver)[0].buffer == b"4\n"
    assert path.read_text() == "xxx"


def test_a_strict_job_with_nonsense_for_variables_costs_no_other(client, other, tmp_path):
    in_background(client.run, gated(tmp_path))
    until((tmp_path / "go.n").exists)
    bad = {**gated(tmp_path).to_dict(), "meta": {"strict": True, "metavars": 5}}
    answer = other._post("/jobs", {"client": "c", "jobs": [bad, add(2).to_dict()], "wait": 20}, 20)
    (tmp_path / "go").write_text("")
    assert answer["outcomes"][add(2).checksum]["result"] and "malformed" in answer["outcomes"][bad["checksum"]]["error"]["message"]


def test_a_shell_job_is_killed_with_its_whole_group(client, tmp_path):
    job = make_job("echo $$ > %s; sleep 300 & sleep 300" % (tmp_path / "pid"), language="bash", output=("result", "bytes", None))
    in_background(client.run, job)
    pid = begun(tmp_path / "pid")
    client.cancel([job.checksum])
    until(lambda: b"sleep 300" not in subprocess.run(["ps", "-o", "args=", "-g", str(pid)], stdout=subprocess.PIPE).stdout)


def test_the_time_limit_of_a_job_is_kept(client, tmp_path):
    outcome = client.run(slow(tmp_path / "pid", timeout_s=0.3))
    assert kind(outcome) == "DeadlineError" and client.run(add(1)).buffer == b"2\n"


def test_a_client_may_give_up_waiting(client, tmp_path):
    with pytest.raises(SeamlessError, match="given up after 0.3 s"):
        client.run(slow(tmp_path / "pid"), deadline_s=0.3)
    until(lambda: not client.server.busy(), "the job was not cancelled")


def test_a_worker_that_dies_twice_is_the_jobs_failure(client):
    outcome = client.run(make_job("def f():\n    import os\n    print('last words', flush=True)\n    os._exit(9)\n"))
    assert kind(outcome) == "WorkerDiedError" and "exit code 9" in outcome.error["message"] and "last words" in outcome.logs


def test_whatever_a_function_does_the_worker_goes_on(make_server):
    client, pids = make_server(1), set()
    for body in ["raise SystemExit(3)", "raise KeyboardInterrupt", "raise MemoryError", "f()",
                 "import sys; sys.stdout.close(); sys.stderr.close(); raise ValueError",
                 "import os; os.close(1); os.close(2); raise ValueError"]:
        assert kind(client.run(make_job("def f():\n    %s\n" % body))) == "JobError", body
        outcome = client.run(make_job("def f():\n    import os\n    print('fine')\n    return os.getpid()\n# " + body))
        assert outcome.logs == "fine\n", body
        pids.add(outcome.buffer)
    assert len(pids) == 1


def test_processes_that_a_job_leaves_behind_end_with_it(client, tmp_path):
    code = "def f():\n    import subprocess\n    return subprocess.Popen(['sleep', '300']).pid\n"
    pid = int(client.run(make_job(code)).buffer)
    assert not os.path.exists("/proc/%d" % pid)


def test_a_forked_child_that_returns_does_not_answer_for_the_job(client):
    assert client.run(make_job("def f():\n    import os, time\n    if os.fork(): time.sleep(0.3); return 'parent'\n    return 'child'\n")).buffer == b'"parent"\n'


# --- output

def test_output_comes_while_the_job_runs(client, tmp_path):
    code = ("def f(path):\n    import os, subprocess, time\n    print('one')\n    subprocess.run(['echo', 'two'])\n    os.write(2, b'three\\n')\n"
            "    while not os.path.exists(path): time.sleep(0.01)\n    print('four')\n    return 1\n")
    heard = []
    values = in_background(client.run, make_job(code, path=str(tmp_path / "go")), on_log=heard.append)
    until(lambda: b"".join(heard) == b"one\ntwo\nthree\n")
    (tmp_path / "go").write_text("")
    outcome = until(lambda: values)[0]
    assert b"".join(heard) == b"one\ntwo\nthree\nfour\n" and outcome.logs == "one\ntwo\nthree\nfour\n"


def test_a_megabyte_of_output_of_a_quick_job_comes_whole(client):
    heard = []
    outcome = client.run(make_job("def f():\n    print('x' * 1_000_000)\n    return 1\n"), on_log=heard.append)
    assert len(b"".join(heard)) == 1_000_001 and len(outcome.logs) == 1 << 16


def test_logs_and_status_can_be_asked_for_afterwards(client):
    job = make_job("def f():\n    print('hello')\n    return 1\n")
    client.run(job)
    assert client.logs(job.checksum) == (6, b"hello\n", True)
    assert client.status([job.checksum, "0" * 64]) == {
        job.checksum: {"state": "done", "outcome": client.status([job.checksum])[job.checksum]["outcome"]}, "0" * 64: {"state": "unknown"}}


# --- jobs that have jobs

NESTED = """
def drive(%(parameters)s):
    import importlib
    worker = importlib.import_module("seamless_lite.worker")
    transformation = importlib.import_module("seamless_lite.transformation")
    celltypes = importlib.import_module("seamless_lite.celltypes")
    JobserverClient = importlib.import_module("seamless_lite.jobclient").JobserverClient
    Checksum = importlib.import_module("seamless_lite.checksum").Checksum
    context = worker.current()
    client = JobserverClient(context.address, context.secret)
    def job(source, **values):
        buffers = {}
        def pin(value, celltype):
            data = celltypes.serialize(value, celltype)
            buffers[Checksum.of(data)] = data
            return Checksum.of(data)
        pins = {name: ("mixed", None, pin(value, "mixed")) for name, value in values.items()}
        pins["code"] = ("python", "transformer", pin(source, "python"))
        return transformation.Job(transformation.Recipe("python", pins), transformation.Meta(), buffers)
    def call(source, **values):
        outcome = client.run(job(source, **values), parent=context.job_id)
        if outcome.error:
            raise outcome.exception()
        return celltypes.deserialize(outcome.buffer, "mixed")
%(body)s
"""


def nested(body, **values):
    code = NESTED % {"parameters": ", ".join(values), "body": "\n".join("    " + line for line in body.splitlines())}
    return make_job(code, **values)


def test_a_driver_with_a_hundred_children_on_one_worker(make_server):
    client = make_server(1)
    outcome = client.run(nested("return sum(call('def f(a):\\n    return a * 2\\n', a=i) for i in range(n))", n=100), deadline_s=60)
    assert outcome.buffer == b"9900\n"


def test_a_driver_that_submits_its_children_together(make_server):
    client = make_server(1)
    body = """
import threading
done, values = threading.Event(), []
def collect(j, outcome, error):
    values.append(outcome or error)
    if len(values) == n: done.set()
jobs = [job('def f(a):\\n    return a * 3\\n', a=i) for i in range(n)]
for each in jobs: client.submit(each, lambda outcome, error=None, each=each: collect(each, outcome, error), context.job_id)
done.wait(60)
return sum(int(value.buffer) for value in values)"""
    assert client.run(nested(body, n=50), deadline_s=60).buffer == b"%d\n" % (3 * sum(range(50)))


@pytest.mark.slow
def test_jobs_twenty_deep_on_one_worker(make_server):
    client = make_server(1)
    body = "return 0 if n == 0 else 1 + call(again, n=n - 1, again=again)"
    code = NESTED % {"parameters": "n, again", "body": "    " + body}
    assert client.run(make_job(code, n=20, again=code), deadline_s=60).buffer == b"20\n"
    until(lambda: len(client.server.pool.pids()) <= 1, "spare workers stay")


def test_a_job_that_would_wait_for_itself_fails(make_server):
    client = make_server(1)
    code = NESTED % {"parameters": "again", "body": "    return call(again, again=again)"}
    outcome = client.run(make_job(code, again=code), deadline_s=60)
    assert kind(outcome) == "JobError" and "waits for it" in outcome.error["message"]


def test_the_children_of_a_job_that_was_cancelled_are_cancelled(make_server, tmp_path):
    client = make_server(1)
    body = "return call('def f(path):\\n    import os, time\\n    open(path, \"w\").write(str(os.getpid()))\\n    time.sleep(300)\\n', path=path)"
    job = nested(body, path=str(tmp_path / "pid"))
    values = in_background(client.run, job)
    pid = begun(tmp_path / "pid")
    assert client.status([job.checksum])[job.checksum]["state"] == "waiting"
    client.cancel([job.checksum])
    assert kind(until(lambda: values)[0]) == "JobCancelledError"
    until(lambda: not os.path.exists("/proc/%d" % pid), "the child goes on")


def test_a_failure_of_a_child_is_the_drivers_to_handle(make_server):
    outcome = make_server(1).run(nested("return call('def f(a):\\n    raise ValueError(a)\\n', a=word)", word="deep"))
    assert kind(outcome) == "JobError" and "deep" in outcome.error["message"]


# --- what jobs leave behind

STATE = """
def f(change):
    import decimal, locale, os, signal, sys, warnings
    old = [os.listdir("."), os.environ.get("LEAK"), "HOME" in os.environ, os.umask(0o22), sys.path[:1] == ["/evil"], sys.getrecursionlimit(),
           str(signal.getsignal(signal.SIGINT)), signal.getitimer(signal.ITIMER_REAL)[0], decimal.getcontext().prec,
           locale.setlocale(locale.LC_ALL), warnings.filters[0][0], sys.gettrace() is None, sorted(map(str, signal.pthread_sigmask(0, ())))]
    if change == 1:
        open("file", "w").close()
        os.chdir("/tmp")
        os.environ["LEAK"] = "1"
        del os.environ["HOME"]
        os.umask(0o77)
        sys.path.insert(0, "/evil")
        sys.setrecursionlimit(5000)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 200)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        decimal.getcontext().prec = 5
        locale.setlocale(locale.LC_ALL, "C")
        warnings.simplefilter("error")
        sys.settrace(lambda *_: None)
    return old, os.getpid()
"""


def test_a_job_finds_the_process_as_the_first_one_did(make_server):
    client = make_server(1)
    (first, pid), (second, again) = [json.loads(client.run(make_job(STATE, change=i)).buffer) for i in (1, 2)]
    assert first == second
    assert pid == again, "putting back is cheaper than a new process"


def test_random_numbers_do_not_go_on_from_the_seed_of_another_job(make_server):
    client = make_server(1)
    code = "def f(seed):\n    import random\n    if seed: random.seed(seed)\n    return random.random()\n"
    client.run(make_job(code, seed=1))
    seeded = random.Random(1)
    assert float(client.run(make_job(code, seed=0)).buffer) not in (seeded.random(), seeded.random())


@pytest.mark.parametrize("change", [
    "import math; math.leak = 1", "import builtins; builtins.leak = 1", "import os; os.getcwd = None", "import os; os.environ = {}",
    "import os; os.nice(1)", "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))",
    "import sys; sys.path.insert(0, folder); import leaking_module", "import signal; signal.setitimer = None"])
@pytest.mark.slow
def test_a_process_that_cannot_be_put_back_runs_no_other_job(make_server, tmp_path, change):
    client = make_server(1)
    (tmp_path / "leaking_module.py").write_text("")
    job = make_job("def f(folder):\n    %s\n    from os import getpid\n    return getpid()\n" % change, folder=str(tmp_path))
    outcome = client.run(job)
    assert outcome.error is None
    assert client.run(make_job("def f():\n    from os import getpid\n    return getpid()\n")).buffer != outcome.buffer


def test_each_job_has_a_working_folder_of_its_own(client, spec):
    code = "def f(a):\n    import os\n    open('file', 'w').close()\n    return os.getcwd(), os.listdir('.')\n"
    folders = [json.loads(client.run(make_job(code, a=i)).buffer) for i in range(3)]
    assert [files for _, files in folders] == [["file"]] * 3
    assert len({folder for folder, _ in folders}) == 3
    until(lambda: not any(os.path.exists(folder) for folder, _ in folders), "a working folder was left")


def test_a_process_without_parent_session_and_environment_ends_with_its_job(client, tmp_path):
    code = ("def f(path):\n    import os, subprocess, time\n"
            "    subprocess.run(\"(setsid env -i sh -c 'echo $$ > \" + path + \"; exec sleep 300' &)\", shell=True)\n"
            "    while not os.path.exists(path) or not os.path.getsize(path): time.sleep(0.01)\n    return int(open(path).read())\n")
    pid = int(client.run(make_job(code, path=str(tmp_path / "pid"))).buffer)
    assert not os.path.exists("/proc/%d" % pid)


# --- when the folder of the pool is removed

@pytest.fixture
def unix_server(make_server, monkeypatch):
    """A client of a jobserver whose workers reach it through a Unix socket: its path must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        client = make_server(1)
        assert client.server._workers._inner[0].address.startswith("unix:")
        yield client
        client.server.pool.close()
        assert not os.listdir(folder)


def remove(folder):
    """Also while a worker that is not needed any more removes its log in it, or the pool makes its socket again."""
    shutil.rmtree(folder, ignore_errors=True)


def test_jobs_run_and_print_after_the_folder_was_removed(client):
    client.run(add(1))
    folder = pathlib.Path(client.server.pool.folder)
    for i in range(2):
        remove(folder)
        heard = []
        outcome = client.run(make_job("def f(i):\n    print('hello')\n    return i\n", i=i), on_log=heard.append)
        assert outcome.buffer == b"%d\n" % i and heard == [b"hello\n"]
        assert folder.stat().st_mode & 0o777 == 0o700
    remove(folder)
    assert client.run(make_job("echo hi > RESULT", output=("result", "text", None), language="bash")).error is None


def test_a_job_can_have_jobs_after_the_folder_was_removed(unix_server):
    client = unix_server
    body = "return call('def f(a):\\n    return a + 1\\n', a=a)"
    assert client.run(nested(body, a=1)).buffer == b"2\n"
    remove(client.server.pool.folder)
    assert client.run(nested(body, a=2), deadline_s=60).buffer == b"3\n"


@pytest.mark.slow
def test_a_running_job_can_soon_have_jobs_again_when_the_folder_is_removed(unix_server, tmp_path):
    client = unix_server
    body = ("import os, time\nopen(go + '.begun', 'w').close()\nwhile not os.path.exists(go): time.sleep(0.01)\n"
            "return call('def f(a):\\n    return a + 1\\n', a=1)")
    values = in_background(client.run, nested(body, go=str(tmp_path / "go")), deadline_s=60)
    until(lambda: (tmp_path / "go.begun").exists())
    folder = pathlib.Path(client.server.pool.folder)
    remove(folder)
    until(lambda: (folder / "socket").exists(), "it does not listen again")
    (tmp_path / "go").write_text("")
    assert until(lambda: values)[0].buffer == b"2\n"


# --- clients that are interrupted, and that fork

def test_a_job_is_cancelled_when_its_client_is_interrupted(client, tmp_path):
    job = slow(tmp_path / "pid")

    def interrupt():
        begun(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.run(job)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert client.status([job.checksum])[job.checksum]["state"] == "canceled"


def test_a_job_is_cancelled_when_its_output_cannot_be_passed_on(client):
    job = make_job("def f():\n    import time\n    print('x')\n    time.sleep(300)\n")

    def full(data):
        raise OSError("full")
    with pytest.raises(OSError, match="full"):
        client.run(job, on_log=full)
    assert client.status([job.checksum])[job.checksum]["state"] == "canceled"


@pytest.mark.slow
def test_a_forked_child_is_a_client_of_its_own(client, tmp_path):
    client.submit(slow(tmp_path / "pid"), lambda outcome, error=None: None)
    begun(tmp_path / "pid")
    until(lambda: client._waiter is not None)          # both of its threads were there
    client.submit(add(0), lambda outcome, error=None: None)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(PATIENCE_S)
            values = []
            for i in range(20):
                client.submit(add(100 + i), lambda outcome, error=None: values.append(int(outcome.buffer)))
            until(lambda: len(values) == 20)
            os.write(write, json.dumps([sum(values), client.name, len(client._pending)]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    assert answer, "the child hung"
    total, name, pending = json.loads(answer)
    assert total == sum(range(101, 121)) and name != client.name and pending == 0
    assert client.run(add(1000)).buffer == b"1001\n"



# --- who may, and what else comes

def test_unsigned_and_wrongly_signed_requests_are_refused(client, tmp_path):
    for secret in (None, b"another secret of thirty-two bytes"):
        with pytest.raises(ServiceError):
            JobserverClient("unix://" + str(tmp_path / "s"), secret).run(add(1))


def test_workers_never_see_the_secret_of_the_user(client):
    code = ("def f():\n    import importlib, os, sys\n    context = importlib.import_module('seamless_lite.worker').current()\n"
            "    return [context.secret.hex(), str(dict(os.environ)), str(sys.argv), context.address]\n")
    secret, *rest = json.loads(client.run(make_job(code)).buffer)
    assert secret != SECRET.hex() and secret not in str(rest) and SECRET.decode() not in str(rest)


def test_a_nonsensical_request_gets_one_sentence(client):
    for target, body in [
            ("/jobs", []), ("/jobs", {"client": "c"}), ("/jobs", {"jobs": []}), ("/jobs", {"client": "c", "jobs": [1]}),
            ("/jobs", {"client": "c", "jobs": [], "wait": "x"}), ("/wait", {"client": 5}), ("/wait", {"client": "c", "after": -1}),
            ("/status", {"ids": 5}), ("/logs", {}), ("/cancel", {"client": "c", "ids": [5]})]:
        with pytest.raises(SeamlessError) as caught:
            client._post(target, body, 0)
        assert not isinstance(caught.value, ServiceError) and len(str(caught.value)) < 200, target


# --- Seamless 1.x

def request_of(job, **changes):
    transformation = {**job.recipe.to_dict(), "__meta__": {"local": False}, "__code_checksum__": job.recipe.pins["code"][2]}
    return {"transformation_dict": transformation, "tf_checksum": job.checksum, "tf_dunder": {"__deps__": {}}, "scratch": False,
            "strict_dunder": False, "record": False, **changes}


@pytest.fixture
def old(make_server, tmp_path):
    """A client of Seamless 1.x: it has put everything into the store before it asks."""
    server = make_server(2, secret=None).server
    http = HttpClient("unix://" + str(tmp_path / "s"))

    def get(target, body=None, method="GET"):
        for data in body.get("store", {}).values() if isinstance(body, dict) else ():
            server.jobs.stores.buffers.put(data)
        data = body if isinstance(body, bytes) else json.dumps({k: v for k, v in (body or {}).items() if k != "store"}).encode()
        answer = http.request(method, target, body=data)
        return answer.status, answer.body.decode()
    return get


def test_seamless_runs_a_job(old):
    job = add(4)
    status, text = old("/run-transformation", request_of(job, store=job.buffers))
    assert status == 200 and json.loads(text)["result_checksum"] == Checksum.of(b"5\n")
    assert set(json.loads(text)["record_runtime"]) == {"started_at", "finished_at", "wall_time_seconds", "cpu_user_seconds",
                                                       "cpu_system_seconds", "memory_peak_bytes", "gpu_memory_peak_bytes"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", json.loads(text)["record_runtime"]["started_at"])
    assert old("/transformation-status/" + job.checksum) == (200, '{"status":"done"}')


def test_seamless_repeats_a_failed_job_five_times_and_it_runs_once(old, tmp_path):
    job = make_job(COUNT, path=str(tmp_path / "n"), word="c")
    answers = {old("/run-transformation", request_of(job, store=job.buffers)) for _ in range(5)}
    (status, text), = answers
    assert status == 500 and "ValueError: c" in text and (tmp_path / "n").read_text() == "x"
    assert old("/transformation-status/" + job.checksum) == (200, '{"status":"failed"}')


def test_seamless_cancels_a_job(old, tmp_path):
    job = slow(tmp_path / "pid")
    values = in_background(old, "/run-transformation", request_of(job, store=job.buffers))
    begun(tmp_path / "pid")
    assert old("/transformation-status/" + job.checksum) == (200, '{"status":"running"}')
    assert json.loads(old("/cancel-transformation/" + job.checksum, method="POST")[1]) == {"canceled": True, "status": "canceled"}
    assert until(lambda: values)[0] == (200, "Transformation was canceled")
    assert json.loads(old("/cancel-transformation/" + job.checksum, method="POST")[1])["canceled"] is False


def test_seamless_gets_variables_that_are_not_part_of_the_identity(old):
    job = make_job("echo $META__WORD > RESULT", language="bash", output=("result", "bytes", None))
    word = celltypes.serialize("moin", "str")
    body = request_of(job, store={**job.buffers, 1: word})
    body["transformation_dict"]["META__WORD"] = ["str", None, Checksum.of(word)]
    status, text = old("/run-transformation", body)
    assert status == 200 and json.loads(text)["result_checksum"] == Checksum.of(b"moin\n")


def test_seamless_sends_nonsense(old):
    assert old("/")[1] == "Seamless jobserver is running"
    assert old("/run-transformation", b"{")[0] == 400 and old("/run-transformation", b"{")[1].startswith("Invalid JSON: ")
    assert old("/run-transformation", {"tf_checksum": 5})[1].startswith("Invalid payload: ")
    assert old("/run-transformation", request_of(add(1), tf_checksum="0" * 64))[0] == 400
    assert old("/run-transformation", request_of(add(1), record=True))[0] == 409
    assert old("/transformation-status/xyz")[0] == 400
    assert old("/transformation-status/" + "0" * 64) == (200, '{"status":"not-running"}')


# --- the program

@pytest.fixture
def program(tmp_path, spec, home):
    """``program(...)`` -> (process, client) of ``bin/seamless-jobserver``."""
    started = []
    (tmp_path / "ptmp").mkdir()

    def begin(*args, stores=True, stdin=subprocess.DEVNULL):
        (tmp_path / "secret").write_bytes(SECRET.hex().encode())
        (tmp_path / "secret").chmod(0o600)
        argv = [sys.executable, str(ROOT / "bin" / "seamless-jobserver"), "--socket", str(tmp_path / "p"), "--secret-file",
                str(tmp_path / "secret"), *args] + (["--stores", json.dumps(spec)] if stores else [])
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(argv, stdin=stdin, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(tmp_path / "ptmp")})
        started.append(process)
        until(lambda: (tmp_path / "p").exists() or process.poll() is not None)
        from seamless_lite.signing import load_secret
        return process, JobserverClient("unix://" + str(tmp_path / "p"), load_secret(str(tmp_path / "secret")))
    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()             # kill -9 within its first moments leaves its folder: no worker knows it yet
        process.wait(PATIENCE_S)
    until(lambda: not [pid for pid, mark in marked() if mark.split("-")[0] in {str(p.pid) for p in started}], "a process was left")
    until(lambda: not list((tmp_path / "ptmp").iterdir()), "a file was left")


DETACHED = ("def f(path):\n    import os, subprocess, time\n    p = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
            "    with open(path, 'w') as f: f.write(str(p.pid))\n    time.sleep(300)\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_nothing_is_left_when_the_jobserver_is_stopped_or_killed(program, tmp_path, number):
    process, client = program("--workers", "2")
    values = in_background(client.run, make_job(DETACHED, path=str(tmp_path / "pid")))
    shell = make_job("echo $$ > %s; sleep 300" % (tmp_path / "pid2"), language="bash", output=("result", "bytes", None))
    in_background(client.run, shell)
    begun(tmp_path / "pid"), begun(tmp_path / "pid2")
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == (0 if number != signal.SIGKILL else -9)
    assert isinstance(until(lambda: values)[0], ServiceError)


def test_the_private_jobserver_of_a_session_ends_with_it(program):
    process, client = program("--workers", "1", "--exit-with-stdin", stdin=subprocess.PIPE)
    client.run(add(1))
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_idle_time_begins_when_the_last_job_has_ended(program):
    process, client = program("--workers", "1", "--timeout", "0.3")
    job = make_job("def f():\n    import time\n    time.sleep(1)\n    return 1\n")
    client._post("/jobs", {"client": "c", "jobs": [job.to_dict()], "wait": 0}, 0)
    assert process.wait(PATIENCE_S) == 0
    _, again = program("--workers", "1")
    assert again.status([job.checksum])[job.checksum]["state"] == "done"


def test_stores_come_from_the_status_file(program, tmp_path, spec):
    file = tmp_path / "status.json"
    file.write_text(json.dumps({"parameters": {"stores": spec}, "other": 1}))
    _, client = program("--status-file", str(file), stores=False)
    assert client.run(add(1)).buffer == b"2\n"
    assert json.loads(file.read_text())["status"] == "running" and json.loads(file.read_text())["other"] == 1
    assert list(pathlib.Path(spec["buffers"]["directory"]).rglob(str(client.run(add(1)).result)))


def test_stores_of_seamless_come_from_the_status_file(program, tmp_path, spec):
    file = tmp_path / "status.json"
    file.write_text(json.dumps({"parameters": {"buffer": [{"readonly": False, "remote_directory": spec["buffers"]["directory"]}], "database": []}}))
    _, client = program("--status-file", str(file), stores=False)
    assert client.run(add(1)).buffer == b"2\n"


def test_a_jobserver_without_stores_does_not_start(program, tmp_path):
    process, _ = program(stores=False)
    assert process.wait() == 1 and "--stores" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("argv", [["--workers", "0"], ["--workers", "x"]])
def test_a_senseless_command_line_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert "--workers" in capsys.readouterr().err


# --- run_job in this process

def test_run_job_records_looks_up_and_never_raises(spec):
    stores = open_stores(spec)
    assert run_job(add(1), stores).buffer == b"2\n" and run_job(add(1), stores).cached
    assert kind(run_job(make_job("def f():\n    raise SystemExit\n"), stores)) == "JobError"
    missing = Job(add(7).recipe)
    assert kind(run_job(missing, stores)) == "CacheMissError"
    cancelled = threading.Event()
    cancelled.set()
    assert kind(run_job(add(3), stores, cancelled=cancelled)) == "JobCancelledError"
    assert not run_job(add(5), stores, record=False).cached and stores.results.get(add(5).checksum) is None


@pytest.mark.parametrize("files, expected", [
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"}, 1),
    ({"proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ({}, None)])
def test_usable_cpus_counts_quotas(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(str(tmp_path)) == (expected or len(os.sched_getaffinity(0)))
