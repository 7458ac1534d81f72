"""The worker pool alone, with real processes; ``stand_in_worker.py`` runs the jobs."""
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

from seamless_lite.errors import SeamlessError, ServiceError
from seamless_lite.cpus import usable_cpus
from seamless_lite.pool import WorkerPool
from seamless_lite.processes import MARK

STAND_IN = [sys.executable, str(pathlib.Path(__file__).with_name("stand_in_worker.py"))]
PATIENCE_S = 20


class Jobs:
    """Submits code to a pool and collects what comes back."""

    def __init__(self, pool):
        self.pool = pool
        self._changed = threading.Condition()
        self.outcomes = {}
        self.logs = {}
        self.order = []

    def submit(self, id, code="result = 1", **options):
        self.pool.submit(id, json.dumps({"code": code}).encode(), lambda o, log: self._done(id, o, log), **options)

    def _done(self, id, outcome, log):
        with self._changed:
            assert id not in self.outcomes, "an outcome came twice"
            self.outcomes[id], self.logs[id] = outcome, log
            self.order.append(id)
            self._changed.notify_all()

    def wait(self, *ids):
        with self._changed:
            assert self._changed.wait_for(lambda: all(id in self.outcomes for id in ids), PATIENCE_S), "no outcome"
        return [self.outcomes[id] for id in ids]

    def run(self, id, code="result = 1", **options):
        self.submit(id, code, **options)
        return self.wait(id)[0]


@pytest.fixture
def make_pool(tmp_path):
    made = []

    def make(workers=1, **options):
        made.append(WorkerPool(workers, command=STAND_IN, folder=str(tmp_path), **options))
        return Jobs(made[-1])
    yield make
    pids = [pid for pool in made for pid in pool.pids()]
    marks = [child.mark for pool in made for child in [worker.child for worker in pool._all] if child]
    for pool in made:
        pool.close()
    assert not [pid for pid in pids if alive(pid)], "a worker outlived its pool"
    assert not any(marked(mark) for mark in marks), "something that a worker started outlived the pool"
    assert not list(tmp_path.glob("seamless-jobs-*")), "the pool's folder was left"


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE).stdout.strip()
    return bool(state) and not state.startswith(b"Z")


def marked(mark):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = pathlib.Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
            if ("%s=%s" % (MARK, mark)).encode() in text:
                found.append(int(name))
    return found


def until(condition, what):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def begin(jobs, path, id="slow", **options):
    """Submit a job that says its pid in ``path`` and then sleeps."""
    jobs.submit(id, "import os, time; open(%r, 'w').write(str(os.getpid())); time.sleep(300)" % str(path), **options)
    until(lambda: path.exists() and path.read_text(), "the job did not begin")
    return int(path.read_text())


def test_a_job_comes_back_with_its_outcome(make_pool):
    jobs = make_pool(hello=lambda: {"greeting": "moin"})
    assert jobs.run("a", "result = hello['greeting'] + '!'") == {"result": "moin!"}
    assert jobs.logs["a"] is None
    assert jobs.pool.state("a") is None


def test_an_idle_worker_is_used_again(make_pool):
    jobs = make_pool(2)
    pids = {jobs.run(str(i), "import os; result = os.getpid()")["result"] for i in range(5)}
    assert len(pids) == 1


def test_jobs_run_side_by_side_up_to_the_number_of_workers(make_pool, tmp_path):
    jobs = make_pool(2)
    first, second = begin(jobs, tmp_path / "a", "a"), begin(jobs, tmp_path / "b", "b")
    assert first != second
    jobs.submit("c")
    assert [jobs.pool.state(id) for id in "abc"] == ["running", "running", "queued"]
    jobs.pool.cancel("a")
    jobs.wait("c")


def test_queued_jobs_run_in_the_order_in_which_they_came(make_pool):
    jobs = make_pool(1)
    names = [str(i) for i in range(50)]
    for name in names:
        jobs.submit(name)
    jobs.wait(*names)
    assert jobs.order == names


