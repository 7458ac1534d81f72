"""What should stay fast, measured: medians, each with what it is compared with, in the same run.

    python benchmarks/run.py [NAME ...]        all, or those whose name contains one of the words

Everything happens in temporary folders with a home of their own.  The figures of a shared machine wander:
compare ratios, not seconds.
"""
import concurrent.futures
import contextlib
import importlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN = [sys.executable, str(ROOT / "bin" / "seamless-run")]
CLUSTERS = """\
local:
  workers: {workers}
  frontends:
    - hostname: localhost
      hashserver: {{bufferdir: "{folder}/buffers", network_interface: 127.0.0.1, port_start: 55000, port_end: 55099}}
      database: {{database_dir: "{folder}/results", network_interface: 127.0.0.1, port_start: 55100, port_end: 55199}}
      jobserver:
        network_interface: 127.0.0.1
        port_start: 55300
        port_end: 55399
"""


class Lab:
    """A working folder and a home in a temporary folder; services that were started in it end with it."""

    def __init__(self, cluster=False, workers=2):
        self._temporary = tempfile.TemporaryDirectory(prefix="seamless-bench-")
        self.folder = pathlib.Path(self._temporary.name)
        self.work = self.folder / "work"
        self.work.mkdir()
        (self.folder / "home/.seamless").mkdir(parents=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SEAMLESS_")}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)       # a user's Python keeps its compiled files
        self.env.update(HOME=str(self.folder / "home"), PYTHONPATH=str(ROOT))
        if cluster:
            (self.folder / "home/.seamless/clusters.yaml").write_text(
                CLUSTERS.format(folder=self.folder, workers=workers))
            (self.work / "seamless.yaml").write_text("- project: bench\n- execution: remote\n")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop_services()
        self._temporary.cleanup()

    def python(self, code, *args):
        """Run a script in the working folder; returns what it prints."""
        path = self.work / "script.py"
        path.write_text(textwrap.dedent(code))
        return subprocess.run([sys.executable, str(path), *map(str, args)], cwd=self.work, env=self.env,
                              stdout=subprocess.PIPE, check=True, timeout=600).stdout.decode()

    def run(self, *words):
        return subprocess.run([*RUN, *words], cwd=self.work, env=self.env, stdout=subprocess.PIPE, check=True, timeout=600)

    def records(self):
        code = "from seamless_lite import launch\nfor r in launch.services(): print(r['pid'])"
        return [int(pid) for pid in self.python(code).split()]

    def stop_services(self):
        self.python("from seamless_lite import launch\nfor r in launch.services(): launch.stop(r)")


def median_ms(action, count=15, warm=2):
    """Median milliseconds of ``action()``."""
    times = []
    for i in range(count + warm):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[warm:])


def show(name, value, unit, goal, against=""):
    print("%-58s %9.3g %-5s goal %-16s %s" % (name, value, unit, goal, against), flush=True)


def bench_startup():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    env.pop("PYTHONDONTWRITEBYTECODE", None)

    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], env=env, check=True)
    bare = median_ms(python("pass"))
    show("python3 -c pass", bare, "ms", "-")
    show("import seamless_lite, over that", median_ms(python("import seamless_lite")) - bare, "ms", "<= 50")
    show("from seamless_lite import direct, delayed, over that",
         median_ms(python("from seamless_lite import direct, delayed")) - bare, "ms", "<= 50")
    return bare


