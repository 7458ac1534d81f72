"""Bad things that happen to other hosts: each ends with the right result, or one clear sentence, and in time.

A cut is silent, as in real life: packets vanish.  Times are deadlines; nothing here asserts how fast something is.
"""
import hashlib
import os
import signal
import subprocess
import time

import pytest

import labs
from far import BACKENDS, BEGIN, CLUSTERS, DASKSERVER, JOBSERVER, clusters_on, kill, lines_of, nothing_left, pids, services
from far import wait_for_traffic

pytestmark = pytest.mark.ssh

MEGABYTES = 40
UPLOAD = BEGIN + """
@direct
def digest(data):
    import hashlib
    return hashlib.sha256(data).hexdigest()
digest.celltypes.data = "bytes"
if len(sys.argv) > 1:                       # connections are there already when the link becomes slow
    where(0)
    open("ready", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.02)
print(digest(b"0123456789abcdef" * (%d << 16)))
""" % MEGABYTES
UPLOADED = hashlib.sha256(b"0123456789abcdef" * (MEGABYTES << 16)).hexdigest() + "\n"

DOWNLOAD = BEGIN + """
import hashlib
@direct
def block(n):
    return b"fedcba9876543210" * (n << 16)
block.celltypes.result = "bytes"
data = block(%d)
print(hashlib.sha256(data).hexdigest())
""" % MEGABYTES
DOWNLOADED = hashlib.sha256(b"fedcba9876543210" * (MEGABYTES << 16)).hexdigest() + "\n"

JOB = BEGIN + """
@direct
def slow(seconds):
    import os, time
    with open(os.path.expanduser("~/mark"), "a") as file:
        file.write("%d\\n" % os.getpid())
    time.sleep(seconds)
    return os.uname().nodename
print(slow(float(sys.argv[1])))
"""


@pytest.fixture(params=["jobserver", "daskserver"])
def backend(request):
    """(lab, its configured user) for each backend."""
    lab = request.getfixturevalue("netns" if request.param == "jobserver" else "netns_dask")
    user = request.getfixturevalue("lab_user")(lab)
    user.configure(CLUSTERS, BACKENDS[request.param])
    return lab, user


@pytest.fixture
def user(netns, lab_user):
    user = lab_user(netns)
    user.configure(CLUSTERS, JOBSERVER)
    return user


def start_upload(lab, user):
    """An upload that is in its middle when this returns."""
    running = user.start_python(UPLOAD, "wait")
    running.until((user.work / "ready").exists, "its first result")
    lab("shape", "h1", "--rate", "60")
    (user.work / "go").touch()
    wait_for_traffic(running, lab, 8 << 20)
    return running


def start_download(lab, user):
    """The same for the way back."""
    user.python(BEGIN + "where(0)").ok()
    lab("shape", "h1", "--rate", "60")
    running = user.start_python(DOWNLOAD)
    wait_for_traffic(running, lab, 8 << 20, way="out")
    return running


def start_job(lab, user, seconds):
    """A job that has begun when this returns."""
    running = user.start_python(JOB, seconds)
    running.until(lambda: lines_of(lab, "mark"), "it began")
    return running


def reset(lab):
    """End the connections between the host and its clients, but not those within the host."""
    lab.run("h1", "ss", "-K", "dst", lab.info["client"], root=True)


def cut(lab, seconds):
    lab("cut", "h1")
    time.sleep(seconds)
    lab("restore")


def test_cut_off_for_5_seconds_in_the_middle_of_an_upload(netns, user):
    running = start_upload(netns, user)
    cut(netns, 5)
    assert running.finish(90).ok() == UPLOADED
    nothing_left(user, netns)


def test_cut_off_for_5_seconds_in_the_middle_of_a_download(netns, user):
    running = start_download(netns, user)
    cut(netns, 5)
    assert running.finish(90).ok() == DOWNLOADED
    nothing_left(user, netns)


def test_cut_off_for_5_seconds_in_the_middle_of_a_job_which_goes_on_meanwhile(backend):
    lab, user = backend
    running = start_job(lab, user, 4)
    cut(lab, 5)
    assert running.finish(90).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 1                 # it ran once
    nothing_left(user, lab)


@pytest.mark.slow
def test_cut_off_for_2_minutes_in_the_middle_of_an_upload_a_job_and_a_download(netns, lab_user):
    users = [lab_user(netns) for _ in range(3)]
    for user in users:
        user.configure(CLUSTERS, JOBSERVER)
    job = start_job(netns, users[0], 60)
    download = start_download(netns, users[1])
    upload = start_upload(netns, users[2])
    assert all(running.process.poll() is None for running in (job, download, upload))
    cut(netns, 120)
    assert job.finish(120).ok() == "h1\n"
    assert (download.finish(120).ok(), upload.finish(120).ok()) == (DOWNLOADED, UPLOADED)
    assert len(lines_of(netns, "mark")) == 1
    assert "h1" in job.stderr                                   # it said what it was waiting for
    nothing_left(users[0], netns)


