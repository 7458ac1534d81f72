"""What the keys of a queue become, without a queueing system: plans, job scripts, and the words of a fake SLURM."""
import copy
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import types

import pytest

from labs import need
from seamless_lite import conda, daskjob, daskqueue, hostside, queuescript, queuestate, queuesystem
from seamless_lite.daskstores import mark, read_mark
from seamless_lite.errors import ConfigurationError
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.layers import LayeredBuffers
from seamless_lite.queuesystem import Partition, QueueError


class Site(queuesystem.Slurm):
    """A SLURM that offers nodes of 8 cores and 16 GiB, and takes no job."""
    offers = Partition(8, 16 << 30, "1-00:00:00", None, "127.0.0.1")

    def partition(self, name, node):
        return self.offers


class OarSite(Site, queuesystem.Oar):
    title, kind, mark = "OAR", "oar", "#OAR "


def plan(system=Site, cluster="c", node=None, memory_name=None, **queue):
    found, _ = queuescript.plan({"cluster": cluster, "node": node, "memory_per_core_property_name": memory_name,
                                 "queue": {"name": "q", **queue}}, system(), {"PYTHONPATH": "/some where"}, "/py")
    return found


@pytest.mark.parametrize("text, kind, seconds", [
    ("90", "slurm", 5400), ("1:30", "slurm", 90), ("2:00:00", "slurm", 7200), ("1-2", "slurm", 93600), ("1-02:30", "slurm", 95400),
    ("2", "oar", 7200), ("2:30", "oar", 9000), ("0:30:00", "oar", 1800), ("90m", "slurm", 5400), ("1h 30m", "oar", 5400),
    ("2 hours", "slurm", 7200), ("3 minutes", "slurm", 180), ("UNLIMITED", "slurm", math.inf)])
def test_a_walltime_is_what_the_queueing_system_would_understand_or_has_a_unit(text, kind, seconds):
    assert plan(Site if kind == "slurm" else OarSite, cores=1, walltime=text).walltime_s == seconds


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("1.5m", 90), ("1:30", 90), ("1:00:00", 3600), ("500 ms", 0.5)])
def test_other_times_are_seconds_or_have_a_unit(text, seconds):
    assert plan(cores=1, target_duration=text).target_s == seconds


@pytest.mark.parametrize("text, mib", [("16GB", 16384), ("16GiB", 16384), ("1.5G", 1536), ("4000", 4000), ("512 MB", 512), ("2T", 2 << 20)])
def test_memory_is_what_slurm_would_understand(text, mib):
    found = plan(cores=1, memory=text)
    assert found.memory == mib << 20 and found.options["job_mem"] == "%dM" % mib


@pytest.mark.parametrize("key, word", [("walltime", "soon"), ("walltime", "0"), ("memory", "much"), ("target_duration", "1 fortnight"),
                                       ("lifetime", "-3"), ("processes", 9)])
def test_nonsense_is_a_sentence_that_names_queue_and_key(key, word):
    with pytest.raises(ConfigurationError, match="the queue 'q' of cluster 'c' has '%s: %s'" % (key, re.escape(str(word)))):
        plan(cores=2, **{key: word})


def test_a_queue_without_cores_is_told_to_have_some():
    with pytest.raises(ConfigurationError, match="add 'cores: NUMBER'"):
        plan()


def test_the_defaults():
    found = plan(cores=2)
    assert (found.processes, found.threads, found.cores, found.slots) == (1, 2, 2, 2)
    assert found.memory == 4 << 30, "the share of a node that goes with its cores"
    assert found.walltime_s == 86400 and found.minimum == 0 and found.maximum == 10
    assert found.lifetime_s == 86400 - 10 - 60 and found.stagger_s == 240
    assert found.unknown_s == found.target_s == 60