@pytest.mark.slow
def test_a_hundred_thousand_jobs_can_be_queued_with_one_thread(make_pool, tmp_path):
    jobs = make_pool(1)
    begin(jobs, tmp_path / "pid")
    threads = threading.active_count()
    for i in range(100_000):
        jobs.submit(str(i))
    assert threading.active_count() == threads
    assert jobs.pool.state("99999") == "queued"


def test_output_of_python_and_of_children_is_in_the_log_while_the_job_runs(make_pool, tmp_path):
    jobs = make_pool(1)
    jobs.submit("a", "import subprocess, time\nprint('one', flush=True)\nsubprocess.run(['sh', '-c', 'echo two >&2'])\ntime.sleep(300)")
    until(lambda: jobs.pool.log_path("a") and "two" in open(jobs.pool.log_path("a")).read(), "nothing in the log")
    jobs.pool.cancel("a")
    assert jobs.wait("a")[0]["logs"] == "one\ntwo\n"
    assert open(jobs.logs["a"]).read() == "one\ntwo\n"


def test_the_log_of_one_job_has_nothing_of_another(make_pool):
    jobs = make_pool(1)
    for word in ("one", "two"):
        jobs.run(word, "print(%r)" % word)
    jobs.run("silent")
    assert [open(jobs.logs[word]).read() for word in ("one", "two")] == ["one\n", "two\n"]
    assert jobs.logs["silent"] is None


def test_the_folder_of_a_job_is_removed_with_all_that_is_in_it(make_pool):
    jobs = make_pool(1)
    code = "import os, pathlib\nd = pathlib.Path(control['run_dir'])\n(d / 'sub').mkdir()\n(d / 'sub' / 'f').write_text('x')\nresult = str(d)"
    run_dir = jobs.run("a", code)["result"]
    assert not os.path.exists(run_dir)


def test_files_of_the_pool_are_private(make_pool):
    jobs = make_pool(1)
    jobs.run("a", "print(1)")
    assert os.stat(jobs.pool.folder).st_mode & 0o777 == 0o700
    assert os.stat(jobs.logs["a"]).st_mode & 0o777 == 0o600


def test_a_job_whose_worker_dies_once_is_tried_again_on_a_fresh_worker(make_pool, tmp_path):
    jobs = make_pool(1)
    old = jobs.run("first", "import os; result = os.getpid()")["result"]
    code = "import os\nif not os.path.exists(%r):\n    open(%r, 'w'); os._exit(3)\nresult = os.getpid()" % ((str(tmp_path / "once"),) * 2)
    assert jobs.run("a", code)["result"] not in (None, old)


def test_a_job_whose_worker_dies_twice_fails_with_exit_code_and_last_words(make_pool):
    jobs = make_pool(1)
    outcome = jobs.run("a", "import os; print('last words', flush=True); os._exit(7)")
    assert outcome["error"]["kind"] == "WorkerDiedError"
    assert "exit code 7" in outcome["error"]["message"] and "last words" in outcome["error"]["logs"]
    assert jobs.run("b") == {"result": 1}


def test_a_worker_killed_by_a_signal_is_reported_with_its_name(make_pool):
    jobs = make_pool(1)
    outcome = jobs.run("a", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "SIGKILL" in outcome["error"]["message"]


def test_the_death_of_a_worker_costs_no_other_job(make_pool, tmp_path):
    jobs = make_pool(2)
    jobs.submit("good", "import time\nwhile not __import__('os').path.exists(%r): time.sleep(0.01)\nresult = 5" % str(tmp_path / "go"))
    assert "error" in jobs.run("bad", "import os; os._exit(1)")
    (tmp_path / "go").write_text("")
    assert jobs.wait("good") == [{"result": 5}]


def test_an_idle_worker_that_died_is_replaced_without_harm(make_pool):
    jobs = make_pool(1)
    os.kill(jobs.run("a", "import os; result = os.getpid()")["result"], signal.SIGKILL)
    assert jobs.run("b") == {"result": 1}


def test_a_dead_worker_is_noticed_although_its_forked_child_holds_the_connection(make_pool, monkeypatch):
    monkeypatch.setattr("seamless_lite.pool._LOOK_S", 0.1)
    jobs = make_pool(1)
    outcome = jobs.run("a", "import os, time\nif os.fork() == 0: time.sleep(300)\nos._exit(4)")
    assert "exit code 4" in outcome["error"]["message"]


def test_cancel_kills_a_running_job_and_what_it_started(make_pool, tmp_path):
    jobs = make_pool(1)
    code = ("import os, subprocess, time\n"
            "a = subprocess.Popen(['sleep', '300'])\n"
            "b = subprocess.Popen(['sh', '-c', 'sleep 300 & wait'], start_new_session=True)\n"
            "open(%r, 'w').write('%%d %%d %%d' %% (os.getpid(), a.pid, b.pid))\ntime.sleep(300)" % str(tmp_path / "pids"))
    jobs.submit("a", code)
    until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().count(" ") == 2, "the job did not begin")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    mark = [worker.child.mark for worker in jobs.pool._all][0]
    assert jobs.pool.cancel("a")
    assert jobs.wait("a")[0]["error"]["kind"] == "JobCancelledError"
    until(lambda: not any(map(alive, pids)), "something of the job still runs")
    assert marked(mark) == []
    assert jobs.run("b") == {"result": 1}