def test_the_laptop_goes_to_sleep_and_comes_back(backend):
    lab, user = backend
    running = start_job(lab, user, 3)
    running.kill(signal.SIGSTOP)
    masters = [pid for pid in user.processes() if pid != running.process.pid]
    for pid in masters:
        os.kill(pid, signal.SIGSTOP)
    reset(lab)                                                  # the connection does not outlive the sleep
    time.sleep(5)
    for pid in masters:
        os.kill(pid, signal.SIGCONT)
    running.kill(signal.SIGCONT)
    assert running.finish(60).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 1


def test_a_program_that_is_killed_finds_its_job_under_way_when_it_is_started_again(backend):
    lab, user = backend
    start_job(lab, user, 6).kill()
    for pid in user.processes():
        os.kill(pid, signal.SIGKILL)                            # the ssh connection too
    assert user.python(JOB, 6).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 1


@pytest.mark.parametrize("how", ["every ssh killed", "connections reset"])
def test_the_ssh_connection_is_lost_while_a_job_runs(how, backend):
    lab, user = backend
    running = start_job(lab, user, 3)
    if how == "connections reset":
        reset(lab)
    else:
        for pid in user.processes():
            with open("/proc/%d/cmdline" % pid, "rb") as file:
                if file.read().split(b"\0")[0].rpartition(b"/")[2].startswith(b"ssh"):
                    os.kill(pid, signal.SIGKILL)
    assert running.finish(60).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 1


def test_all_connections_of_the_host_are_reset_also_those_within_it(backend):
    lab, user = backend
    running = start_job(lab, user, 3)
    lab("rst", "h1")
    assert running.finish(60).ok() == "h1\n"


def test_the_frontend_reboots_while_a_job_runs(backend):
    lab, user = backend
    running = start_job(lab, user, 5)
    assert services(user)
    lab("reboot", "h1")                                         # all processes gone, all files left
    assert running.finish(120).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 2                 # it was lost, and run again
    nothing_left(user, lab)


def test_the_frontend_was_rebooted_since_the_last_time(backend):
    lab, user = backend
    user.python(BEGIN + "where(1)").ok()
    lab("reboot", "h1")
    assert user.python(BEGIN + "print(where(1), where(2))").ok() == "['h1', 1] ['h1', 2]\n"


def test_the_frontend_loses_power_and_comes_back(netns, user):
    running = start_job(netns, user, 4)
    netns("poweroff", "h1")
    time.sleep(3)
    netns("boot", "h1")
    assert running.finish(120).ok() == "h1\n"


def test_the_frontend_hangs_for_a_while(netns, user):
    running = start_job(netns, user, 1)
    netns("freeze", "h1")
    time.sleep(10)
    netns("thaw", "h1")
    assert running.finish(90).ok() == "h1\n"


def test_the_server_that_runs_the_jobs_is_killed(backend, request):
    lab, user = backend
    running = start_job(lab, user, 3)
    kill(lab, pids(lab, "." + request.node.callspec.params["backend"]))
    assert running.finish(90).ok() == "h1\n"
    nothing_left(user, lab)


def test_the_hashserver_and_the_database_are_killed_while_a_job_runs(backend):
    lab, user = backend
    running = start_job(lab, user, 3)
    kill(lab, pids(lab, ".hashserver") + pids(lab, ".database"))
    assert running.finish(90).ok() == "h1\n"
    assert user.python(JOB, 3).ok() == "h1\n"
    assert len(lines_of(lab, "mark")) == 1                 # the result was kept


CHAIN = BEGIN + """
@direct
def slow(seconds):
    import os, time
    chain, pid = [], os.getpid()
    while pid > 1:
        with open("/proc/%d/cmdline" % pid) as file:
            chain.append("%d %s" % (pid, file.read().replace(chr(0), " ").replace(chr(10), " ")))
        with open("/proc/%d/stat" % pid) as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    with open(os.path.expanduser("~/mark.new"), "w") as file:
        file.write("\\n".join(chain))
    os.rename(os.path.expanduser("~/mark.new"), os.path.expanduser("~/mark"))
    time.sleep(seconds)
    return os.uname().nodename
print(slow(float(sys.argv[1])))
"""


def dask_user(lab, lab_user):
    user = lab_user(lab)
    user.configure(CLUSTERS, DASKSERVER)
    return user


@pytest.mark.parametrize("nth", [1, 2])
def test_a_dask_worker_or_its_nanny_is_killed_in_the_middle_of_a_task(nth, netns_dask, lab_user):
    user = dask_user(netns_dask, lab_user)
    running = user.start_python(CHAIN, 5)
    chain = running.until(lambda: lines_of(netns_dask, "mark"), "it began")
    (netns_dask.home("h1") / "mark").unlink()
    kill(netns_dask, [int(chain[nth].split()[0])])              # 0 is the process that runs the function
    assert running.finish(90).ok() == "h1\n", chain
    nothing_left(user, netns_dask)


