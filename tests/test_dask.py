"""The daskserver as the program, with a real LocalCluster, real worker processes and real stores."""
import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from seamless_lite import executors, services
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError, ServiceError
from seamless_lite.folder import MemoryBuffers
from seamless_lite.httpclient import HttpClient
from seamless_lite.jobclient import JobserverClient
from seamless_lite.pool import WorkerPool
from seamless_lite.stores import open_stores
from seamless_lite.transformation import Meta
from test_jobserver import SECRET, add, begun, in_background, kind, make_job, nested, slow, submit_all, until

distributed = pytest.importorskip("distributed", reason="dask is not installed")

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Server:
    """A daskserver in ``folder``, and a client of it."""

    def __init__(self, folder, *options, workers=1, auth=True, env=(), **parameters):
        self.folder = pathlib.Path(folder)
        (self.folder / "store").mkdir(exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        self.spec = {"buffers": {"directory": str(self.folder / "store")}, "results": {"file": str(self.folder / "store/seamless.db")}}
        status = self.folder / ("status-%s.json" % os.urandom(4).hex())
        status.write_text(json.dumps({"parameters": {"stores": self.spec, "type": "local", **parameters}}))
        self.secret = SECRET if auth else None
        socket = self.folder / ("s" + os.urandom(2).hex())
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "seamless_lite.daskserver", "--status-file", str(status), "--socket", str(socket), "--workers",
                 str(workers), "--auth", "hmac" if auth else "none", "--secret-stdin", *options],
                stdin=subprocess.PIPE, stderr=log, stdout=log, cwd=str(self.folder),
                env={**os.environ, "HOME": str(self.folder), "SEAMLESS_HOME": str(self.folder / "seamless"), "PYTHONPATH": str(ROOT),
                     "TMPDIR": str(self.folder / "tmp"), **dict(env)})
        self.process.stdin.write(SECRET.hex().encode() + b"\n")
        self.process.stdin.close()
        until(lambda: json.loads(status.read_text()).get("status") or self.process.poll() is not None)
        self.status = json.loads(status.read_text())
        if self.status.get("status") == "running":
            self.client = JobserverClient("unix://%s" % socket, self.secret)
            self.http = HttpClient("unix://%s" % socket, self.secret)

    def log(self):
        return (self.folder / "log").read_text()

    def info(self):
        return self.http.request("GET", "/info").expect(200).json()

    def dask(self):
        return self.http.request("POST", "/dask", json={})

    def security(self, **changes):
        keys = {**self.dask().expect(200).json(), **changes}
        return distributed.Security(tls_ca_file=keys["ca"], tls_client_cert=keys["cert"], tls_client_key=keys["key"], require_encryption=True)

    @contextlib.contextmanager
    def dask_client(self):
        with distributed.Client(self.dask().json()["scheduler"], security=self.security(), set_as_default=False, timeout=10) as client:
            yield client

    def processes(self):
        """All that the daskserver started, and itself."""
        return family(self.process.pid)

    def stop(self, number=signal.SIGTERM):
        pids = self.processes()
        self.process.send_signal(number)
        self.process.wait(20)
        until(lambda: not any(map(alive, pids)), "processes are left: %s" % [pid for pid in pids if alive(pid)])