def test_where_the_partition_has_no_limit_a_job_asks_for_an_hour(monkeypatch):
    monkeypatch.setattr(Site, "offers", Partition(8, 16 << 30, None, None))
    assert plan(cores=1).walltime_s == 3600
    monkeypatch.setattr(Site, "offers", Partition(8, 16 << 30, None, "00:20:00"))
    assert plan(cores=1).walltime_s == 1200


def test_a_site_that_says_nothing_gets_defaults_too(monkeypatch):
    def silent(self, name, node):
        raise QueueError("sinfo: no")
    monkeypatch.setattr(Site, "partition", silent)
    found, notes = queuescript.plan({"cluster": "c", "queue": {"cores": 3}}, Site(), {}, "/py")
    assert found.memory == 3 << 30 and found.walltime_s == 3600 and notes == ["sinfo: no"]


@pytest.mark.parametrize("queue, shape", [
    ({"cores": 8}, (1, 8, 8)), ({"cores": 8, "processes": 2}, (2, 4, 8)), ({"cores": 8, "worker_threads": 2}, (4, 2, 8)),
    ({"cores": 8, "processes": 2, "worker_threads": 1}, (2, 1, 8)), ({"exclusive": True}, (1, 8, 8)),
    ({"worker_threads": 3}, (1, 3, 3)), ({"cores": 1, "worker_threads": 5}, (1, 5, 1))])
def test_cores_processes_and_threads(queue, shape):
    found = plan(**queue)
    assert (found.processes, found.threads, found.cores) == shape


@pytest.mark.parametrize("walltime_s", [5, 30, 60, 600, 86400])
def test_a_job_takes_tasks_for_some_time_and_never_until_its_walltime(walltime_s):
    found = plan(cores=1, walltime="%ds" % walltime_s)
    assert walltime_s / 4 < found.lifetime_s < walltime_s and 0 <= found.stagger_s <= found.lifetime_s / 2


def test_the_lifetime_differs_from_job_to_job_within_the_stagger():
    found = plan(cores=1, walltime="1h", lifetime="1000s", lifetime_stagger="100s")
    values = {int(queuescript.with_lifetime(found)[0].rpartition("=")[2]) for _ in range(200)}
    assert 900 <= min(values) < 920 and 980 < max(values) <= 1000
    assert queuescript.with_lifetime(plan(cores=1, walltime="UNLIMITED")) == []
    assert plan(cores=1, walltime="10m", lifetime="2h").lifetime_s < 600


# --- scripts --------------------------------------------------------------------------------------------------

@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """``cluster(type, **queue)``: a scheduler with its ``Managed``, and no queueing system."""
    need("dask_jobqueue", "distributed")
    import dask.config
    import dask_jobqueue                    # its defaults, and those of distributed, are added when they are imported
    assert dask_jobqueue
    before = copy.deepcopy(dask.config.config)
    monkeypatch.setattr(daskqueue, "SYSTEMS", {"slurm": Site, "oar": OarSite})
    made = []

    def make(kind="slurm", node=None, memory_name=None, security=None, **queue):
        parameters = {"type": kind, "cluster": "c", "node": node, "memory_per_core_property_name": memory_name, "queue": {"name": "q", **queue}}
        folder = tmp_path / ("folder with %% and ' %d" % len(made))
        folder.mkdir(exist_ok=True)
        made.append(daskqueue.make_cluster(parameters, security=security, host=None, scheduler_options={}, log_folder=str(folder),
                                           environment={"PYTHONPATH": "/some where"}, state_file=str(folder / "jobs.json")))
        return made[-1]
    yield make
    for managed in made:
        managed._stopping.set()
        managed._thread.join(10)
        managed.cluster.close(timeout=10)
    dask.config.config.clear()
    dask.config.config.update(before)