def bench_cached_run():
    bare = median_ms(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    command = ("paste a.txt b.txt | sort -k2 | uniq -c",)
    for name, cluster in (("embedded", False), ("seed's jobserver configuration", True)):
        with Lab(cluster) as lab:
            (lab.work / "a.txt").write_text("one\ntwo\n")
            (lab.work / "b.txt").write_text("x\ny\n")
            lab.run(*command)
            for state in ("services up", "services down") if cluster else ("",):
                if state == "services down":
                    lab.stop_services()
                value = median_ms(lambda: lab.run(*command))
                show("cached seamless-run, %s %s" % (name, state), value, "ms", "<= 100, <= 8x",
                     "%.1fx python3 -c pass (%.1f ms)" % (value / bare, bare))


def bench_first_result():
    times = []
    for _ in range(5):
        with Lab(cluster=True) as lab:
            (lab.work / "a.txt").write_text("one\n")
            began = time.perf_counter()
            lab.run("cat", "a.txt")
            times.append(time.perf_counter() - began)
    show("first result from nothing, three services", statistics.median(times), "s", "<= 1.5")


DIRECT = """
    import sys, time, statistics
    import seamless_lite.config
    from seamless_lite import direct
    if sys.argv[1] == "store":
        seamless_lite.config.init()
    @direct
    def f(a, b):
        return a + b
    f(0, 0)
    def median(action, n):
        times = []
        for i in range(n):
            t = time.perf_counter(); action(i); times.append(time.perf_counter() - t)
        return statistics.median(times) * 1e3
    print(median(lambda i: f(i, 1), 500), median(lambda i: f(0, 0), 2000))
"""


def bench_direct():
    for mode, goal in (("memory", "<= 0.5"), ("store", "<= 5")):
        with Lab() as lab:
            new, hit = map(float, lab.python(DIRECT, mode).split())
            show("direct, new call in process, %s" % mode, new, "ms", goal)
            show("direct, hit in memory (%s)" % mode, hit, "ms", "<= 0.15")


ROUNDTRIP = """
    import time, statistics
    import seamless_lite.config
    from seamless_lite import direct, delayed, parallel
    seamless_lite.config.init()
    @direct
    def f(a):
        return a + 1
    times = []
    for i in range(200):
        t = time.perf_counter(); f(i); times.append(time.perf_counter() - t)
    print(statistics.median(times) * 1e3)
    @delayed
    def g(a):
        return a + 2
    t = time.perf_counter()
    done = [tf.value for tf in parallel(g(i) for i in range(1000))]
    assert done == [i + 2 for i in range(1000)]
    print(1000 / (time.perf_counter() - t))
"""


def _pool_task(i):
    return i + 2


def bench_jobserver():
    with Lab(cluster=True) as lab:
        trip, rate = map(float, lab.python(ROUNDTRIP).split())
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        pool.submit(_pool_task, 0).result()
        plain = median_ms(lambda: pool.submit(_pool_task, 0).result(), 200)
        began = time.perf_counter()
        list(concurrent.futures.as_completed([pool.submit(_pool_task, i) for i in range(1000)]))
        plain_rate = 1000 / (time.perf_counter() - began)
    show("jobserver, round trip of a new trivial task", trip, "ms", "<= 6",
         "ProcessPoolExecutor, nothing stored: %.2f ms" % plain)
    show("jobserver, 1,000 new trivial tasks through parallel", rate, "/s", ">= 500",
         "ProcessPoolExecutor, nothing stored: %.0f/s" % plain_rate)


SLEEPS = """
    import time
    import seamless_lite.config
    from seamless_lite import delayed, parallel
    seamless_lite.config.init()
    @delayed
    def nap(i):
        import time
        time.sleep(0.05)
        return i
    for tf in parallel(nap(-i) for i in range(1, 9)): tf.value
    t = time.perf_counter()
    for tf in parallel(nap(i) for i in range(200)): tf.value
    print(time.perf_counter() - t)
"""


def bench_sleeps():
    with Lab(cluster=True, workers=4) as lab:
        value = float(lab.python(SLEEPS))
    with concurrent.futures.ProcessPoolExecutor(4) as pool:
        list(pool.map(time.sleep, [0.05] * 8))
        began = time.perf_counter()
        list(pool.map(time.sleep, [0.05] * 200))
        plain = time.perf_counter() - began
    show("200 tasks of 50 ms on 4 workers, share of ideal (2.5 s)", 250 / value, "%", ">= 90",
         "ProcessPoolExecutor: %.0f %%" % (250 / plain))


def status_kb(pid, field):
    """A line of /proc/PID/status or smaps_rollup, in kB."""
    for file in ("status", "smaps_rollup"):
        for line in pathlib.Path("/proc/%d/%s" % (pid, file)).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise KeyError(field)


def family(pids):
    """These processes and all their descendants."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):      # it ended while we looked
                stat = (entry / "stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = []
    while pids:
        pid = pids.pop()
        found.append(pid)
        pids.extend(parents.get(pid, ()))
    return found


def bench_memory():
    with Lab(cluster=True) as lab:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: lab.run("-c", "sleep 1; echo %d" % n), range(2)))
        pids = family(lab.records())
        for field, name in (("VmRSS", "RSS"), ("Pss", "PSS")):
            show("idle memory, three services and 2 workers, %s" % name,
                 sum(status_kb(pid, field) for pid in pids) / 1e3, "MB", "<= 100", "%d processes" % len(pids))


def bench_gigabyte():
    sys.path.insert(0, str(ROOT))
    from seamless_lite import hashserver
    from seamless_lite.checksum import Checksum
    with tempfile.TemporaryDirectory(prefix="seamless-bench-") as name:
        folder, big = pathlib.Path(name), pathlib.Path(name) / "big"
        (folder / "store").mkdir()
        with open(big, "wb") as file:
            for i in range(1024):
                file.write(os.urandom(1 << 20))
        checksum, socket = Checksum.of_file(big), str(folder / "s")
        server = subprocess.Popen([sys.executable, "-m", "seamless_lite.hashserver", str(folder / "store"), "--writable",
                                   "--socket", socket, "--auth", "none"], env=dict(os.environ, PYTHONPATH=str(ROOT)))
        try:
            while not os.path.exists(socket):
                time.sleep(0.01)
            client = hashserver.HashserverClient("unix://" + socket, None)
            began = time.perf_counter()
            client.put_file(str(big), checksum)
            put = time.perf_counter() - began
            began = time.perf_counter()
            with client.open(checksum) as stream:
                while stream.read(1 << 20):
                    pass
            get = time.perf_counter() - began
            peak = status_kb(server.pid, "VmHWM") / 1e3
        finally:
            server.terminate()
            server.wait(20)
        began = time.perf_counter()
        subprocess.run(["cp", str(big), str(folder / "copy")], check=True)
        subprocess.run(["sha256sum", str(folder / "copy")], check=True, stdout=subprocess.DEVNULL)
        plain = time.perf_counter() - began
    show("1 GB through the hashserver, peak memory of the server", peak, "MB", "< 64")
    show("1 GB put, then got", put, "s", "-", "got in %.2f s; cp and sha256sum: %.2f s" % (get, plain))


BENCHES = [bench_startup, bench_cached_run, bench_first_result, bench_direct, bench_jobserver, bench_sleeps,
           bench_memory, bench_gigabyte]


def more():
    """Those that need more than seamless_lite itself: root and sshd, pytest, dask."""
    found = []
    for name in ("dask_bench", "remote"):
        try:
            found += importlib.import_module(name).BENCHES
        except ImportError as exc:
            print("left out: %s.py, %s" % (name, exc))
    return found


def main():
    words = sys.argv[1:]
    print("Python %s, %d CPUs" % (sys.version.split()[0], os.cpu_count()))
    for bench in BENCHES + more():
        if not words or any(word in bench.__name__ for word in words):
            bench()


if __name__ == "__main__":
    main()