def test_orphans_of_a_dead_worker_are_killed_too(make_pool, tmp_path):
    jobs = make_pool(1)
    code = ("import os, subprocess\np = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
            "open(%r, 'a').write('%%d ' %% p.pid)\nos._exit(1)" % str(tmp_path / "pids"))
    assert "error" in jobs.run("a", code)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(alive, pids))


def test_cancel_takes_a_queued_job_out_of_the_queue(make_pool, tmp_path):
    jobs = make_pool(1)
    begin(jobs, tmp_path / "pid")
    jobs.submit("a")
    assert jobs.pool.cancel("a")
    assert jobs.wait("a")[0]["error"]["kind"] == "JobCancelledError"
    jobs.pool.cancel("slow")
    assert jobs.pool.cancel("unknown") is False


def test_a_job_over_its_time_limit_is_killed(make_pool):
    jobs = make_pool(1)
    outcome = jobs.run("a", "import time; print('begun', flush=True); time.sleep(300)", timeout_s=0.3)
    assert outcome["error"]["kind"] == "DeadlineError" and "0.3 s" in outcome["error"]["message"]
    assert outcome["logs"] == "begun\n"
    assert jobs.run("b", timeout_s=60) == {"result": 1}


def test_a_worker_that_wants_to_retire_is_replaced(make_pool):
    jobs = make_pool(1)
    old = jobs.run("a", "import os; result = os.getpid(); more = {'retire': True}")
    assert set(old) == {"result"}
    until(lambda: not alive(old["result"]), "it still lives")
    assert jobs.run("b", "import os; result = os.getpid()")["result"] != old["result"]


WAIT_FOR_FILE = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.005)\n"


def test_a_job_that_waits_gives_its_slot_back_and_takes_it_again_before_queued_jobs(make_pool, tmp_path):
    jobs = make_pool(1)
    jobs.submit("driver", WAIT_FOR_FILE % str(tmp_path / "go"))
    jobs.submit("other", WAIT_FOR_FILE % str(tmp_path / "go"))
    jobs.submit("child")
    until(lambda: jobs.pool.state("driver") == "running", "the driver did not begin")
    jobs.pool.wait_for("child", "driver")
    jobs.wait("child")
    assert jobs.pool.resumed("driver", PATIENCE_S)
    assert jobs.pool.state("other") == "queued"
    (tmp_path / "go").write_text("")
    jobs.wait("driver", "other")
    assert jobs.order == ["child", "driver", "other"]


def test_a_job_goes_on_when_the_queued_job_that_it_waits_for_is_cancelled(make_pool, tmp_path):
    jobs = make_pool(1)
    begin(jobs, tmp_path / "driver", "driver")
    jobs.submit("first", WAIT_FOR_FILE % str(tmp_path / "go"), parent="driver")
    jobs.submit("child", parent="driver")
    jobs.pool.wait_for("child", "driver")
    assert [jobs.pool.state(id) for id in ("driver", "first", "child")] == ["waiting", "running", "queued"]
    jobs.pool.cancel("child")
    (tmp_path / "go").write_text("")
    assert jobs.pool.resumed("driver", PATIENCE_S) and jobs.pool.state("driver") == "running"