def test_all_keys_of_a_queue_are_in_the_script_for_slurm(cluster):
    managed = cluster(cores=4, processes=2, job_cores=3, memory="2GB", walltime="1:00:00", partition="p", project="money", node="n7",
                      tmpdir="/my scratch", dask_resources={"gpu": 1, "disk": 5}, extra_dask_config={"distributed.worker.memory.target": 0.5},
                      job_extra_directives=["--gres=gpu:1", "#SBATCH --qos=high"], job_script_prologue=["module load x"], interactive=True)
    script = managed._script_of("name-1", "/logs/a%b.log")
    lines = script.splitlines()
    for line in ("#SBATCH -p p", "#SBATCH -A money", "#SBATCH --cpus-per-task=3", "#SBATCH --mem=2048M", "#SBATCH -t 01:00:00",
                 "#SBATCH --nodelist=n7", "#SBATCH --gres=gpu:1", "#SBATCH --qos=high", "#SBATCH --no-requeue", "#SBATCH -J " + managed.tag,
                 '#SBATCH --output="/logs/a%%b.log"', "module load x", "export PYTHONPATH='/some where'",
                 "export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=0.5", "export SEAMLESS_JOB_END=3590"):
        assert line in lines, (line, script)
    assert lines.index("module load x") > [n for n, line in enumerate(lines) if "SEAMLESS_JOB_BEGAN" in line][0]
    command = lines[-1] or lines[-2]
    for words in ("--name name-1 ", "--nthreads 2 ", "--nworkers 2 ", "--nanny ", "--resources 'gpu=1 disk=5'", "--memory-limit 1.00GiB",
                  "--preload seamless_lite.daskjob", '--local-directory "$SEAMLESS_JOB_FOLDER"', '--host "$SEAMLESS_JOB_HOST"', "--death-timeout 40"):
        assert words in command, (words, command)
    assert '"/my scratch"' in script and managed.plan.minimum == 1
    import dask
    assert dask.config.get("distributed.worker.memory.target") == 0.5 and dask.config.get("distributed.comm.timeouts")
    assert subprocess.run(["bash", "-n"], input=script.encode()).returncode == 0


def test_all_keys_of_a_queue_are_in_the_script_for_oar(cluster):
    managed = cluster("oar", cores=4, memory="4GB", walltime="2", partition="besteffort", project="money", node="n7", memory_name="mem_core",
                      job_extra_directives=["-t besteffort"])
    script = managed._script_of("name-1", "/logs/a.log")
    for line in ("#OAR -q besteffort", "#OAR --project money", "#OAR -l /nodes=1/core=4,walltime=02:00:00", "#OAR -n " + managed.tag,
                 "#OAR -p 'host='n7' AND mem_core>=1024'", "#OAR -t besteffort", '#OAR -O "/logs/a.log"'):
        assert line in script.splitlines(), (line, script)
    assert "#OAR -l /nodes=1,walltime" in cluster("oar", exclusive=True)._script_of("n", "/l")


def test_an_exclusive_queue_asks_for_the_node(cluster):
    script = cluster(exclusive=True)._script_of("n", "/l")
    assert "#SBATCH --exclusive" in script and "#SBATCH --mem=0" in script and "--cpus-per-task=8" in script


def test_the_keys_of_the_cluster_are_in_private_files_and_not_in_the_script(cluster):
    need("distributed", program="openssl")
    from seamless_lite import dasktls
    managed = cluster(cores=1, security=dasktls.security(dasktls.make_keys()))
    script = managed._script_of("n", "/l")
    assert "BEGIN" not in script and managed.cluster.scheduler_address.startswith("tls://")
    assert "--tls" not in script, "dask_jobqueue does not quote paths"
    done = subprocess.run(["bash"], input="\n".join(line for line in script.splitlines() if line.startswith("export DASK_")).encode() + b"""
%s -c 'if True:
    import distributed
    security = distributed.Security()
    assert security.require_encryption
    for role in ("worker", "client"):
        for path in security.get_tls_config_for_role(role).values():
            print(path or "")'""" % sys.executable.encode(), stdout=subprocess.PIPE, check=True)
    paths = sorted(filter(None, done.stdout.decode().splitlines()))
    assert paths == sorted(2 * managed._files) and " with % and ' " in paths[0]
    assert "PRIVATE KEY" in open(managed._files[-1]).read()
    assert len(managed._files) == 3 and all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in managed._files)