def test_the_process_that_runs_a_task_is_killed_twice_which_is_a_sentence(netns_dask, lab_user):
    user = dask_user(netns_dask, lab_user)
    code = BEGIN + """
@direct
def deadly():
    import os, signal, sys
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
deadly()
"""
    done = user.python(code, timeout_s=90)
    assert done.returncode == 1
    assert "SIGKILL" in done.stderr and "last words" in done.stderr, done


def test_two_clients_start_the_same_cluster_at_once(backend, lab_user):
    lab, user = backend
    other = lab_user(lab)
    other.configure(CLUSTERS, (user.work / "seamless.yaml").read_text())
    running = [one.start_python(JOB, 2) for one in (user, other)]
    assert [one.finish(90).ok() for one in running] == ["h1\n", "h1\n"]
    assert len(lines_of(lab, "mark")) == 1                 # one server, and one job for both
    assert services(user) == services(other)
    nothing_left(other, lab)


def test_a_host_that_is_not_there_is_one_sentence_soon(netns, user):
    netns("cut", "h1", "--unreachable")
    done = user.run("seamless-run", "hostname", timeout_s=60)
    assert done.returncode == 1 and done.stdout == "" and "h1" in done.stderr and "Traceback" not in done.stderr, done
    assert len(done.stderr.splitlines()) <= 3, done


def test_nobody_may_log_in_is_one_sentence_soon(netns, user):
    user.configure(clusters_on("nobody@h1"), JOBSERVER)
    done = user.run("seamless-run", "hostname", timeout_s=60)
    assert done.returncode == 1 and "Permission denied" in done.stderr and "Traceback" not in done.stderr, done


def test_an_interrupt_while_the_host_is_cut_off_ends_at_once(netns, user):
    running = start_job(netns, user, 2)
    netns("cut", "h1")
    time.sleep(3)
    running.kill(signal.SIGINT)
    done = running.finish(20)
    assert done.returncode and done.stdout == ""


def small_files(folder):
    """10,000 files of 4 kB, all different."""
    folder.mkdir()
    block = os.urandom(4096)
    for n in range(10_000):
        (folder / ("file%05d" % n)).write_bytes(b"%d\n" % n + block)


def test_40_megabytes_of_small_files_go_over_a_link_of_50_ms(netns, user):
    small_files(user.work / "data")
    user.run("seamless-run", "hostname").ok()
    netns("shape", "h1", "--delay", "25")
    done = user.run("seamless-run", "-y", "-i", "data", "cat data/* | sha256sum", timeout_s=60)
    here = subprocess.run("cat data/* | sha256sum", shell=True, cwd=user.work, stdout=subprocess.PIPE, check=True).stdout
    assert done.ok().encode() == here


def test_40_megabytes_of_small_files_come_back_over_a_link_of_50_ms(netns, user):
    code = "for n in range(10000): open('back/file%05d' % n, 'w').write('%d\\n' % n * 800)"
    command = ("seamless-run", "-y", "-cp", "back", 'mkdir back && python3 -c "%s"' % code)
    user.run("seamless-run", "hostname").ok()
    netns("shape", "h1", "--delay", "25")
    user.run(*command, timeout_s=60).ok()
    assert len(os.listdir(user.work / "back")) == 10_000
    assert (user.work / "back/file01234").read_text() == "1234\n" * 800


# --- a clock that is an hour off

CLOCK = os.path.join(os.path.dirname(labs.__file__), "clock_off.c")


@pytest.mark.parametrize("tunnel", ["true", "false"])
def test_a_frontend_whose_clock_is_an_hour_off(tunnel, lab_user, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    folder.chmod(0o755)
    for parent in list(folder.parents)[:-2]:
        parent.chmod(0o755)
    done = labs.run(["cc", "-shared", "-fPIC", "-fno-builtin", "-nostdlib", "-o", str(folder / "clock.so"), CLOCK])
    assert done.returncode == 0, done
    lab = labs.make_lab(labs.Netns, hosts=1, bind="%s:/mnt:ro" % folder, env="LD_PRELOAD=/mnt/clock.so")
    try:
        user = lab_user(lab)
        text = clusters_on("h1", tunnel=tunnel)
        if tunnel == "false":
            for word in ("bufferdir: ~/storage/buffers", "database_dir: ~/storage/results"):
                text = text.replace(word, word + "\n        network_interface: 0.0.0.0\n"
                                                 "        port_start: 55000\n        port_end: 55099")
        user.configure(text.replace("127.0.0.1", "0.0.0.0"), JOBSERVER)
        now = float(user.run("ssh", "h1", "python3 -c 'import time; print(time.time())'").ok())
        assert 3590 < now - time.time() < 3610
        code = BEGIN + "print(where(1)); where(2)\nimport time\ntime.sleep(2)\nprint(where(3))\n"
        assert user.python(code).ok() == "['h1', 1]\n['h1', 3]\n"
        assert user.run("seamless-run", "hostname").ok() == "h1\n"
        assert user.run("seamless-run", "hostname").ok() == "h1\n"
        nothing_left(user, lab)
    finally:
        lab.stop()