def test_twenty_jobs_deep_with_one_slot(make_pool, tmp_path):
    jobs = make_pool(1)
    for depth in range(20):
        jobs.submit(str(depth), WAIT_FOR_FILE % str(tmp_path / str(depth)))
        if depth:
            jobs.pool.wait_for(str(depth), str(depth - 1))
        until(lambda: jobs.pool.state(str(depth)) == "running", "depth %d did not begin" % depth)
    for depth in reversed(range(20)):
        assert jobs.pool.resumed(str(depth), PATIENCE_S)
        (tmp_path / str(depth)).write_text("")
        jobs.wait(str(depth))
    jobs.run("last")
    until(lambda: len(jobs.pool.pids()) == 1, "spare workers were not ended")


def test_jobs_that_wait_for_each_other_are_refused(make_pool, tmp_path):
    jobs = make_pool(2)
    for name in "ab":
        begin(jobs, tmp_path / name, name)
    jobs.pool.wait_for("b", "a")
    for child, parent in (("a", "b"), ("a", "a")):
        with pytest.raises(SeamlessError, match="waits for it"):
            jobs.pool.wait_for(child, parent)


def test_close_ends_running_and_queued_jobs_with_a_service_error(make_pool, tmp_path):
    jobs = make_pool(1)
    pid = begin(jobs, tmp_path / "pid")
    jobs.submit("queued")
    jobs.pool.close()
    assert [outcome["error"]["kind"] for outcome in jobs.wait("slow", "queued")] == ["ServiceError"] * 2
    assert not alive(pid)
    with pytest.raises(ServiceError):
        jobs.submit("late")


def test_a_worker_that_cannot_start_is_said_and_not_waited_for(tmp_path):
    pool = WorkerPool(1, command=["/nonexistent/python"], folder=str(tmp_path))
    try:
        assert "could not be run" in Jobs(pool).run("a")["error"]["message"]
    finally:
        pool.close()


def test_prestart_has_a_worker_ready(make_pool):
    jobs = make_pool(3)
    jobs.pool.prestart()
    until(lambda: len(jobs.pool.pids()) == 1, "no worker was started")
    pid = jobs.pool.pids()[0]
    assert jobs.run("a", "import os; result = os.getpid()")["result"] == pid


def test_a_folder_that_was_removed_is_made_again(make_pool):
    jobs = make_pool(1)
    pid = jobs.run("a", "import os; result = os.getpid()")["result"]
    shutil.rmtree(jobs.pool.folder)
    assert jobs.run("b", "import os; print('hello'); result = os.getpid()")["result"] == pid
    assert pathlib.Path(jobs.logs["b"]).read_text() == "hello\n"
    assert os.stat(jobs.pool.folder).st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_somebody_else_put_in_its_place_is_not_used(make_pool):
    jobs = make_pool(1)
    jobs.run("a")
    shutil.rmtree(jobs.pool.folder)
    os.mkdir(jobs.pool.folder)
    os.chown(jobs.pool.folder, 12345, -1)
    try:
        assert "somebody else" in jobs.run("b")["error"]["message"]
    finally:
        os.chown(jobs.pool.folder, os.geteuid(), -1)


@pytest.mark.slow
def test_output_without_end_does_not_fill_the_disk(make_pool, monkeypatch):
    monkeypatch.setattr("seamless_lite.pool.LOG_BYTES", 1 << 20)
    jobs = make_pool(1)
    jobs.submit("a", "import os, time\nlog = control['log']\nos.write(1, bytes(2 << 20))\n"
                "while os.path.getsize(log) > 1 << 20: time.sleep(0.01)\nprint('end')\nresult = 1")
    assert jobs.wait("a") == [{"result": 1}]
    text = pathlib.Path(jobs.logs["a"]).read_text()
    assert text == "[more than 1 MiB of output; what came before is lost]\nend\n"


def test_usable_cpus_counts_affinity():
    if hasattr(os, "sched_getaffinity"):
        assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))
