"""``daskqueue`` on a real SLURM: jobs come and go with the tasks, and whatever happens to a job costs a retry."""
import os
import signal
import subprocess
import sys
import time

import pytest

from labs import ROOT, Slurm, make_lab, wait_until

distributed = pytest.importorskip("distributed")
pytest.importorskip("dask_jobqueue")
from seamless_lite import daskqueue, queuejobs  # noqa: E402

pytestmark = pytest.mark.slurm


def nap(number, seconds=0.0):
    import os
    import time
    time.sleep(seconds)
    return number, os.environ.get("SLURM_JOB_ID")


def hog(megabytes, marker):
    import time
    data = bytearray(megabytes << 20)
    data[::4096] = b"x" * len(data[::4096])
    time.sleep(60)


class Bench:
    """Makes clusters in a lab's queue, with a client each, and closes them."""

    def __init__(self, lab, folder, monkeypatch):
        self.lab, self.folder = lab, folder
        for name, value in lab.info["env"].items():
            monkeypatch.setenv(name, value)
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.state_file = folder / "state.json"
        self.open = []

    def parameters(self, **queue):
        node = queue.pop("node", None)
        return {"type": "slurm", "cluster": "c", "node": node, "queue": {"name": "q", "cores": 1, "walltime": "10", **queue}}

    def start(self, **queue):
        managed = daskqueue.make_cluster(self.parameters(**queue), security=None, host=None, scheduler_options={},
                                         environment={"PYTHONPATH": os.pathsep.join(sys.path[:1] + [str(ROOT), str(ROOT / "tests")])},
                                         log_folder=str(self.logs), state_file=str(self.state_file))
        self.open.append(managed)
        managed.failures = []
        managed.on_failure = managed.failures.append
        managed.client = distributed.Client(managed.cluster)
        self.open.append(managed.client)
        return managed

    def jobs(self, *states):
        """Ids of the jobs that are pending or running."""
        out = subprocess.run(["squeue", "-h", "-o", "%i %T"], stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
        return [line.split()[0] for line in out.splitlines() if line.split()[1] in (states or ("PENDING", "RUNNING"))]

    def close(self):
        for thing in reversed(self.open):
            thing.close()


@pytest.fixture
def bench(slurm, tmp_path, monkeypatch):
    found = Bench(slurm, tmp_path, monkeypatch)
    yield found
    found.close()


@pytest.fixture
def quick(monkeypatch):
    """Idle jobs end soon."""
    monkeypatch.setattr(queuejobs, "IDLE_S", 0.5)


def submit(managed, function, *args, key, **kwargs):
    return managed.client.submit(function, *args, key="seamless-" + key, pure=False, **kwargs)


def started(managed, future):
    """Wait until the task runs; returns the worker's name."""
    def look():
        return [state.name for state in managed.cluster.scheduler.workers.values()
                for task, past in state.executing.items() if task.key == future.key]
    return wait_until(look, "task %s runs" % future.key)[0]


def test_the_queue_goes_from_nothing_to_the_maximum_and_back_to_nothing(bench, quick):
    managed = bench.start(maximum_jobs=3)
    assert not bench.jobs() and managed.describe()["sentence"] == "no SLURM jobs"
    futures = [submit(managed, nap, n, 5, key=str(n)) for n in range(6)]
    wait_until(lambda: len(bench.jobs()) == 3, "3 jobs")
    wait_until(lambda: managed.describe()["workers"] == 3, "3 jobs at work")
    # A worker is counted a moment before the scheduler has given it its task.
    wait_until(lambda: managed.describe()["sentence"] == "3 SLURM jobs running, 3 tasks waiting", "the sentence")
    assert [number for number, _ in managed.client.gather(futures)] == list(range(6))
    assert len({job for _, job in managed.client.gather(futures)}) == 3
    del futures
    wait_until(lambda: not bench.jobs(), "no jobs")
    assert managed._serial == 3, "a job was submitted that was not needed"
    wait_until(lambda: not list(bench.logs.iterdir()), "no logs and scripts of jobs that ended well")


def test_no_more_jobs_are_submitted_than_there_are_slots_for(bench):
    managed = bench.start(cores=2, maximum_jobs=20)
    futures = [submit(managed, nap, n, 0.5, key=str(n)) for n in range(9)]
    managed.client.gather(futures)
    assert managed._serial == 5


def test_short_tasks_get_few_jobs(bench):
    managed = bench.start(maximum_jobs=20, unknown_task_duration="1s", target_duration="10s")
    managed.client.gather([submit(managed, nap, n, 0.1, key=str(n)) for n in range(25)])
    assert managed._serial <= 3


def test_an_interactive_queue_keeps_one_job(bench, quick):
    managed = bench.start(interactive=True)
    wait_until(lambda: managed.describe()["workers"] == 1, "a worker")
    time.sleep(2)
    assert len(bench.jobs()) == 1 and managed._serial == 1


def test_a_pending_job_says_why(bench):
    managed = bench.start(maximum_jobs=2, job_cores=99)
    futures = [submit(managed, nap, n, key=str(n)) for n in range(4)]
    said = wait_until(lambda: managed.describe()["reason"] and managed.describe(), "a reason")
    assert said["sentence"] in ("2 SLURM jobs pending (Resources), 4 tasks waiting", "2 SLURM jobs pending (PartitionConfig), 4 tasks waiting")
    assert said["pending_jobs"] == 2 and said["waiting_tasks"] == 4
    del futures
    wait_until(lambda: not bench.jobs(), "jobs that nobody needs any more are cancelled", 20)


@pytest.mark.parametrize("how", ["scancel", "worker", "requeue", "node"])
def test_a_job_that_dies_in_mid_task_costs_a_retry(bench, how):
    managed = bench.start(maximum_jobs=2)
    future = submit(managed, nap, 1, 4, key="a")
    name = started(managed, future)
    job = bench.jobs("RUNNING")[0]
    node = bench.lab.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    begin = time.monotonic()
    if how == "scancel":
        bench.lab.run("scancel", job)
    elif how == "worker":
        bench.lab.run("scancel", "--signal=KILL", "--full", job)
    elif how == "requeue":
        subprocess.run(["scontrol", "requeue", job], check=False)
    else:
        bench.lab("node", node, "kill")
    if how == "requeue":            # refused: our jobs say --no-requeue
        assert future.result(timeout=60)[1] == job
        return
    assert future.result(timeout=60) == (1, str(int(job) + 1))
    print("%s: done again after %.1f s" % (how, time.monotonic() - begin))
    if how == "scancel":
        assert managed.epitaph(name) == "was in SLURM job %s, which was cancelled on %s" % (job, node)


def test_a_task_whose_job_dies_twice_fails_and_the_epitaph_says_how(bench):
    managed = bench.start(maximum_jobs=1)
    future = submit(managed, nap, 1, 30, key="a")
    for _ in range(2):
        started(managed, future)
        bench.lab.run("scancel", *wait_until(lambda: bench.jobs("RUNNING"), "the job runs"))
        wait_until(lambda: not bench.jobs("RUNNING"), "the job is gone")
    error = future.exception(timeout=60)
    assert isinstance(error, distributed.KilledWorker)
    assert "was cancelled on n" in managed.epitaph(error.last_worker.address)
    assert "was cancelled on n" in managed.epitaph(error.last_worker.name)


@pytest.mark.parametrize("queue, words", [
    ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
    ({"memory": "900G"}, "Memory specification can not be satisfied"),
    ({"job_extra_directives": ["--no-such-option"]}, "unrecognized option '--no-such-option'")])
def test_the_words_of_sbatch_reach_the_user(bench, queue, words):
    managed = bench.start(**queue)
    future = submit(managed, nap, 1, key="a")
    sentence = wait_until(lambda: managed.failures, "a failure")[0]
    assert sentence.startswith("SLURM refuses the job: sbatch: ") and words in sentence and "\n" not in sentence
    assert words in managed.describe()["sentence"]
    del future


def test_without_controller_the_user_is_told_and_the_tasks_run_when_it_is_back(bench, monkeypatch):
    managed = bench.start()
    bench.lab("ctld", "stop")
    try:
        future = submit(managed, nap, 1, key="a")
        wait_until(lambda: "Unable to contact slurm controller" in managed.describe()["sentence"], "its words")
        assert not managed.failures
        monkeypatch.setattr(queuejobs, "PATIENCE_S", 1.0)
        sentence = wait_until(lambda: managed.failures, "a failure", 60)[0]
        assert sentence.startswith("SLURM has not taken a job for 1 s: sbatch: error: ")
    finally:
        bench.lab("ctld", "start")
    assert future.result(timeout=60)[0] == 1


@pytest.mark.parametrize("queue, words", [
    ({"job_script_prologue": ["echo the module is not there >&2", "exit 3"]}, ["exit code 3", "the module is not there"]),
    ({"job_script_prologue": ["export PYTHONHOME=/nowhere"]}, ["No module named 'encodings'"])])
def test_a_job_that_fails_at_once_is_not_submitted_for_ever(bench, queue, words):
    managed = bench.start(maximum_jobs=2, **queue)
    future = submit(managed, nap, 1, key="a")
    sentence = wait_until(lambda: managed.failures, "a failure", 60)[0]
    assert "3 jobs in a row failed at once" in sentence and all(word in sentence for word in words), sentence
    assert managed._serial == 3
    del future


def test_at_the_end_of_its_lifetime_a_job_takes_no_tasks_and_finishes_those_it_has(bench):
    managed = bench.start(cores=2, maximum_jobs=2, lifetime="4s", lifetime_stagger="0.1s", target_duration="1000s")
    long = submit(managed, nap, 1, 12, key="long")
    first = started(managed, long)
    wait_until(lambda: any(worker.status.name == "closing_gracefully" for worker in managed.cluster.scheduler.workers.values()), "drained")
    late = [submit(managed, nap, n, 1, key="late%d" % n) for n in range(2)]
    jobs = {job for _, job in managed.client.gather(late)}
    number, job = long.result(timeout=30)
    assert jobs and job not in jobs, "a task was given to a worker at the end of its lifetime"
    assert managed.epitaph(first) is None or "ended" in managed.epitaph(first)
    assert managed._serial == 2


def test_tasks_that_wait_on_a_worker_at_the_end_of_its_lifetime_go_elsewhere(bench):
    managed = bench.start(maximum_jobs=2, lifetime="5s", lifetime_stagger="0.1s", target_duration="1000s", dask_resources={"a": 1})
    futures = [submit(managed, nap, n, 9, key=str(n), resources={"a": 1}) for n in range(2)]    # such tasks wait on the worker
    results = managed.client.gather(futures)
    assert len({job for _, job in results}) == 2


def test_a_task_that_reaches_the_walltime_is_run_again_once_and_then_fails(bench):
    managed = bench.start(walltime="20s", unknown_task_duration="1s")
    future = submit(managed, nap, 1, 100, key="a")
    error = future.exception(timeout=120)
    assert isinstance(error, distributed.KilledWorker)
    assert managed._serial == 2
    assert "walltime" in managed.epitaph(error.last_worker.name)


async def limited(number, limit_s):
    """As a task of ours begins."""
    import os
    from distributed import Reschedule, get_worker
    from seamless_lite import daskjob
    if daskjob.is_too_late(get_worker(), limit_s):
        raise Reschedule()
    return number, os.environ["SLURM_JOB_ID"]


def test_a_task_with_a_time_limit_is_not_begun_in_a_job_that_ends_sooner(bench):
    managed = bench.start(walltime="60s", lifetime="45s", maximum_jobs=2, target_duration="1000s")
    first = managed.client.submit(limited, 1, 49, key="seamless-a").result(timeout=30)[1]
    time.sleep(3)
    assert managed.client.submit(limited, 2, 30, key="seamless-b").result(timeout=30)[1] == first
    second = managed.client.submit(limited, 3, 49, key="seamless-c").result(timeout=30)[1]
    assert second != first and managed.client.submit(limited, 4, None, key="seamless-d").result(timeout=30)[1] == second
    assert managed.refuses(30) is None and "end after 50 s" in managed.refuses(49)


def test_a_task_that_waits_with_a_time_limit_makes_way_for_a_job_that_lasts(bench):
    managed = bench.start(walltime="60s", lifetime="45s", maximum_jobs=2, target_duration="1000s")
    blocker = submit(managed, nap, 0, 8, key="blocker")
    started(managed, blocker)
    managed.limits["seamless-3"] = 49.0
    futures = [submit(managed, nap, n, key=str(n)) for n in range(1, 6)]
    assert len({job for _, job in managed.client.gather(futures)}) == 1 and futures[2].result()[1] != blocker.result()[1]


def test_a_kill_leaves_jobs_that_end_by_themselves_and_the_next_start_cancels_them(bench):
    code = ("import sys, time; sys.path[:0] = %r\n"
            "import test_slurm_queue as t, distributed\n"
            "from seamless_lite import daskqueue\n"
            "if __name__ == '__main__':\n"
            "    m = daskqueue.make_cluster(%r, security=None, host=None, scheduler_options={}, environment=%r, log_folder=%r, state_file=%r)\n"
            "    c = distributed.Client(m.cluster)\n"
            "    f = [c.submit(t.nap, n, 300, key='seamless-%%d' %% n) for n in range(2)]\n"
            "    time.sleep(600)\n")
    path = [str(ROOT), str(ROOT / "tests")]
    code %= (path, bench.parameters(maximum_jobs=2), {"PYTHONPATH": os.pathsep.join(path)}, str(bench.logs), str(bench.state_file))
    (bench.folder / "owner.py").write_text(code)

    def killed():
        with open(bench.folder / "owner.log", "ab") as out:
            owner = subprocess.Popen([sys.executable, str(bench.folder / "owner.py")], stdout=out, stderr=out)
        wait_until(lambda: len(bench.jobs("RUNNING")) == 2, (bench.folder / "owner.log").read_text)
        time.sleep(1.5)                     # its workers have tasks
        owner.send_signal(signal.SIGKILL)
        owner.wait()

    killed()
    begin = time.monotonic()
    wait_until(lambda: not bench.jobs(), "jobs without a scheduler end", 70)
    print("jobs of a killed scheduler ended after %.1f s" % (time.monotonic() - begin))
    killed()
    foreign = bench.lab.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 300").strip()
    left = bench.jobs()
    assert len(left) == 3
    managed = bench.start()
    wait_until(lambda: set(bench.jobs()) <= {foreign}, "the jobs that were left are cancelled", 5)
    assert bench.jobs("PENDING", "RUNNING") == [foreign], "a job of somebody else"
    managed.close()
    assert not bench.state_file.exists()


def test_closing_leaves_no_job_no_folder_and_no_process(bench):
    managed = bench.start(maximum_jobs=2, tmpdir=str(bench.folder))
    futures = [submit(managed, nap, n, 300, key=str(n)) for n in range(2)]
    for future in futures:
        started(managed, future)
    folders = list(bench.folder.glob("seamless-job-*"))
    assert len(folders) == 2 and all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
    managed.close()
    wait_until(lambda: not bench.jobs("PENDING", "RUNNING", "COMPLETING"), "no jobs", 20)
    assert not list(bench.folder.glob("seamless-job-*"))
    assert not bench.state_file.exists()


def test_what_a_queue_says_has_its_effect_in_the_job(bench):
    def look():
        import os
        import subprocess
        import dask
        import distributed
        worker = distributed.get_worker()
        shown = subprocess.run(["scontrol", "-o", "show", "job", os.environ["SLURM_JOB_ID"]], stdout=subprocess.PIPE).stdout.decode()
        return {"threads": worker.state.nthreads, "resources": worker.state.total_resources, "memory": worker.memory_manager.memory_limit,
                "folder": worker.local_directory, "tmp": os.environ["TMPDIR"], "own": os.environ.get("OWN"), "cwd": os.getcwd(),
                "target": dask.config.get("distributed.worker.memory.target"), "node": os.environ["SLURMD_NODENAME"],
                "job": dict(word.split("=", 1) for word in shown.split() if "=" in word), "host": worker.address}
    managed = bench.start(
        cores=2, worker_threads=3, job_cores=2, memory="500MB", walltime="00:07:00", tmpdir=str(bench.folder), partition="normal",
        dask_resources={"gpu": 2}, extra_dask_config={"distributed": {"worker": {"memory": {"target": 0.5}}}},
        job_script_prologue=["export OWN='own words'"], job_extra_directives=["#SBATCH --comment=hello", "--nice=7"], node="n2")
    found = managed.client.submit(look, pure=False).result(timeout=60)
    assert found["threads"] == 3 and found["resources"] == {"gpu": 2} and found["target"] == 0.5
    assert found["memory"] == 500 << 20 and found["own"] == "own words" and found["node"] == "n2"
    assert found["folder"].startswith(str(bench.folder) + "/seamless-job-") and found["tmp"] == found["cwd"]
    assert "127.0.0.1" in found["host"]
    job = found["job"]
    assert job["JobName"] == managed.tag and job["Partition"] == "normal" and job["TimeLimit"] == "00:07:00"
    assert job["NumCPUs"] == "2" and job["MinMemoryNode"] == "500M" and job["Comment"] == "hello" and job["Requeue"] == "0"
    assert managed.slots == 3


def test_an_exclusive_queue_gets_a_whole_node(bench):
    managed = bench.start(cores=None, exclusive=True)
    _, job = submit(managed, nap, 1, key="a").result(timeout=60)
    shown = bench.lab.run("scontrol", "-o", "show", "job", job)
    assert managed.slots == 2 and "OverSubscribe=NO" in shown and "NumCPUs=2" in shown and "MinMemoryNode=0" in shown


def test_several_processes_in_a_job(bench, quick):
    managed = bench.start(cores=2, processes=2)
    futures = [submit(managed, nap, n, 2, key=str(n)) for n in range(2)]
    assert len({job for _, job in managed.client.gather(futures)}) == 1
    assert managed.slots == 1 and len(managed.cluster.scheduler.workers) == 2
    del futures
    wait_until(lambda: not bench.jobs(), "no jobs")


def test_the_defaults_are_those_of_the_partition(bench):
    plan = bench.start(walltime=None, partition="short").plan
    assert plan.walltime_s == 60 and plan.memory == 2000 << 20       # half of a node's, for one of its two cores
    assert plan.lifetime_s >= 20 and plan.lifetime_s <= 50
    assert bench.start(walltime=None).plan.walltime_s == 3600


def test_a_job_that_runs_out_of_memory_is_retried_and_then_says_so(tmp_path, monkeypatch):
    lab = make_lab(Slurm, nodes=1, cpus=2, enforce_memory=True)
    bench = Bench(lab, tmp_path, monkeypatch)
    try:
        managed = bench.start(memory="300MB")
        future = submit(managed, hog, 700, "x", key="hog")
        error = future.exception(timeout=120)
        assert isinstance(error, distributed.KilledWorker)
        assert "ran out of memory on n1 (the queue asks for 300M" in managed.epitaph(error.last_worker.name)
        assert managed._serial == 2
    finally:
        bench.close()
        lab.stop()
