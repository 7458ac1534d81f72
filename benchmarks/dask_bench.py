"""What the daskserver costs, beside plain ``distributed.LocalCluster`` and ``Client.submit`` in the same run.

Run by ``run.py``.  The plain program does what a user of Dask would write, and stores nothing.
"""
import statistics
import subprocess
import sys
import textwrap
import time

import distributed                      # so that run.py can say that it is missing

from run import SLEEPS, Lab, show

CLUSTER = """\
local:
  workers: {workers}
  frontends:
    - hostname: localhost
      hashserver: {{bufferdir: "{folder}/buffers"}}
      database: {{database_dir: "{folder}/results"}}
      daskserver: {{network_interface: 127.0.0.1, port_start: 60300, port_end: 60399}}
"""
PROJECT = "- project: bench\n- cluster: local\n- execution: remote\n- remote: daskserver\n"
PLAIN = """
    import sys, time
    def f(a):
        return a + 1
    def nap(i):
        import time
        time.sleep(0.05)
        return i
    if __name__ == "__main__":
        from distributed import Client, LocalCluster
        what, workers = sys.argv[1], int(sys.argv[2])
        with LocalCluster(n_workers=1, threads_per_worker=workers, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
            client.submit(f, -1).result()
            for turn in range(0 if what == "first" else 3):
                began = time.perf_counter()
                if what == "rate":
                    client.gather([client.submit(f, 10000 * turn + i) for i in range(1000)])
                elif what == "sleeps":
                    client.gather([client.submit(nap, 10000 * turn + i) for i in range(200)])
                print(time.perf_counter() - began)
"""
FIRST = """
    import seamless_lite.config
    from seamless_lite import direct
    seamless_lite.config.init()
    @direct
    def f(a):
        return a + 1
    f(1)
"""
RATE = """
    import time
    import seamless_lite.config
    from seamless_lite import delayed, direct, parallel
    seamless_lite.config.init()
    @delayed
    def g(a):
        return a + 1
    @direct
    def f(a):
        return a + 1
    list(parallel(g(-i) for i in range(1, 9)))
    for turn in range(3):
        began = time.perf_counter()
        done = [tf.value for tf in parallel(g(10000 * turn + i) for i in range(1000))]
        print(time.perf_counter() - began)
        assert done == [10000 * turn + i + 1 for i in range(1000)]
    trips = []
    for i in range(100):
        began = time.perf_counter(); f(100000 + i); trips.append(time.perf_counter() - began)
    print(sorted(trips)[50])
    if __name__ == "__main__":
        with seamless_lite.config.dask_client(set_as_default=False) as client:
            def h(a):
                return a + 1
            client.submit(h, -1).result()
            began = time.perf_counter()
            client.gather([client.submit(h, i) for i in range(1000)])
            print(time.perf_counter() - began)
"""


class DaskLab(Lab):
    """A ``Lab`` whose project uses the daskserver."""

    def __init__(self, workers=2):
        super().__init__()
        (self.folder / "home/.seamless/clusters.yaml").write_text(CLUSTER.format(folder=self.folder, workers=workers))
        (self.work / "seamless.yaml").write_text(PROJECT)


def numbers(lab, code, *args):
    """The numbers that a program prints."""
    path = lab.work / "program.py"
    path.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(path), *map(str, args)], cwd=lab.work, env=lab.env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return [float(word) for word in done.stdout.split()]


def bench_dask_first():
    ours, plain = [], []
    for _ in range(3):
        for times, code, args in ((ours, FIRST, ()), (plain, PLAIN, ("first", 2))):
            with DaskLab() as lab:
                began = time.perf_counter()
                numbers(lab, code, *args)
                times.append(time.perf_counter() - began)
    show("daskserver, from nothing to the first result", statistics.median(ours), "s", "<= 4",
         "plain LocalCluster, and its end: %.2f s" % statistics.median(plain))


def bench_dask_rate():
    with DaskLab() as lab:
        *turns, trip, same = numbers(lab, RATE)
    with DaskLab() as lab:
        plain = min(numbers(lab, PLAIN, "rate", 2))
    show("daskserver, 1,000 new trivial tasks through parallel", 1000 / min(turns), "/s", ">= 60 % of plain",
         "plain Client.submit: %.0f/s, so %.0f %%; on our own cluster, with TLS: %.0f/s" % (
             1000 / plain, 100 * plain / min(turns), 1000 / same))
    show("daskserver, round trip of a new trivial task", 1e3 * trip, "ms", "-")


def bench_dask_sleeps():
    with DaskLab(workers=4) as lab:
        value = numbers(lab, SLEEPS)[0]
    with DaskLab() as lab:
        plain = min(numbers(lab, PLAIN, "sleeps", 4))
    show("daskserver, 200 tasks of 50 ms on 4 workers, of ideal", 250 / value, "%", ">= 85", "plain Client.submit: %.0f %%" % (250 / plain))


BENCHES = [bench_dask_first, bench_dask_rate, bench_dask_sleeps]
