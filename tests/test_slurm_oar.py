"""``daskqueue`` on a real OAR.  Its packages: oar-server oar-server-pgsql oar-node oar-user oar-user-pgsql postgresql."""
import json
import os
import subprocess
import sys

import pytest

from labs import HOSTS, ROOT, need

pytestmark = pytest.mark.slurm

SCRIPT = """
import os, sys, time
sys.path.insert(0, %(root)r)
import distributed
from seamless_lite import daskqueue, queuejobs, queuesystem

def nap(number, seconds):
    import os, time
    time.sleep(seconds)
    return number, os.environ["OAR_JOB_ID"], os.uname().nodename

def until(condition, what, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)

def jobs(managed):
    return queuesystem.Oar().jobs(managed.tag)

def start(**queue):
    folder = os.path.join(os.environ["HOME"], "jobs")
    os.makedirs(folder, 0o700, exist_ok=True)
    managed = daskqueue.make_cluster(
        {"type": "oar", "cluster": "c", "memory_per_core_property_name": "mem_core",
         "queue": {"cores": 1, "walltime": "0:10:00", "memory": "500MB", "maximum_jobs": 2, **queue}},
        security=None, host=None, scheduler_options={}, log_folder=folder, state_file=folder + "/jobs.json", environment={"PYTHONPATH": %(root)r})
    managed.failures = []
    managed.on_failure = managed.failures.append
    return managed, distributed.Client(managed.cluster)

if __name__ == "__main__":
    queuejobs.IDLE_S = 1.0
    begin = time.monotonic()
    managed, client = start()
    futures = [client.submit(nap, n, 8, key="seamless-%%d" %% n) for n in range(4)]
    until(lambda: managed.describe()["pending_jobs"] + managed.describe()["running_jobs"] == 2, "2 jobs")
    said = managed.describe()["sentence"]
    assert "OAR job" in said and "waiting" in said, said
    results = client.gather(futures)
    print("4 tasks of 8 s: %%.1f s" %% (time.monotonic() - begin), said)
    assert [r[0] for r in results] == list(range(4)) and len({r[1] for r in results}) == 2
    del futures
    until(lambda: not jobs(managed), "no jobs any more")
    # a job that dies
    future = client.submit(nap, 7, 5, key="seamless-7")
    until(lambda: any(state.executing for state in managed.cluster.scheduler.workers.values()), "a task runs")
    [id], [worker] = list(jobs(managed)), [state.name for state in managed.cluster.scheduler.workers.values()]
    queuesystem.Oar().cancel([id])
    assert future.result(timeout=90)[1] != id
    assert managed.epitaph(worker).startswith("was in OAR job %%s, which was cancelled on n" %% id), managed.epitaph(worker)
    managed.close()
    until(lambda: not jobs(managed), "no jobs after the end")
    client.close()
    # words of refusal
    managed, client = start(partition="nowhere")
    future = client.submit(nap, 8, 0, key="seamless-8")
    until(lambda: managed.failures, "a failure")
    assert "The queue nowhere does not exist" in managed.failures[0], managed.failures
    managed.close()
    print("all is well")
"""


@pytest.fixture
def oar():
    """``oar(argv)`` runs a command on the login host of an OAR with two nodes."""
    need("dask_jobqueue", "distributed")
    if not os.path.exists("/usr/lib/oar/Almighty"):
        pytest.skip("OAR is not installed")         # also in CI: its packages need a database server
    lab = [sys.executable, str(HOSTS / "oar-lab"), "--name", "d%d" % (os.getpid() % 10 ** 5)]
    done = subprocess.run([*lab, "start", "--nodes", "2", "--python", sys.executable], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    if done.returncode:
        pytest.skip("no OAR: " + done.stderr.decode())
    info = json.loads(done.stdout)
    try:
        yield lambda *argv: subprocess.run([*lab, "login", "--", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                                           universal_newlines=True, cwd="/"), info
    finally:
        subprocess.run([*lab, "stop"], timeout=60, check=False)


def test_dask_workers_live_in_jobs_of_oar(oar, tmp_path):
    run, _ = oar
    script = tmp_path / "script.py"
    script.write_text(SCRIPT % {"root": str(ROOT)})
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/pytest"):
            folder.chmod(0o755)             # the ordinary user of the lab reads it
    done = run(sys.executable, str(script))
    print(done.stdout)
    assert done.returncode == 0 and "all is well" in done.stdout