def test_the_job_makes_its_folder_where_it_can_removes_it_and_those_of_killed_jobs(cluster, tmp_path):
    wanted = '~/$PART/not "there"'
    script = cluster(cores=1, tmpdir=wanted)._script_of("n", "/l")
    lines = script.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("SEAMLESS_JOB_NAME="))
    end = next(n for n, line in enumerate(lines) if line.startswith("cd "))
    part = "\n".join(lines[begin:end + 1])
    environ = {"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"], "HOSTNAME": "node.of.site", "HOME": str(tmp_path / "home"), "PART": "x $y"}
    elsewhere = subprocess.run(["bash", "-c", part], stderr=subprocess.PIPE, env=environ, text=True, check=True).stderr
    assert elsewhere == "there can be no temporary files in %s: %s is taken\n" % (tmp_path / 'home/x $y/not "there"', tmp_path)
    (tmp_path / 'home/x $y/not "there"').mkdir(parents=True)
    taken = subprocess.run(["bash", "-c", part + "\npwd"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, text=True, check=True)
    assert taken.stdout.startswith(str(tmp_path / 'home/x $y/not "there"/seamless-job-node-')) and not taken.stderr
    shutil.rmtree(tmp_path / "home")

    def job(rest, **kwargs):
        return subprocess.Popen(["bash", "-c", part + rest], stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environ, text=True, **kwargs)
    living, killed, ends = job("\npwd; read x\n"), job("\npwd; read x\n"), job("\npwd; read x; stat -c %a .; exit 3\n")
    folders = [process.stdout.readline().strip() for process in (living, killed, ends)]
    assert all(folder.startswith(str(tmp_path) + "/seamless-job-node-") and os.path.isdir(folder) for folder in folders)
    assert ends.communicate("\n", timeout=10)[0] == "700\n" and ends.returncode == 3
    killed.kill()
    killed.communicate(timeout=10)
    assert [os.path.isdir(folder) for folder in folders] == [True, True, False]
    if shutil.which("flock"):
        job("").communicate(timeout=10)
        assert [os.path.isdir(folder) for folder in folders] == [True, False, False]
    living.terminate()
    living.communicate(timeout=10)
    assert os.listdir(tmp_path) == [name for name in os.listdir(tmp_path) if not name.startswith("seamless-job")] or not shutil.which("flock")


def test_a_conda_environment_is_activated_in_the_job(cluster, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="has 'conda: env', but no conda was found"):
        monkeypatch.setenv("CONDA_ROOT", str(tmp_path))
        monkeypatch.setattr(conda, "CONDA_ROOTS", ())
        monkeypatch.delenv("CONDA_EXE", raising=False)
        cluster(cores=1, conda="env")
    profile = tmp_path / "etc/profile.d"
    profile.mkdir(parents=True)
    (profile / "conda.sh").write_text("conda() { echo conda \"$@\"; test \"$2\" = env; }\n")
    script = cluster(cores=1, conda="env")._script_of("n", "/l")
    assert "\npython -m distributed.cli.dask_worker " in script
    part = "\n".join(line for line in script.splitlines() if "conda" in line)
    done = subprocess.run(["bash"], input=part.encode(), stdout=subprocess.PIPE)
    assert done.stdout.decode() == "conda activate env\n" and done.returncode == 0
    script = cluster(cores=1, conda="a$(echo b)'\"")._script_of("n", "/l")
    part = "\n".join(line for line in script.splitlines() if "conda" in line)
    done = subprocess.run(["bash"], input=part.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stderr.decode() == "the conda environment a$(echo b)'\" cannot be activated\n" and done.returncode == 1


# --- what the commands say ------------------------------------------------------------------------------------

@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(name, shell lines)``: a program on PATH."""
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, os.environ["PATH"]))

    def make(name, text):
        (tmp_path / name).write_text("#!/bin/sh\n" + text)
        (tmp_path / name).chmod(0o755)
    return make


def test_a_refusal_is_one_line_with_the_words_of_the_command(commands):
    commands("sbatch", "echo 'sbatch: error: no' >&2; echo 'sbatch: error: never' >&2; exit 1\n")
    with pytest.raises(QueueError) as info:
        queuesystem.Slurm().submit("/x")
    assert str(info.value) == "sbatch: error: no sbatch: error: never (sbatch, exit code 1)" and not info.value.passing


def test_a_command_that_hangs_or_is_missing_is_a_sentence(commands, monkeypatch):
    commands("squeue", "exec sleep 60\n")
    with pytest.raises(QueueError, match="squeue did not answer within 0.2 s") as info:
        queuesystem.run(["squeue"], 0.2)
    assert info.value.passing
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QueueError, match="sbatch cannot be run on .*: No such file or directory; a cluster of this type"):
        queuesystem.Slurm().submit("/x")


@pytest.mark.parametrize("words, how", [
    ("JobState=TIMEOUT TimeLimit=00:10:00 BatchHost=n1", "reached its walltime of 00:10:00 on n1"),
    ("JobState=OUT_OF_MEMORY BatchHost=n1 MinMemoryNode=2G", "ran out of memory on n1 (the queue asks for 2G; 'memory:' changes that)"),
    ("JobState=NODE_FAIL BatchHost=n1", "was lost with its node n1"), ("JobState=CANCELLED BatchHost=n1", "was cancelled on n1"),
    ("JobState=FAILED ExitCode=3:0 BatchHost=n1", "failed on n1 (exit code 3)"),
    ("JobState=FAILED ExitCode=0:9 BatchHost=n1", "failed on n1 (signal 9)"),
    ("JobState=PREEMPTED ExitCode=0:0 BatchHost=n1", "was preempted on n1 (exit code 0)"),
    ("JobState=RUNNING BatchHost=n1", None)])
def test_how_a_job_ended(commands, words, how):
    commands("scontrol", "echo 'JobId=1 %s'\n" % words)
    assert queuesystem.Slurm().ending("1") == how


def test_the_log_of_a_job_tells_of_memory_too(commands):
    commands("scontrol", "echo 'JobId=1 JobState=FAILED BatchHost=n1 MinMemoryNode=2G'\n")
    assert "out of memory" in queuesystem.Slurm().ending("1", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1")


def test_the_jobs_of_a_dead_process_are_cancelled_and_those_of_a_living_one_are_not(commands, tmp_path):
    commands("squeue", "echo '7|PENDING|Resources'; echo '8|RUNNING|None'; echo \"$@\" >> %s/asked\n" % tmp_path)
    commands("scancel", "echo \"$@\" >> %s/cancelled\n" % tmp_path)
    path = str(tmp_path / "jobs.json")
    code = ("import sys; sys.path[:0] = %r\nfrom seamless_lite.queuestate import QueueState\n"
            "QueueState(%r).save('the-tag', 'slurm', ['7']); input() if sys.argv[1:] else None\n" % (sys.path, path))
    living = subprocess.Popen([sys.executable, "-c", code, "stay"], stdin=subprocess.PIPE)
    try:
        while not os.path.exists(path):
            assert living.poll() is None
        queuestate.QueueState(path)
        assert not (tmp_path / "cancelled").exists()
    finally:
        living.communicate(b"\n", timeout=20)
    commands("squeue", "echo 'squeue: error: try again' >&2; exit 1\n")
    state = queuestate.QueueState(path)
    state.save("next", "slurm", ())
    state.end()
    assert os.path.exists(path), "it could not ask, so it must not forget"
    commands("squeue", "echo '7|PENDING|Resources'; echo '8|RUNNING|None'; echo \"$@\" >> %s/asked\n" % tmp_path)
    queuestate.QueueState(path)
    assert (tmp_path / "cancelled").read_text() == "7 8\n" and "--name=the-tag" in (tmp_path / "asked").read_text()


def test_any_start_cancels_what_dead_clusters_left_and_removes_their_folders(commands, tmp_path):
    commands("squeue", "echo '7|PENDING|Resources'; echo \"$@\" >> %s/asked\n" % tmp_path)
    commands("scancel", "echo \"$@\" >> %s/cancelled\n" % tmp_path)
    node, me = os.uname().nodename, hostside.identity(os.getpid())
    states = {"dead": (node, "gone"), "living": (node, me), "elsewhere": ("another", "gone")}
    for name, (where, started) in states.items():
        (tmp_path / "dask" / name).mkdir(parents=True)
        (tmp_path / "dask" / name / "key.pem").write_text("")
        (tmp_path / "dask" / name / queuestate.FILE).write_text(json.dumps(
            {"tag": "tag-" + name, "system": "slurm", "node": where, "pid": os.getpid(), "pid_started": started, "ids": [], "left": []}))
    for name, age_s in (("new", 0), ("old", queuestate.KEEP_S + 10)):
        (tmp_path / "dask" / name).mkdir()
        os.utime(tmp_path / "dask" / name, (time.time() - age_s,) * 2)
    queuestate.sweep(str(tmp_path / "dask"))
    assert sorted(os.listdir(tmp_path / "dask")) == ["elsewhere", "living", "new"]
    assert (tmp_path / "asked").read_text().split()[-1] == "--name=tag-dead" and (tmp_path / "cancelled").read_text() == "7\n"
    assert "--user=%d" % os.getuid() in (tmp_path / "asked").read_text()
    own = queuestate.QueueState(str(tmp_path / "dask/elsewhere" / queuestate.FILE))
    own.save("mine", "slurm", ())
    own.end()
    assert "tag-elsewhere" in (tmp_path / "dask/elsewhere" / queuestate.FILE).read_text(), "only its own host can know"


def test_what_stands_in_a_script_for_oar_is_said_to_oarsub(commands, cluster, tmp_path):
    commands("oarsub", "for word in \"$@\"; do echo \"<$word>\"; done > %s/said; echo OAR_JOB_ID=5\n" % tmp_path)
    for memory_name, words in (("mem_core", "host='n7' AND mem_core>=1024"), (None, "host='n7'")):
        managed = cluster("oar", cores=4, memory="4GB", node="n7", memory_name=memory_name, job_extra_directives=["-t besteffort"])
        (tmp_path / "script").write_text(managed._script_of("name-1", "/logs/a b.log"))
        assert queuesystem.Oar().submit(str(tmp_path / "script")) == "5"
        said = (tmp_path / "said").read_text().splitlines()
        assert said[said.index("<-t>") + 1] == "<besteffort>" and said[said.index("<-O>") + 1] == "</logs/a b.log>"
        assert [said[n + 1] for n, word in enumerate(said) if word == "<-p>"][-1] == "<%s>" % words


# --- what is done about the jobs --------------------------------------------------------------------------------

class Queue(Site):
    """Takes jobs and runs none.  ``listed``: what is in the queue."""

    def __init__(self):
        self.listed, self.cancelled, self.n = {}, [], 0

    def submit(self, script):
        self.n += 1
        self.listed[str(self.n)] = queuesystem.Listed(queuesystem.RUNNING, "")
        return str(self.n)

    def jobs(self, tag):
        return dict(self.listed)

    def cancel(self, ids):
        self.cancelled += ids

    def ending(self, id, log=""):
        return "failed on n1 (exit code 1)"


@pytest.fixture
def managed(tmp_path):
    """``managed(**queue)``: a ``Managed`` that is looked after by the test, without Dask; ``drained``: addresses."""
    need("distributed")
    from seamless_lite import queuejobs

    def make(**queue):
        class Cluster:
            def sync(self, function, *arguments, callback_timeout=None):
                made.drained.append(arguments[0])

            def close(self, timeout=None):
                pass
        found = plan(Queue, **queue)
        made = queuejobs.Managed(Cluster(), found, Queue(), "tag", queuestate.QueueState(str(tmp_path / "jobs.json")), str(tmp_path),
                                 lambda name, path: "echo\n")
        made._stopping.set()
        made._thread.join(10)
        made._stopping.clear()
        made.drained, made.failures = [], []
        made.on_failure = made.failures.append
        return made
    yield make


def view(*workers, waiting=1, longest_s=0.0, usual_s=0.0):
    from seamless_lite.queuejobs import View, Worker
    return View([Worker("tcp://" + name, name, 1, 1, 0, False, life_s, end_s) for name, life_s, end_s in workers], waiting, 9, longest_s, usual_s)


def test_a_job_gets_no_task_that_takes_usually_longer_than_it_lasts(managed):
    made = managed(cores=1, walltime="20m")
    assert made._submit() and made._submit()
    made._meet(view(("tag-1", 100, 1000)), 0.0)
    made._drain(view(("tag-1", 5, 65), waiting=0, usual_s=900.0))
    assert made.drained == ["tcp://tag-1"]
    for end_s, usual_s, late in ((65, 30.0, False), (65, 0.0, False), (1000, 900.0, False), (1000, 1100.0, True)):
        made.drained.clear()
        made._drain(view(("tag-1", 5, end_s), usual_s=usual_s))
        assert bool(made.drained) is late, (end_s, usual_s)
    made.drained.clear()
    made._drain(view(("tag-2", 1000, 1180), usual_s=1179.0))
    assert not made.drained, "the next one would be no better"


def test_jobs_that_fail_are_no_reason_to_give_up_while_others_work(managed):
    made = managed(cores=1, maximum_jobs=5)
    for _ in range(4):
        assert made._submit()
    made._meet(view(("tag-1", 100, 1000)), time.monotonic())
    for id in "234":
        made._jobs[id].ended = ""
    made._bury(view(), time.monotonic())
    assert not made.failures and list(made._jobs) == ["1"]
    assert made._submit()
    made._jobs["1"].connected, made._jobs["5"].ended = False, ""
    made._bury(view(), time.monotonic())
    assert "4 jobs in a row failed at once" in made.failures[0]


def test_a_job_whose_sbatch_was_given_up_is_found_by_its_worker(managed):
    made = managed(cores=1)
    made.system.listed["77"] = queuesystem.Listed(queuesystem.RUNNING, "")
    made._ask_queue(view(), time.monotonic() + 100)
    assert made.system.cancelled == []
    made._ask_queue(view(("tag-1", 100, 1000)), time.monotonic() + 200)
    assert made.system.cancelled == ["77"]


def test_the_logs_of_jobs_that_worked_go_and_those_of_failed_ones_stay(managed, tmp_path, monkeypatch):
    from seamless_lite import queuejobs
    monkeypatch.setattr(queuejobs, "REMEMBERED", 2)
    made = managed(cores=1, maximum_jobs=9)
    for n in (1, 2, 3, 4):
        assert made._submit()
        (tmp_path / ("tag-%d.log" % n)).write_text("x")
        if n < 4:
            made._jobs[str(n)].useful, made._jobs[str(n)].ended = n != 2, "ended"
        made._bury(view(), time.monotonic())
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["tag-2.log", "tag-3.log", "tag-4.log"]
    made.close()
    assert [path.name for path in tmp_path.glob("*.log")] == ["tag-2.log"] and not list(tmp_path.glob("*.sh"))


def test_while_a_job_is_being_submitted_the_end_does_not_forget_it(managed, tmp_path):
    made = managed(cores=1)
    made._save()
    made._thread = types.SimpleNamespace(join=lambda timeout_s: None, is_alive=lambda: True)
    made.close()
    assert (tmp_path / "jobs.json").exists()


def test_a_job_knows_how_long_it_lasts():
    began = {"SEAMLESS_JOB_BEGAN": str(int(time.time()) - 100), "SEAMLESS_JOB_END": "160"}
    assert 55 < daskjob.left_s("END", began) <= 61 and daskjob.left_s("LIFETIME", began) == math.inf
    assert not daskjob.is_too_late(None, 10 ** 9), "outside of a job nothing ends"
    assert daskjob.refusal(10 ** 9) is None and daskjob.refusal(50, 52) is None and daskjob.refusal(None, 1) is None
    assert daskjob.refusal(51, 52) == "it may take 51 s, but the jobs of this queue end after 52 s: raise 'walltime', or lower the limit"


# --- stores -----------------------------------------------------------------------------------------------------

def test_a_node_that_sees_the_folder_of_buffers_reads_it_and_writes_to_the_service(tmp_path):
    folder, base = Folder(str(tmp_path)), MemoryBuffers()
    there = folder.put(b"there")
    both = LayeredBuffers(base, near=[Folder(str(tmp_path), writable=False)])
    written = both.put(b"written")
    assert both.get(there) == b"there" and both.path(there) and base.get(written) == b"written" and folder.get(written) is None
    assert both.get(written) == b"written" and both.length(written) == 7 and both.open(written).read() == b"written"
    assert both.has([there, written, "0" * 64]) == [True, True, False] and both.lengths([written, there]) == [7, 5]
    assert both.get_small([there, written], 100, 100) == {there: b"there", written: b"written"}


def test_a_folder_is_known_by_its_mark(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    word = mark(str(one))
    assert word and mark(str(one)) == word == read_mark(str(one)) and mark(str(other)) != word and read_mark(str(tmp_path)) is None
    assert os.listdir(one) == [".seamless-folder"]


def test_the_stores_of_a_cluster_are_served_on_tcp_with_its_own_secret(tmp_path):
    from seamless_lite.checksum import Checksum
    from seamless_lite.daskstores import NodeStores, on_node
    from seamless_lite.errors import SeamlessError
    from seamless_lite.stores import open_stores
    spec = {"buffers": {"directory": str(tmp_path / "buffers")}, "results": {"file": str(tmp_path / "seamless.db")}}
    stores = open_stores(spec)
    served = NodeStores(stores, str(tmp_path / "buffers"), "127.0.0.1", (45200, 45299))
    try:
        assert all(45200 <= int(served.spec[part]["address"].rpartition(":")[2]) <= 45299 for part in ("buffers", "results"))
        there = stores.buffers.put(b"there")
        for far in (on_node(served.spec), {**served.spec, "buffers": {"address": served.spec["buffers"]["address"], "auth": True}}):
            node = open_stores(far, served.secret)
            assert isinstance(node.buffers, LayeredBuffers) == ("near" in far["buffers"])
            result = node.buffers.put(repr(far).encode())
            name = Checksum.of(b"transformation " + result.encode())        # the first result of a transformation stays
            node.results.put(name, result)
            assert stores.buffers.get(result) == repr(far).encode() and stores.results.get(name) == result
            assert node.buffers.get(there) == b"there" and node.results.get(name) == result
            node.close()
        elsewhere = on_node({**served.spec, "buffers": {**served.spec["buffers"], "mark": "another"}})
        assert "near" not in elsewhere["buffers"]
        with pytest.raises(SeamlessError):
            open_stores(served.spec, b"x" * 32).results.get("a" * 64)
    finally:
        served.close()
        stores.close()
