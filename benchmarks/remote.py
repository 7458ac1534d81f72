"""What a host behind ssh costs: measured on a lab of network namespaces (root, openssh-server, iproute2, pytest).

Run by ``run.py``.  Each figure stands beside what plain ssh takes for something comparable on the same link, in the
same run.  The programs measure themselves where the hosts can be reached, so that entering the lab does not count.
"""
import contextlib
import pathlib
import shutil
import statistics
import sys
import tempfile

from run import ROOT, show

sys.path.insert(0, str(ROOT / "tests"))
import labs                     # noqa: E402 (the folder is on the path only now)
import far                      # noqa: E402

TIMED = """
import subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began)
"""
SEAMLESS_RUN = (sys.executable, ROOT / "bin/seamless-run")


@contextlib.contextmanager
def lab(**options):
    """Hosts, and a function that makes users of them."""
    try:
        hosts = labs.Netns(hosts=1, **options)
    except labs.LabError as exc:
        print("left out: %s" % str(exc).strip())
        return
    users = []

    def user(configuration=far.JOBSERVER):
        users.append(labs.LabUser(hosts, tempfile.mkdtemp(prefix="lab-")))
        users[-1].configure(far.CLUSTERS, configuration)
        return users[-1]
    try:
        yield hosts, user
    finally:
        for one in users:
            one.end()
            shutil.rmtree(one.home.parent)
        hosts.stop()


def seconds(user, *argv, count=1):
    """Median seconds of a command at the place from where the hosts can be reached."""
    return statistics.median(float(user.python(TIMED, *argv).ok()) for _ in range(count))


def bench_remote_first():
    """A host on which nothing is installed, each time."""
    with lab() as (hosts, new_user):
        plain = seconds(new_user(), "ssh", "h1", "python3 -c 'print(1)'", count=5)
        times, counts = [], []
        for _ in range(5):
            hosts.tidy()
            before = far.received(hosts)
            times.append(seconds(new_user(), *SEAMLESS_RUN, "hostname"))
            counts.append(far.received(hosts) - before)
    show("ssh: first result on a fresh host, from nothing", statistics.median(times), "s", "<= 3",
         "ssh h1 python3 -c ...: %.2f s" % plain)
    show("ssh: bytes to a fresh host, packet headers included", max(counts) / 1e3, "kB", "<= 400")


CONNECT = """
import time
began = time.perf_counter()
import seamless_lite.config
seamless_lite.config.init()
connected = time.perf_counter() - began
from seamless_lite import direct
@direct
def f(x):
    return x
f(int(time.time() * 1e6))
print(connected, time.perf_counter() - began)
"""


def bench_remote_second():
    """A host whose services run."""
    with lab() as (hosts, new_user):
        user = new_user()
        user.python(CONNECT).ok()
        found = [tuple(map(float, user.python(CONNECT).ok().split())) for _ in range(9)]
        connect, result = (statistics.median(column) for column in zip(*found))
        plain = seconds(user, "ssh", "h1", "python3 -c 'print(1)'", count=5)
        options = ("-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", "ControlPath=%s/master" % user.home)
        seconds(user, "ssh", *options, "h1", "true")
        shared = seconds(user, "ssh", *options, "h1", "python3 -c 'print(1)'", count=5)
        cached = seconds(user, *SEAMLESS_RUN, "hostname", count=1) and seconds(user, *SEAMLESS_RUN, "hostname", count=5)
    against = "ssh h1 python3 -c ...: %.2f s, on a shared connection %.3f s" % (plain, shared)
    show("ssh: second connection to a running host", connect, "s", "<= 0.3", against)
    show("ssh: the same, and the result of a new job", result, "s", "-")
    show("ssh: cached seamless-run, results on the host", cached, "s", "-")


THOUSAND = """
import sys, time
import seamless_lite.config
from seamless_lite import delayed, parallel
seamless_lite.config.init()
@delayed
def f(i):
    return i + 1
tasks = [f(i) for i in range(1000)]
began = time.perf_counter()
assert [tf.value for tf in parallel(tasks)] == list(range(1, 1001))
print(time.perf_counter() - began)
"""


def bench_remote_cached():
    """A link with a round trip of 50 ms."""
    with lab() as (hosts, new_user):
        user = new_user()
        user.python(THOUSAND, timeout_s=120).ok()
        hosts("shape", "h1", "--delay", "25")
        value = statistics.median(float(user.python(THOUSAND, timeout_s=120).ok()) for _ in range(3))
        options = ("-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", "ControlPath=%s/master" % user.home)
        seconds(user, "ssh", *options, "h1", "true")
        plain = seconds(user, "ssh", *options, "h1", "true", count=5)
    show("ssh: 1,000 cached results over a 50 ms link", value, "s", "<= 2",
         "ssh h1 true on a shared connection: %.2f s each" % plain)


def bench_remote_small_files():
    """A folder of 10,000 files, 40 MB, as the input of a command, over the same link."""
    with lab() as (hosts, new_user):
        user = new_user()
        seconds(user, *SEAMLESS_RUN, "hostname")
        folder = pathlib.Path(user.work) / "data"
        folder.mkdir()
        for n in range(10_000):
            (folder / str(n)).write_bytes(b"%09d\n" % n * 400)
        hosts("shape", "h1", "--delay", "25")
        value = seconds(user, *SEAMLESS_RUN, "-y", "find data -type f | wc -l")
        plain = seconds(user, "sh", "-c", "tar cf - data | ssh h1 'tar xf - && find data -type f | wc -l'")
    show("ssh: 10,000 files, 40 MB, as an input over a 50 ms link", value, "s", "-", "tar over ssh: %.1f s" % plain)


BENCHES = [bench_remote_first, bench_remote_second, bench_remote_cached, bench_remote_small_files]
