"""A daskserver on a real SLURM, as a user has it: functions and commands in jobs, and what is said when jobs fail."""
import contextlib
import os
import signal
import time

import pytest

from labs import ROOT, Slurm, make_lab, need, wait_until

pytestmark = pytest.mark.slurm

CLUSTERS = """
hpc:
  type: slurm
  default_queue: one
  queues:
    one: {cores: 1, walltime: 10, maximum_jobs: 1, memory: 300MB}
    two: {TEMPLATE: one, maximum_jobs: 2, target_duration: 1s}
    nowhere: {TEMPLATE: one, partition: nowhere}
    broken: {TEMPLATE: one, job_script_prologue: ["echo no such module >&2; exit 7"]}
    minute: {TEMPLATE: one, walltime: 20s, unknown_task_duration: 1s}
    large: {TEMPLATE: one, job_cores: 99}
  frontends:
    - hostname: localhost
      hashserver: {}
      database: {}
      daskserver: {}
"""
PROJECT = """
- cluster: hpc
- project: p
- execution: remote
- remote: daskserver
"""
FUNCTION = """
from seamless_lite import config, direct
config.init()

@direct
def where(a):
    import os
    return [a + 1, os.environ["SLURM_JOB_ID"], os.getcwd(), os.environ["TMPDIR"]]
"""


@pytest.fixture
def user(slurm, lab_user):
    need("dask_jobqueue", "distributed")
    found = lab_user(slurm)
    found.configure(CLUSTERS, PROJECT)
    yield found
    found.end()


def jobs(user):
    """Ids of the user's jobs that wait or run."""
    return user.lab.run("squeue", "-h", "-t", "PD,R", "-o", "%i").split()


def daskservers(user):
    return [pid for pid in user.processes() if b"daskserver" in open("/proc/%d/cmdline" % pid, "rb").read()
            and b"slurm_script" not in open("/proc/%d/cmdline" % pid, "rb").read()]


def test_functions_and_commands_run_in_jobs_and_nothing_is_left_when_the_service_stops(user):
    begin = time.monotonic()
    number, job, folder, tmp = eval(user.python(FUNCTION + "print(where(1))").ok())
    print("0 -> first result, with all services: %.1f s" % (time.monotonic() - begin))
    assert number == 2 and "/seamless-job-" in folder and "/seamless-job-" in tmp
    assert user.run("seamless-run", "-c", "echo $SLURM_JOB_ID; seq 3 | wc -l").ok() == "%s\n3\n" % job
    assert jobs(user) == [job]
    for pid in daskservers(user):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not user.lab.jobs(), "no jobs")
    wait_until(lambda: not os.path.exists(tmp), "the job's folder is removed")
    left = user.home / ".seamless/dask"
    wait_until(lambda: [path for path in left.rglob("*") if path.is_file()] == [], "no keys, scripts and logs are left")


def test_a_job_that_asks_for_jobs_needs_only_one_core_of_one_job(user):
    out = user.python("""
        from seamless_lite import config, direct
        config.init()

        @direct
        def total(n):
            from seamless_lite import direct
            @direct
            def half(m):
                return m / 2
            return sum(half(m) for m in range(n))
        print(total(5))
        """, timeout_s=90)
    assert out.ok() == "5.0\n" and len(jobs(user)) <= 1


@pytest.mark.parametrize("queue, words", [
    ("nowhere", ["SLURM refuses the job: sbatch: ", "invalid partition specified: nowhere"]),
    ("broken", ["3 jobs in a row failed at once", "exit code 7", "no such module"])])
def test_a_queue_that_does_not_work_is_an_error_with_the_words_of_slurm(user, queue, words):
    user.configure(project=PROJECT + "- queue: %s\n" % queue)
    done = user.run("seamless-run", "-c", "echo hello", timeout_s=60)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done


def test_a_user_who_waits_in_the_queue_is_told_why(user):
    """At a terminal; ``script`` makes one."""
    need(program="script")
    user.configure(project=PROJECT + "- queue: large\n")
    command = "%s %s -c 'echo hello'" % (user.python_exe, ROOT / "bin/seamless-run")
    waiting = user.start("script", "-qec", command, "/dev/null")
    wait_until(lambda: "1 SLURM job pending (" in waiting.stdout and "1 task waiting" in waiting.stdout, lambda: waiting.stdout, 30)
    waiting.kill(signal.SIGTERM)
    waiting.finish()
    wait_until(lambda: not jobs(user), "a job that nobody needs is cancelled")