def alive(pid):
    try:
        return pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def family(root):
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(name)] = int(pathlib.Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def dask_worker(server):
    """The process of the Dask worker: the one whose children are worker processes."""
    def look():
        for pid in server.processes():
            with contextlib.suppress(OSError):
                if b"seamless_lite.worker" in pathlib.Path("/proc/%d/cmdline" % pid).read_bytes():
                    return int(pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[1])
    return until(look, "there is no worker process")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A daskserver with one slot, for all tests that leave it as it was."""
    server = Server(tmp_path_factory.mktemp("dask"))
    yield server
    server.stop()
    assert os.listdir(server.folder / "tmp") == []


@pytest.fixture
def make(tmp_path):
    servers = []

    def make(*options, **keys):
        servers.append(Server(tmp_path, *options, **keys))
        return servers[-1]
    yield make
    for server in servers:
        if server.process.poll() is None:
            server.stop()


# --- jobs

def test_a_result_is_recorded_by_the_worker_before_it_is_told(shared):
    job = add(41)
    outcome = shared.client.run(job)
    assert outcome.buffer == b"42\n" and not outcome.cached
    stores = open_stores(shared.spec)
    assert stores.results.get(job.checksum) == outcome.result and stores.buffers.get(outcome.result) == b"42\n"
    texts = [text for (text,) in stores.results.query("SELECT metadata FROM meta_data") if str(job.checksum) in text]
    assert json.loads(texts[0])["remote_target"] == "daskserver" and json.loads(texts[0])["execution_mode"] == "remote"
    stores.close()
    assert shared.client.run(job).cached


def test_a_command_runs_and_its_stderr_is_streamed(shared, tmp_path):
    go, heard = tmp_path / "go", []
    job = make_job("echo begun >&2; while [ ! -e %s ]; do sleep 0.02; done; echo done >&2; echo hi > RESULT" % go,
                   output=("result", "text", None), language="bash")
    values = in_background(shared.client.run, job, on_log=heard.append)
    until(lambda: b"".join(heard) == b"begun\n")
    assert shared.client.status([job.checksum])[str(job.checksum)]["state"] == "running"
    go.write_text("")
    outcome = until(lambda: values)[0]
    assert outcome.buffer == b"hi\n" and outcome.logs == "begun\ndone\n" and b"".join(heard) == b"begun\ndone\n"


def test_all_that_a_job_printed_can_be_read_when_it_has_ended_however_much(shared):
    job = make_job("def f(n):\n    for i in range(n):\n        print('line', i)\n", n=200_000)
    assert shared.client.run(job).logs.endswith("line 199999\n")
    offset, data, done = 0, b"", False
    while not done:
        offset, piece, done = shared.client.logs(job.checksum, offset, 5)
        data += piece
    assert data == b"".join(b"line %d\n" % i for i in range(200_000))


def test_what_a_function_raises_is_told_with_its_traceback_and_output_and_not_recorded(shared):
    job = make_job("def f(a):\n    print('so far')\n    raise ValueError('too bad')\n", a=1)
    outcome = shared.client.run(job)
    assert kind(outcome) == "JobError" and "ValueError: too bad" in str(outcome.exception()) and outcome.logs == "so far\n"
    assert kind(shared.client.run(job)) == "JobError"


def test_the_same_job_of_two_clients_is_one(shared, tmp_path):
    go, mark = tmp_path / "go", tmp_path / "mark"
    job = make_job("def f(go, mark):\n    import os, time\n    open(mark, 'a').write('x')\n    while not os.path.exists(go): time.sleep(0.02)\n"
                   "    return 1\n", go=str(go), mark=str(mark))
    other = JobserverClient(shared.client._http.address, SECRET)
    values = [in_background(client.run, job) for client in (shared.client, other)]
    until(mark.exists)
    go.write_text("")
    assert [until(lambda: value)[0].buffer for value in values] == [b"1\n"] * 2
    assert mark.read_text() == "x"
    other.close()


@pytest.mark.parametrize("asker", ["client", "job"])
def test_a_result_is_recorded_and_kept_for_who_asks_while_it_is_only_computed_again(tmp_path, make, asker):
    """For Dask both are one task; a job that asks is not known to the daskserver."""
    server = make(workers=2)
    child = "def f(path):\n    import os, time\n    open(path, 'a').write('x')\n    while not os.path.exists(path + '.go'): time.sleep(0.02)\n    return 4\n"
    job = make_job(child, path=str(tmp_path / "n"))
    in_background(server.client.run, job._replace(meta=Meta(scratch=True, fresh=True)))
    until((tmp_path / "n").exists)
    other = JobserverClient(server.client._http.address, SECRET)
    driver = nested("open(path + '.driver', 'w').close(); return call(%r, path=path)" % child, path=str(tmp_path / "n"))
    values = in_background(other.run, job if asker == "client" else driver)
    if asker == "job":
        until((tmp_path / "n.driver").exists)
    time.sleep(0.7)                         # it asks
    (tmp_path / "n.go").write_text("")
    assert until(lambda: values)[0].buffer == b"4\n"
    stores = open_stores(server.spec)
    result = stores.results.get(job.checksum)
    assert result is not None and stores.buffers.get(result) == b"4\n" and (tmp_path / "n").read_text() == "xx"
    stores.close()
    other.close()


def test_a_scratch_result_comes_back_whole_and_is_not_stored(shared):
    job = make_job("def f(n):\n    return 'x' * n\n", Meta(scratch=True), n=3_000_000)
    outcome = shared.client.run(job)
    assert len(outcome.buffer) > 3_000_000
    stores = open_stores(shared.spec)
    assert not stores.buffers.has([outcome.result])[0]
    stores.close()


def test_nothing_of_ended_jobs_is_kept_by_dask(shared):
    done, values = threading.Event(), []

    def collect(job, outcome, error):
        values.append(outcome or error)
        if len(values) == 300:
            done.set()
    submit_all(shared.client, [add(1000 + i) for i in range(300)], collect)
    assert done.wait(60)
    assert sorted(int(value.buffer) for value in values) == [1001 + i for i in range(300)]
    with shared.dask_client() as client:
        def kept(dask_scheduler):
            return [name for name in dask_scheduler.tasks if name.startswith("seamless-")]

        def left():
            from seamless_lite import dasktask
            return len(dasktask.node.running) + len(dasktask.node.local._tasks)
        until(lambda: not client.run_on_scheduler(kept))
        until(lambda: sum(client.run(left).values()) == 0)


# --- jobs that have jobs

def test_a_driver_with_a_hundred_children_on_one_slot(shared):
    job = nested("return sum(call('def f(a):\\n    return a * 2\\n', a=i) for i in range(n))", n=100)
    assert shared.client.run(job, deadline_s=60).buffer == b"9900\n"


def test_a_driver_that_submits_its_children_together(shared):
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
    assert shared.client.run(nested(body, n=50), deadline_s=60).buffer == b"%d\n" % (3 * sum(range(50)))


#: In the body of a ``nested`` job: ``again(...)`` calls the same code with other values.
AGAIN = """
import json
recipe = transformation.Recipe.from_dict(json.loads(context.stores.buffers.get(Checksum(context.job_id))))
own = celltypes.deserialize(context.stores.buffers.get(recipe.pins["code"][2]), "python")
def again(**values):
    return call(own, **values)
"""


def test_jobs_within_jobs_to_depth_twenty_on_one_slot(shared):
    job = nested(AGAIN + "return 0 if n == 0 else 1 + again(n=n - 1)", n=20)
    assert shared.client.run(job, deadline_s=60).buffer == b"20\n"


def test_a_job_that_comes_to_wait_for_itself_is_one_sentence(shared):
    for n in (1, 3):
        error = shared.client.run(nested(AGAIN + "return again(n=n % 10 + 1 if n % 10 < m else n - n % 10 + 1, m=m)", n=10 * n + 1, m=n),
                                  deadline_s=60).exception()
        assert "waits for it; call it with other arguments" in str(error)


@pytest.mark.slow
def test_jobs_that_were_begun_independently_and_come_to_wait_for_each_other_do_not_hang(make, tmp_path):
    server = make(workers=2)
    body = AGAIN + """
import os, time
open(folder + "/begun" + str(n), "w").close()
while not os.path.exists(folder + "/begun" + str(1 - n)): time.sleep(0.01)
return again(n=1 - n, folder=folder)"""
    values = [in_background(server.client.run, nested(body, n=n, folder=str(tmp_path)), deadline_s=60) for n in (0, 1)]
    for value in values:
        assert "waits for it; call it with other arguments" in str(until(lambda: value)[0].exception())


def test_children_of_a_job_that_fails_are_cancelled(shared, tmp_path):
    job = nested("""
import threading, time, os
child = job("def slow(path):\\n    import os, time\\n    open(path, 'w').write(str(os.getpid()))\\n    time.sleep(300)\\n", path=path)
client.submit(child, lambda outcome, error: None, parent=context.job_id)
while not os.path.exists(path): time.sleep(0.01)
raise ValueError("enough")""", path=str(tmp_path / "pid"))
    assert "enough" in str(shared.client.run(job).exception())
    pid = begun(tmp_path / "pid")
    until(lambda: not alive(pid), "the child lives")


@pytest.mark.slow
def test_children_are_spread_over_all_workers_of_the_cluster(make, tmp_path):
    server = make(queue={"name": "two", "processes": 2, "cores": 4}, workers=4)
    assert server.info()["workers"] == 4
    body = """
import threading
done, values = threading.Event(), []
def collect(j, outcome, error):
    values.append(outcome or error)
    if len(values) == n: done.set()
source = "def f(i):\\n    import os, sys, time\\n    print('x' * 100000, file=sys.stderr)\\n    time.sleep(0.2)\\n    return os.getppid()\\n"
jobs = [job(source, i=i) for i in range(n)]
for each in jobs: client.submit(each, lambda outcome, error=None, each=each: collect(each, outcome, error), context.job_id)
done.wait(60)
one = jobs[0].checksum
offset, data, ended = 0, b"", False
while not ended:
    offset, piece, ended = client.logs(one, offset, 5)
    data += piece
return [len(data), sorted({value.buffer.decode().strip() for value in values})]"""
    size, parents = json.loads(server.client.run(nested(body, n=16), deadline_s=60).buffer)
    assert len(parents) == 2 and size == 100_001
    old = int(parents[0])
    job = nested("return call('def f(path):\\n    import os, time\\n    open(path, \"a\").write(\"x\")\\n    time.sleep(1)\\n    return 1\\n', path=path)",
                 path=str(tmp_path / "mark"))
    value = in_background(server.client.run, job, deadline_s=60)
    until((tmp_path / "mark").exists)       # whichever of the two it is: parent, child, or both have to run once more
    os.kill(old, signal.SIGKILL)
    assert until(lambda: value)[0].buffer == b"1\n"


def test_when_a_dask_worker_cannot_connect_for_a_job_that_asks_for_another_whatever_the_reason_that_one_fails():
    from seamless_lite.daskworker import _Spread
    with contextlib.closing(WorkerPool(1)) as local:
        worker = types.SimpleNamespace(scheduler=types.SimpleNamespace(address="nonsense://nowhere"), loop=None, security=None)
        spread = _Spread(types.SimpleNamespace(worker=worker, local=local, running={}))
        with pytest.raises(ServiceError, match="cannot be reached"):
            spread.submit("a" * 64, b"", print)
        assert local.state("elsewhere " + "a" * 64) is None


def test_a_job_that_a_client_and_another_job_ask_for_is_one(shared, tmp_path):
    go, mark = str(tmp_path / "go"), tmp_path / "mark"
    source = ("def f(go, mark):\n    import os, time\n    open(mark, 'a').write('x')\n"
              "    while not os.path.exists(go): time.sleep(0.02)\n    return 1\n")
    values = [in_background(shared.client.run, nested("return call(text, go=go, mark=mark)", text=source, go=go, mark=str(mark)))]
    until(mark.exists)
    values.append(in_background(shared.client.run, make_job(source, go=go, mark=str(mark))))
    until(lambda: shared.info()["jobs"] == 2)
    time.sleep(0.1)
    (tmp_path / "go").write_text("")
    assert [until(lambda: value)[0].buffer for value in values] == [b"1\n"] * 2
    assert mark.read_text() == "x"


# --- what is killed

def test_a_cancelled_job_is_killed_and_one_that_waits_does_not_begin(shared, tmp_path):
    values = [in_background(shared.client.run, slow(tmp_path / "a"))]
    pid = begun(tmp_path / "a")
    values.append(in_background(shared.client.run, slow(tmp_path / "b")))
    until(lambda: shared.info()["jobs"] == 2)
    ids = [slow(tmp_path / name).checksum for name in "ab"]
    assert shared.client.cancel(ids) == {str(id): "canceled" for id in ids}
    assert [kind(until(lambda: value)[0]) for value in values] == ["JobCancelledError"] * 2
    until(lambda: not alive(pid))
    assert not (tmp_path / "b").exists()
    assert shared.client.run(add(5)).buffer == b"6\n"
    again = in_background(shared.client.run, slow(tmp_path / "b"))
    assert begun(tmp_path / "b")
    shared.client.cancel([ids[1]])
    assert kind(until(lambda: again)[0]) == "JobCancelledError"


def test_a_job_that_is_cancelled_while_very_many_wait(shared):
    done, values = threading.Event(), []

    def collect(job, outcome, error):
        values.append(outcome or error)
        if len(values) == 200:
            done.set()
    jobs = [make_job("def f(i):\n    import time\n    time.sleep(100)\n", i=i) for i in range(200)]
    submit_all(shared.client, jobs, collect)
    until(lambda: shared.info()["jobs"] == 200)
    states = shared.client.cancel([job.checksum for job in jobs])
    assert done.wait(20) and set(states.values()) == {"canceled"}
    until(lambda: shared.info()["jobs"] == 0)


def test_a_worker_process_that_dies_twice_is_a_sentence_with_the_signal_and_the_output(shared):
    outcome = shared.client.run(make_job("def f(a):\n    import os\n    print('last words', flush=True)\n    os.kill(os.getpid(), 11)\n", a=1))
    assert kind(outcome) == "WorkerDiedError" and "SIGSEGV" in str(outcome.exception()) and "last words" in str(outcome.exception())


def test_a_dask_worker_that_is_killed_costs_a_try_and_not_the_result(shared, tmp_path):
    job = make_job("def f(path):\n    import os, time\n    with open(path, 'a') as file: file.write('x')\n"
                   "    if os.path.getsize(path) == 1: time.sleep(300)\n    return 1\n", path=str(tmp_path / "tries"))
    values = in_background(shared.client.run, job)
    until((tmp_path / "tries").exists)
    old = family(dask_worker(shared))
    os.kill(old[0], signal.SIGKILL)
    assert until(lambda: values)[0].buffer == b"1\n" and (tmp_path / "tries").read_text() == "xx"
    until(lambda: not any(map(alive, old)), "worker processes outlived their Dask worker")


def test_a_job_outlives_that_all_connections_of_the_cluster_break(make, tmp_path):
    server = make()
    values = in_background(server.client.run, make_job(
        "def f(path):\n    import os, time\n    with open(path, 'a') as file: file.write('x')\n"
        "    if os.path.getsize(path) == 1: time.sleep(300)\n    return 1\n", path=str(tmp_path / "tries")))
    until((tmp_path / "tries").exists)

    def cut(dask_scheduler):
        for stream in [*dask_scheduler.stream_comms.values(), *dask_scheduler.client_comms.values()]:
            stream.comm.abort()
    with server.dask_client() as client:
        client.loop.add_callback(client._run_on_scheduler, cut)
        assert until(lambda: values)[0].buffer == b"1\n" and (tmp_path / "tries").read_text() == "xx"
    assert server.client.run(add(2)).buffer == b"3\n"


@pytest.mark.slow
def test_a_job_that_kills_its_dask_worker_each_time_is_a_sentence(make):
    server = make()
    job = make_job("def f(a):\n    import os, signal, time\n    time.sleep(0.3)\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(100)\n", a=1)
    error = server.client.run(job, deadline_s=60).exception()
    assert "Dask worker" in str(error) and "was tried 4 times" in str(error) and "SIGKILL" in str(error)
    assert server.client.run(add(1)).buffer == b"2\n"


@pytest.mark.slow
def test_the_neighbours_of_a_job_that_kills_its_dask_worker_each_time_have_their_results(make):
    server = make()
    job = make_job("def f(a):\n    import os, signal, time\n    time.sleep(1)\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(100)\n", a=2)
    killer = in_background(server.client.run, job, deadline_s=110)
    until(lambda: server.info()["jobs"] == 1)
    neighbours = [in_background(server.client.run, add(i), deadline_s=110) for i in range(5)]
    end = time.monotonic() + 110
    while not (killer and all(neighbours)) and time.monotonic() < end:
        time.sleep(0.1)
    assert "was tried 8 times" in str(killer[0].exception())
    assert [values[0].buffer for values in neighbours] == [b"%d\n" % (i + 1) for i in range(5)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_outlives_the_daskserver(make, tmp_path, number):
    server = make(workers=2)
    values = in_background(server.client.run, slow(tmp_path / "pid"))
    begun(tmp_path / "pid")
    server.stop(number)
    assert isinstance(until(lambda: values)[0], SeamlessError)
    if number == signal.SIGKILL:            # the next one cleans
        server = make()
        assert server.client.run(add(1)).buffer == b"2\n"
        server.stop()
    assert os.listdir(server.folder / "tmp") == []


# --- Dask itself

def test_a_client_without_the_keys_cannot_connect(shared, tmp_path):
    address = shared.dask().json()["scheduler"]
    other = tmp_path / "other"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=seamless-dask",
                    "-keyout", "%s.key" % other, "-out", "%s.cert" % other], check=True, stderr=subprocess.DEVNULL)
    stranger = {"cert": pathlib.Path("%s.cert" % other).read_text(), "key": pathlib.Path("%s.key" % other).read_text()}
    for security, where in ((None, address.replace("tls", "tcp")), (shared.security(**stranger), address)):
        with pytest.raises(OSError):
            distributed.Client(where, security=security, timeout=3, set_as_default=False)
    with shared.dask_client() as client:
        assert client.submit(sum, [1, 2]).result() == 3


def test_the_keys_are_given_only_to_signed_requests(make):
    with pytest.raises(SeamlessError, match="signed requests"):
        make(auth=False).dask()


def test_the_dashboard_is_reached_only_by_who_knows_its_path(shared):
    link = shared.dask().json()["dashboard"]
    assert shared.info()["dashboard"] == link
    if importlib.util.find_spec("bokeh") is None:
        assert link is None and "pip install bokeh" in shared.dask().json()["no_dashboard"]
        return
    base, token, page = link.rsplit("/", 2)
    assert base.startswith("http://127.0.0.1:") and len(token) == 32
    http = HttpClient(base, None)
    assert http.request("GET", "/%s/status" % token).status == 200
    for path in ("/status", "/info/main/workers.html", "/json/counts.json", "/workers", "/%s/status" % token[::-1]):
        assert http.request("GET", path).status == 404, path


@pytest.mark.slow
def test_the_scheduler_listens_in_the_range_and_on_the_interface_that_were_given(make):
    server = make(network_interface="127.0.0.2", ports=[47310, 47330])
    where, _, port = server.dask().json()["scheduler"].rpartition(":")
    assert where == "tls://127.0.0.2" and 47310 <= int(port) <= 47330
    assert server.client.run(add(1)).buffer == b"2\n"


@pytest.mark.parametrize("parameters, words", [({"network_interface": "192.0.2.1", "ports": [60300, 60399]}, "192.0.2.1, which is no address of"),
                                               ({"ports": [60300, 60300]}, "at least two ports")])
def test_where_it_cannot_listen_it_ends_with_a_sentence_that_says_why(make, parameters, words):
    server = make(**parameters)
    assert server.status["status"] == "failed" and words in server.status["error"], server.status


def test_our_settings_hold_and_cause_no_warning():
    program = ("from seamless_lite import daskserver; daskserver._need_dask(); import dask.config;"
               "assert dask.config.get('distributed.admin.low-level-log-length') == 50")
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", program], cwd=str(ROOT), check=True, timeout=60)


def test_the_settings_for_dask_that_a_user_has_do_not_matter(make, tmp_path):
    (tmp_path / ".config/dask").mkdir(parents=True)
    (tmp_path / ".config/dask/mine.yaml").write_text("distributed:\n  comm:\n    require-encryption: false\n    tls:\n      ca-file: /none\n"
                                                     "  worker:\n    preload: [no_such_module]\n")
    server = make(env={"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1"}.items())
    assert server.client.run(add(1)).buffer == b"2\n"


@pytest.mark.slow
def test_it_goes_when_nobody_uses_it_but_not_while_a_client_of_dask_is_there(make):
    server = make("--timeout", "2")
    with server.dask_client() as client:
        time.sleep(4)                       # twice the time
        assert client.submit(sum, [1, 2]).result() == 3
        pids = server.processes()
    server.process.wait(20)
    until(lambda: not any(map(alive, pids)))
    assert not os.listdir(server.folder / "tmp")


@pytest.mark.slow
def test_a_user_of_dask_who_restarts_the_cluster_costs_a_job_a_try(make, tmp_path):
    server = make()
    job = make_job("def f(path):\n    import os, time\n    with open(path, 'a') as file: file.write('x')\n"
                   "    if os.path.getsize(path) == 1: time.sleep(300)\n    return 1\n", path=str(tmp_path / "tries"))
    values = in_background(server.client.run, job)
    until((tmp_path / "tries").exists)
    with server.dask_client() as client:
        client.restart()
    assert until(lambda: values)[0].buffer == b"1\n" and (tmp_path / "tries").read_text() == "xx"


@pytest.mark.slow
def test_pure_dask_needs_no_stores_and_runs_transformations_too(make):
    server = make(workers=2, stores=None, pure=True)
    with server.dask_client() as client:
        assert client.gather(client.map(lambda i: i + 1, range(10))) == list(range(1, 11))
        assert sum(client.nthreads().values()) == 2
    assert server.client.run(make_job("def f(a):\n    return 'x' * a\n", Meta(scratch=True), a=100_000)).buffer == b'"' + b"x" * 100_000 + b'"\n'
    assert not list((server.folder / "store").iterdir())


def test_without_dask_it_ends_with_one_sentence_that_names_the_extra(make, tmp_path):
    (tmp_path / "none/dask").mkdir(parents=True)
    (tmp_path / "none/dask/__init__.py").write_text("raise ImportError('No module named dask')")
    server = make(env={"PYTHONPATH": "%s:%s" % (tmp_path / "none", ROOT)}.items())
    assert server.process.wait(20) == 1
    assert server.status["status"] == "failed" and "pip install seamless_lite[dask]" in server.status["error"]
    assert "Traceback" not in server.log()


def test_without_keys_there_is_one_sentence(make, tmp_path):
    if importlib.util.find_spec("cryptography") is not None:
        pytest.skip("cryptography is installed")
    (tmp_path / "bin").mkdir()
    server = make(env={"PATH": str(tmp_path / "bin")}.items())
    assert server.process.wait(20) == 1 and "'openssl'" in server.status["error"] and "'cryptography'" in server.status["error"]
    assert os.listdir(server.folder / "tmp") == []


# --- small parts

def test_what_a_queue_says_for_this_machine(monkeypatch, caplog):
    import dask.config
    from seamless_lite import dasklocal
    made = []
    monkeypatch.setattr(distributed, "LocalCluster", lambda **options: made.append(options))

    def local(**parameters):
        return dasklocal.Local(parameters, None, "127.0.0.1", None, {"dashboard_address": "", "http_prefix": ""}, "/nowhere")
    queue = {"name": "q", "cores": 4, "processes": 2, "memory": "2000", "tmpdir": "/scratch",
             "extra_dask_config": {"distributed": {"comm": {"retry": {"delay": {"min": "2s"}}}}}}
    with dask.config.set({"distributed.comm.retry.delay.min": "1s"}):
        assert local(queue=queue, workers=8).slots == 2
        assert dask.config.get("distributed.comm.retry.delay") == {"min": "2s", "max": "20s"}
    assert made[0]["memory_limit"] == 1000 << 20 and made[0]["n_workers"] == 2
    assert "'tmpdir' of the queue 'q' has no effect" in caplog.text
    with pytest.raises(SeamlessError, match="the queue 'q' of cluster 'c' has 'memory: much'"):
        local(queue={"name": "q", "memory": "much"}, cluster="c")


def test_the_command_line_says_how_many_jobs_run_at_a_time_whatever_the_queue_says(monkeypatch, tmp_path):
    from seamless_lite import daskserver
    monkeypatch.setattr(daskserver, "_need_dask", lambda: None)
    monkeypatch.setattr(daskserver, "DaskServer", lambda parameters, *rest: parameters)
    status = tmp_path / "status.json"
    for type, cores in (("local", None), ("slurm", 4)):
        status.write_text(json.dumps({"parameters": {"type": type, "pure": True, "workers": 3, "queue": {"cores": 4}}}))
        made = daskserver.make_service(types.SimpleNamespace(status_file=str(status), workers=2, stores=None))
        assert made["workers"] == 2 and made["queue"] == {"cores": cores}


def test_a_dask_worker_that_comes_and_cannot_do_its_work_ends(monkeypatch, caplog):
    from seamless_lite import daskworker

    def broken(*arguments):
        raise ServiceError("the stores are not there")
    ends = []
    monkeypatch.setattr(daskworker, "Node", broken)
    monkeypatch.setattr(daskworker.os, "_exit", ends.append)
    for running in (False, True):
        heart = types.SimpleNamespace(is_running=lambda: running)
        with pytest.raises(ServiceError) if running else contextlib.nullcontext():
            daskworker.Plugin(1, {}, None).setup(types.SimpleNamespace(periodic_callbacks={"heartbeat": heart}))
    assert ends == [1] and "the stores are not there" in caplog.text


def test_a_worker_refuses_what_its_job_is_too_short_for_and_forgets_children(monkeypatch):
    from seamless_lite.daskworker import Node
    monkeypatch.setenv("SEAMLESS_JOB_END", "50")
    node, told = Node.__new__(Node), []
    node.running, node._refused = {"b": types.SimpleNamespace(id="b", seceded=False)}, {}
    answer, _ = asyncio.run(node.run(json.dumps({"id": "a", "token": "t", "timeout_s": 60, "chain": []}).encode() + b"\n{}"))
    assert "it may take 60 s, but the jobs of this queue end after 50 s" in json.loads(answer)["error"]["message"]
    node._service = types.SimpleNamespace(jobs=types.SimpleNamespace(parent_ended=lambda *arguments: told.append(arguments)))
    node._keep_output = lambda id, path: None
    node._loop = types.SimpleNamespace(call_soon_threadsafe=lambda *arguments: None)
    node._tell([(types.SimpleNamespace(id="b", seceded=False), {"error": {}}, None)])
    assert told == [("b", True)]


def test_the_keys_of_the_cluster_come_through_a_tunnel_also_where_the_services_need_none(monkeypatch):
    from seamless_lite import daskclient, launch
    asked, forwarded = [], []

    class Http:
        def __init__(self, address, secret, mend):
            asked.append(address)

        def request(self, *arguments, **options):
            return types.SimpleNamespace(expect=lambda status: types.SimpleNamespace(json=dict))

        def close(self):
            pass
    monkeypatch.setattr(daskclient, "HttpClient", Http)
    monkeypatch.setattr(launch, "_host", lambda place: types.SimpleNamespace(
        forward=lambda label, target, tcp: forwarded.append(target) or "http://127.0.0.1:9"))
    for ssh, tunnel, address in ((None, False, "http://here:1"), ("far", True, "http://127.0.0.1:2"), ("far", False, "http://far.org:3")):
        place = launch.HERE._replace(ssh=ssh, tunnel=tunnel)
        daskclient._post(launch.Connection("daskserver", "k", address, b"", 1, False, place=place, port=3), "127.0.0.1")
    assert asked == ["http://here:1", "http://127.0.0.1:2", "http://127.0.0.1:9"] and forwarded == ["http://127.0.0.1:3"]


# --- from a user's program

CLUSTER = """\
here:
  workers: 2
  frontends:
    - hostname: localhost
      hashserver: {bufferdir: "%(folder)s/buffers"}
      database: {database_dir: "%(folder)s/results"}
      daskserver:
        network_interface: 0.0.0.0
        port_start: 60300
        port_end: 60399
"""
PROGRAM = """
import os
import seamless_lite.config as config
from seamless_lite import delayed, direct
config.init()

@direct
def f(a):
    return a + 1

@delayed
def child(i):
    import os
    return os.getppid() and i

@direct
def driver(n):
    return sum(child(i).run() for i in range(n))
driver.globals.child = child

if __name__ == "__main__":
    print(f(%(value)d), driver(5))
    try:
        with config.dask_client(set_as_default=False) as client:
            print(client.submit(sum, [1, 2]).result(), client.scheduler.address.split(":")[0])
        print("dashboard" if "/status" in config.dashboard_link() else "")
    except config.ConfigurationError as exc:
        print(exc)
"""


@pytest.fixture
def user(home, tmp_path):
    (home / ".seamless").mkdir()
    (home / ".seamless/clusters.yaml").write_text(CLUSTER % {"folder": tmp_path / "data"})
    (tmp_path / "work").mkdir()

    def run(configuration, value=1, env=()):
        (tmp_path / "work/seamless.yaml").write_text(configuration)
        (tmp_path / "work/program.py").write_text(PROGRAM % {"value": value})
        return subprocess.run([sys.executable, "program.py"], cwd=tmp_path / "work", timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **dict(env)}, universal_newlines=True)
    yield run
    subprocess.run([sys.executable, "-c", "from seamless_lite import launch\nfor r in launch.services(): launch.stop(r)"],
                   cwd=str(ROOT), check=True, timeout=60)


@pytest.mark.parametrize("persistent", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_program_with_the_block_of_the_users_document(user, persistent):
    configuration = "- project: p\n- cluster: here\n- execution: remote\n- remote: daskserver\n- persistent: %s\n" % persistent
    done = user(configuration)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[:2] == ["2 10", "3 tls"], done
    assert lines[2] == ("dashboard" if importlib.util.find_spec("bokeh") else lines[2])


@pytest.mark.slow
def test_a_program_without_dask_has_its_jobs_run_but_no_client_of_dask(user, tmp_path):
    configuration = "- project: p\n- cluster: here\n- execution: remote\n- remote: daskserver\n"
    assert user(configuration).returncode == 0
    (tmp_path / "none").mkdir()
    (tmp_path / "none/distributed.py").write_text("raise ImportError('No module named distributed')")
    done = user(configuration, 2, {"PYTHONPATH": "%s:%s" % (tmp_path / "none", ROOT)}.items())
    assert done.stdout.splitlines() == ["3 10", "dask_client() needs dask in this Python (No module named distributed): pip install 'seamless_lite[dask]'"], done


@pytest.mark.ssh
@pytest.mark.parametrize("persistent", ["true", "false"])
def test_a_client_of_dask_and_the_dashboard_go_through_the_tunnel(netns_dask, lab_user, persistent):
    far = pytest.importorskip("far")
    pytest.importorskip("bokeh")
    user = lab_user(netns_dask)
    user.configure(far.CLUSTERS, far.DASKSERVER + "- persistent: %s\n" % persistent)
    done = user.python("""
import os, urllib.request
import seamless_lite.config as config
config.init()
if __name__ == "__main__":
    with config.dask_client(set_as_default=False) as client:
        print(client.submit(lambda: os.uname().nodename, pure=False).result(), client.scheduler.address.rpartition(":")[0])
    link = config.dashboard_link()
    print(link.split("/")[-1], urllib.request.urlopen(link, timeout=10).status)
""")
    assert done.ok().splitlines() == ["h1 tls://127.0.0.1", "status 200"]


# --- a cluster that keeps nothing

def test_a_cluster_that_keeps_nothing_gives_back_what_results_consist_of(make, monkeypatch):
    server, store = make(pure=True), MemoryBuffers()
    connection = types.SimpleNamespace(address=server.http.address, secret=SECRET, mend=None)
    remote = executors.Remote(lambda again: server.client, bring=functools.partial(services.bring, lambda: connection, store))

    def job(n):
        return make_job("def f(n):\n    return {**{str(i): b'%d' % i for i in range(1000)}, 'empty': b'', 'large': b'x' * n}\n",
                        Meta(scratch=True), ("result", "folder", None), n=n)
    for n, outcome in (3 << 20, remote.run(job(3 << 20))), (2 << 20, remote.submit(job(2 << 20)).result(60)):
        index = json.loads(outcome.buffer)
        assert len(index) == 1002 and all(store.has(index.values())) and len(store.get(index["large"])) == n
        assert Checksum.of(outcome.buffer) == outcome.result
    monkeypatch.setattr(services, "BROUGHT_BYTES", 1 << 20)
    for ask in remote.run, lambda job: remote.submit(job).result(60):
        with pytest.raises(SeamlessError, match="has 4 MB, and with 'persistent: false' no more than 1 come back"):
            ask(job(4 << 20))


@pytest.mark.slow
def test_commands_and_functions_give_their_results_where_nothing_is_kept(user, tmp_path):
    user("- project: p\n- cluster: here\n- execution: remote\n- remote: daskserver\n- persistent: false\n")

    def run(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path / "work", timeout=60, stdout=subprocess.PIPE, check=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, universal_newlines=True).stdout
    run("-m", "seamless_lite.cmd_run", "--capture", "f", "--capture", "o", "-c", "seq 5 > f; mkdir o; seq 100000 | tee o/a o/b")
    assert (tmp_path / "work/f").read_text() == "1\n2\n3\n4\n5\n" and (tmp_path / "work/o/b").stat().st_size == 588895
    (tmp_path / "work/program.py").write_text("""
import seamless_lite.config as config
from seamless_lite import delayed
config.init()

@delayed
def files(n):
    return {"a/x": b"x" * n}
files.celltypes.result = "folder"

@delayed
def sizes(folder):
    return {name: len(data) for name, data in folder.items()}
sizes.celltypes.folder = "folder"

if __name__ == "__main__":
    made = files(200000)
    print(len(made.run()["a/x"]), made.why().hit, made.verify().equal, sizes(made).run())
""")
    assert run("program.py") == "200000 True True {'a/x': 200000}\n"