def test_a_daskserver_that_is_killed_costs_time_and_leaves_no_job(user):
    running = user.start("seamless-run", "-c", "sleep 6; echo done")
    [old] = wait_until(lambda: user.lab.run("squeue", "-h", "-t", "R", "-o", "%i").split(), "a job runs")
    time.sleep(2)
    for pid in daskservers(user):
        os.kill(pid, signal.SIGKILL)
    assert running.finish(90).ok() == "done\n"
    wait_until(lambda: old not in jobs(user) and len(jobs(user)) <= 1, "the jobs of the one that was killed are gone")


def test_a_command_that_reaches_the_walltime_twice_is_told_so(user):
    user.configure(project=PROJECT + "- queue: minute\n")
    done = user.run("seamless-run", "-c", "sleep 50", timeout_s=120)
    assert done.returncode == 1 and "was tried 2 times" in done.stderr and "reached its walltime of 00:00:20" in done.stderr, done


def test_a_command_that_runs_out_of_memory_is_told_so(lab_user, monkeypatch):
    need("dask_jobqueue", "distributed")
    lab = make_lab(Slurm, nodes=1, cpus=2, enforce_memory=True)
    try:
        user = lab_user(lab)
        user.configure(CLUSTERS, PROJECT)
        done = user.python(FUNCTION + """
@direct
def hog(a):
    import time
    data = bytearray(600 << 20)
    data[::4096] = b"x" * len(data[::4096])
    time.sleep(30)
hog(1)
""", timeout_s=120)
        assert done.returncode == 1 and "out of memory" in done.stderr, done
        user.end()
    finally:
        lab.stop()


NODES = """
import os, sys, time
import distributed
from seamless_lite import daskqueue, queuejobs
def nap(seconds):
    import os, time
    time.sleep(seconds)
    return os.environ["SLURMD_NODENAME"], distributed.get_worker().address
if __name__ == "__main__":
    folder = sys.argv[1]
    managed = daskqueue.make_cluster(
        {"type": "slurm", "cluster": "c", "queue": {"cores": 1, "walltime": "10", "maximum_jobs": 2}}, security=None, host=None, log_folder=folder,
        scheduler_options={}, environment={"PYTHONPATH": os.environ["PYTHONPATH"]}, state_file=folder + "/jobs.json")
    client = distributed.Client(managed.cluster)
    print("scheduler", managed.cluster.scheduler_address, flush=True)
    future = client.submit(nap, 3 if len(sys.argv) < 3 else 10, pure=False)
    while not any(state.executing for state in managed.cluster.scheduler.workers.values()):
        time.sleep(0.1)
    print("running", *[state.name for state in managed.cluster.scheduler.workers.values()], flush=True)
    print("result", *future.result(timeout=120), flush=True)
    managed.close()
"""


@pytest.fixture(scope="module")
def nodes():
    """A SLURM whose nodes have addresses of their own."""
    need("dask_jobqueue", "distributed")
    lab = make_lab(Slurm, nodes=2, cpus=1, net="netns", fast_tcp=True)
    yield lab
    lab.stop()


def test_scheduler_and_workers_find_each_other_by_the_addresses_of_the_nodes(nodes, lab_user, tmp_path):
    out = lab_user(nodes).python(NODES, tmp_path, timeout_s=90).ok()
    words = dict(line.split(" ", 1) for line in out.splitlines())
    assert words["scheduler"].startswith("tcp://10.99.0.") and " tcp://10.99.0." in words["result"]


def test_a_node_that_falls_silent_costs_a_retry(nodes, lab_user, tmp_path):
    user = lab_user(nodes)
    running = user.start_python(NODES, tmp_path, "long")
    wait_until(lambda: "running" in running.stdout, "a task runs")
    node = nodes.run("squeue", "-h", "-t", "R", "-o", "%N").strip()
    begin = time.monotonic()
    netns = [nodes.command[0].replace("slurm-lab", "netns-lab"), "--lab", nodes.info["netns_lab"]]
    import subprocess
    subprocess.run([*netns, "cut", node], check=True, timeout=30)
    try:
        out = running.finish(120).ok()
        print("done elsewhere after %.1f s" % (time.monotonic() - begin))
        assert out.splitlines()[-1].split()[1] != node
    finally:
        subprocess.run([*netns, "restore", node], check=True, timeout=30)
        with contextlib.suppress(Exception):
            nodes("wait", "60")
