"""The user's document on one machine: real services, real processes, real files."""
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from seamless_lite import launch, services

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLUSTERS = """\
local:
  workers: {workers}
  frontends:
    - hostname: localhost
      hashserver:
        bufferdir: {folder}/buffers
      database:
        database_dir: {folder}/results
      jobserver:
        network_interface: 127.0.0.1
        port_start: 56300
        port_end: 56399
"""


class Lab:
    """A working folder, a home, and a cluster with a jobserver; programs are run in them as a user would."""

    def __init__(self, home, tmp_path):
        self.home, self.work = home, tmp_path / "work"
        self.work.mkdir()
        self.env = dict(os.environ, PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))

    def configure(self, commands, workers=2):
        (self.home / ".seamless").mkdir(exist_ok=True)
        (self.home / ".seamless/clusters.yaml").write_text(CLUSTERS.format(folder=self.home, workers=workers))
        (self.work / "seamless.yaml").write_text(textwrap.dedent(commands))

    def start(self, *command):
        return subprocess.Popen([sys.executable, *command], cwd=self.work, env=self.env, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def python(self, code, check=True, name="script.py", timeout=90):
        (self.work / name).write_text(textwrap.dedent(code))
        done = self.start(name)
        out, err = done.communicate(timeout=timeout)
        if check:
            assert done.returncode == 0, err.decode()
        return out.decode().strip() if check else (done.returncode, out.decode(), err.decode())

    def run(self, *words, check=True):
        done = self.start(str(ROOT / "bin/seamless-run"), *words)
        out, err = done.communicate(timeout=90)
        if check:
            assert done.returncode == 0, err.decode()
        return out if check else (done.returncode, out, err.decode())

    def records(self):
        text = self.python("from seamless_lite import launch\n"
                           "for r in launch.services(): print(r['service'], r['pid'])", name="list.py")
        return [(service, int(pid)) for service, pid in (line.split() for line in text.splitlines())]

    def kill_services(self):
        records = self.records()
        for _, pid in records:
            os.kill(pid, signal.SIGKILL)
        return records


@pytest.fixture
def lab(home, tmp_path):
    lab = Lab(home, tmp_path)
    yield lab
    for _, pid in lab.records():
        os.kill(pid, signal.SIGTERM)


REMOTE = "- project: my-project\n- execution: remote\n"
COUNT = """\
    import seamless_lite.config
    from seamless_lite import direct
    seamless_lite.config.init()
    @direct
    def count(data):
        import os
        return [len(data.splitlines()), os.getpid()]
    count.celltypes.data = "bytes"
    with open("numbers.txt", "rb") as file:
        print(count(file.read()), os.getpid() if "os" in globals() else "")
    """


def test_a_function_and_a_pipeline_run_on_the_jobserver_and_are_cached_with_all_services_dead(lab):
    lab.configure(REMOTE)
    (lab.work / "numbers.txt").write_text("1\n" * 200_000)
    (lab.work / "a.txt").write_text("one\ntwo\n")
    (lab.work / "b.txt").write_text("x\ny\n")
    first = lab.python(COUNT)
    assert first.startswith("[200000, ")
    assert sorted(service for service, _ in lab.records()) == ["database", "hashserver", "jobserver"]
    pipeline = lab.run("paste a.txt b.txt | sort -k2 | uniq -c")
    assert pipeline == subprocess.run(["bash", "-c", "paste a.txt b.txt | sort -k2 | uniq -c"], cwd=lab.work,
                                      stdout=subprocess.PIPE, check=True).stdout
    lab.kill_services()
    assert lab.run("paste a.txt b.txt | sort -k2 | uniq -c") == pipeline
    assert lab.records() == [], "a hit starts nothing"
    assert lab.python(COUNT) == first, "the process number is that of the first run"


def test_two_clients_that_start_at_once_end_up_with_one_set_of_services(lab):
    lab.configure(REMOTE)
    clients = [lab.start(str(ROOT / "bin/seamless-run"), "-c", "echo %d" % i) for i in range(4)]
    assert [client.communicate(timeout=60)[0] for client in clients] == [b"%d\n" % i for i in range(4)]
    assert sorted(service for service, _ in lab.records()) == ["database", "hashserver", "jobserver"]


def test_a_service_that_was_killed_is_started_again_by_the_client_that_needs_it(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import os, signal
        import seamless_lite.config
        from seamless_lite import direct, delayed, launch, parallel
        seamless_lite.config.init()
        @direct
        def f(x):
            return x + 1
        print(f(1))
        for record in launch.services():
            os.kill(record["pid"], signal.SIGKILL)
        print(f(2))
        for record in launch.services():
            os.kill(record["pid"], signal.SIGKILL)
        g = delayed(f)
        print([tf.value for tf in parallel(g(i) for i in range(10, 13))])
        """)
    assert out == "2\n3\n[11, 12, 13]"


@pytest.mark.slow
def test_switching_stages_back_and_forth_starts_nothing_twice_and_stops_nothing(lab):
    lab.configure("""\
        - project: my-project
        - execution: process
        - stage heavy:
            - cluster: local
            - execution: remote
        """)
    out = lab.python("""
        import os
        import seamless_lite.config as config
        from seamless_lite import direct, launch
        @direct
        def where(x):
            import os
            return os.getpid()
        def servers():
            return sorted((r["service"], r["pid"]) for r in launch.services())
        config.init()
        print(where(1) == os.getpid())
        config.set_stage("heavy")
        first = servers()
        print(where(1) == os.getpid(), [name for name, _ in first])
        config.set_stage(None)
        print(where(2) == os.getpid())
        config.set_stage("heavy")
        where(3)
        print(servers() == first)
        try:
            config.set_stage("haevy")
        except config.ConfigurationError as exc:
            print("heavy" in str(exc), where(4) == os.getpid())
        """)
    assert out.splitlines() == ["True", "False ['database', 'database', 'hashserver', 'hashserver', 'jobserver']", "True",
                                "True", "True False"]
    assert lab.run("--stage", "heavy", "-c", "echo hi") == b"hi\n"


def test_local_runs_in_the_calling_process_whatever_the_configuration_says(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import os
        import seamless_lite.config
        from seamless_lite import delayed
        seamless_lite.config.init()
        @delayed
        def pid(x):
            import os
            return os.getpid()
        pid.local = True
        print(pid(1).run() == os.getpid())
        pid.local = False
        print(pid(2).run() == os.getpid())
        """)
    assert out == "True\nFalse"
    (lab.work / "a.txt").write_text("x\n")
    lab.kill_services()
    assert lab.run("--local", "cat", "a.txt") == b"x\n" and lab.records() == []


DRIVER = """\
    import seamless_lite.config
    from seamless_lite import delayed, direct, parallel
    {setup}
    @delayed
    def child(x):
        return x * 2
    @direct
    def driver(n):
        from seamless_lite import parallel
        return sum(tf.value for tf in parallel(child(i) for i in range(n)))
    driver.globals.child = child
    print(driver(100))
    @direct
    def deep(n):
        return 0 if n == 0 else 1 + next(n - 1)
    @direct
    def next(n):
        return deeper(n)
    @direct
    def deeper(n):
        return n + 100
    deep.globals.next = next
    deep.globals.deeper = deeper
    next.globals.deeper = deeper
    print(deep(7))
    """


@pytest.mark.parametrize("setup", ["seamless_lite.config.init()", "seamless_lite.spawn(1)",
                                   "seamless_lite.spawn(1); seamless_lite.config.init()", ""])
@pytest.mark.slow
def test_a_driver_with_100_children_works_with_one_worker_on_every_backend(lab, setup):
    lab.configure(REMOTE, workers=1)
    out = lab.python(DRIVER.format(setup=setup), check=False)
    assert out[0] == 0, out[2]
    assert out[1].split()[0] == str(sum(range(100)) * 2)


def test_cancel_kills_the_process(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import os, time
        import seamless_lite.config
        from seamless_lite import delayed
        seamless_lite.config.init()
        @delayed
        def sleep(path):
            import os, time
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
            return 1
        tf = sleep(os.path.abspath("pid")).start()
        while not (os.path.exists("pid") and open("pid").read()):
            time.sleep(0.01)
        pid = int(open("pid").read())
        print(tf.status, tf.cancel(), tf.status)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                print("gone")
                break
            time.sleep(0.02)
        """)
    assert out == "Status: pending True Status: canceled\ngone"


def test_a_failure_on_the_jobserver_shows_the_users_own_lines_and_output_and_is_not_cached(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import seamless_lite.config
        from seamless_lite import delayed
        seamless_lite.config.init()
        @delayed
        def bad(x):
            print("about to fail")
            return x / 0
        tf = bad(1)
        print(tf.compute(), tf.status)
        print(tf.exception)
        """)
    assert "None Status: exception" in out and "return x / 0" in out and "ZeroDivisionError" in out
    assert "about to fail" in out
    code, _, err = lab.run("-c", "echo out; echo err >&2; exit 7", check=False)
    assert code == 7 and "err" in err
    code, _, err = lab.run("-c", "echo out; echo err >&2; exit 7", check=False)
    assert code == 7 and "err" in err, "it ran again"


@pytest.mark.slow
def test_ctrl_c_leaves_no_job_behind(lab):
    lab.configure(REMOTE)
    client = lab.start(str(ROOT / "bin/seamless-run"), "-c", "echo $$ > %s/pid; sleep 60" % lab.home)
    end = time.monotonic() + 30
    while not ((lab.home / "pid").exists() and (lab.home / "pid").read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    pid = int((lab.home / "pid").read_text())
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=30)
    assert client.returncode == 130 and b"Canceled transformation" in err
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_scratch_results_are_known_but_not_kept(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import seamless_lite.config as config
        from seamless_lite import delayed
        config.init()
        @delayed
        def big(n):
            return "x" * n
        @delayed
        def size(text):
            return len(text)
        big.scratch = True
        tf = big(100_000)
        print(size(tf).run(), tf.result_checksum in [None], config.session().store.has([tf.result_checksum]))
        """)
    assert out.split()[:2] == ["100000", "False"]


def test_a_worker_process_that_is_killed_costs_a_retry_and_a_killer_is_named(lab):
    lab.configure(REMOTE, workers=1)
    out = lab.python("""
        import seamless_lite.config
        from seamless_lite import delayed
        seamless_lite.config.init()
        @delayed
        def once(path):
            import os
            if not os.path.exists(path):
                open(path, "w").close()
                os.kill(os.getpid(), 9)
            return "second life"
        @delayed
        def always(x):
            import os
            print("last words", flush=True)
            os.kill(os.getpid(), 9)
        import os
        print(once(os.path.abspath("mark")).run())
        tf = always(1)
        tf.compute()
        print(type(tf.exception).__name__, tf.exception)
        """)
    assert out.startswith("second life\nWorkerDiedError") and "9" in out and "last words" in out


def test_a_notebook_like_kernel_runs_functions_that_were_typed_into_it(lab):
    pytest.importorskip("IPython", reason="IPython is not installed")
    lab.configure(REMOTE)
    out = lab.python("""
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        def cell(code):
            result = shell.run_cell(code, store_history=True)
            result.raise_error()
        cell("from seamless_lite import direct, delayed, parallel\\nimport seamless_lite.config\\nseamless_lite.config.init()")
        cell("@direct\\ndef f(x):\\n    return x + 1")
        cell("print(f(1))")
        cell("tf = delayed(f)(5)\\nprint(await tf)")
        """)
    assert out == "2\n6"


@pytest.mark.slow
def test_a_hundred_thousand_queued_jobs_are_fine(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import time
        import seamless_lite.config as config
        from seamless_lite import delayed, launch
        config.init()
        @delayed
        def nap(x):
            import time
            time.sleep(0.02)
            return x
        server = [r["pid"] for r in launch.services() if r["service"] == "jobserver"][0]
        def megabytes():
            with open("/proc/%d/status" % server) as file:
                return int([line.split()[1] for line in file if line.startswith("VmRSS")][0]) // 1000
        before = megabytes()
        tfs = [nap(i).start() for i in range(100_000)]
        print(tfs[0].run(), tfs[-1].transformation_checksum is not None, sum(tf.run() for tf in tfs[:500]))
        client = config.session()._remote._get()
        last = str(tfs[-1].transformation_checksum)
        while client.status([last])[last]["state"] == "unknown":       # until it has been sent
            time.sleep(0.5)
        print(client._http.request("GET", "/info").json()["jobs"] > 50_000, megabytes() - before < 500)
        """, timeout=400)
    assert out.splitlines() == ["0 True %d" % sum(range(500)), "True True"]


def test_a_scratch_result_is_made_again_where_its_bytes_are_needed_and_only_there(lab):
    lab.configure(REMOTE)
    code = """
        import os
        import seamless_lite.config as config
        from seamless_lite import delayed
        config.init()
        @delayed
        def big(n, path):
            with open(path, "a") as file:
                file.write("b")
            return "x" * n
        @delayed
        def bigger(text, path):
            with open(path, "a") as file:
                file.write("c")
            return text + text
        @delayed
        def size(text, more):
            return len(text) + more
        big.scratch = bigger.scratch = True
        log = os.path.abspath("log")
        def chain():
            return bigger(big(1000, log), log)
        def done():
            text = open(log).read()
            os.unlink(log)
            return text
        """
    first = lab.python(code + """
        print(size(chain(), 1).run(), done())
        """)
    assert first == "2001 bc"

    def lose_buffers():         # what was an input of a job has been kept as such
        for path in (lab.home / "buffers").rglob("??/*"):
            if path.is_file() and path.read_bytes().startswith(b'"xxx'):
                path.unlink()
    lose_buffers()
    again = lab.python(code + """
        tf = size(chain(), 1)
        print(tf.run(), os.path.exists(log))
        print(size(chain(), 2).run(), done())
        print(chain().compute() is not None, os.path.exists(log))
        """)
    assert again.splitlines() == ["2001 False", "2002 bc", "True False"]
    lose_buffers()
    value = lab.python(code + """
        print(len(chain().run()), done())
        """)
    assert value == "2000 bc"


def test_a_damaged_or_deleted_result_is_computed_again(lab):
    lab.configure(REMOTE)
    code = """
        import sys
        import seamless_lite.config
        from seamless_lite import direct
        seamless_lite.config.init()
        @direct
        def repeat(n):
            return "ab" * n
        print(len(repeat(3)), len(repeat(300_000)))
        """
    assert lab.python(code) == "6 600000"
    store = lab.home / "buffers"
    for damage in ("truncate", "delete"):
        for path in store.rglob("??/*"):
            if path.is_file() and path.read_bytes().startswith(b'"ababab'):
                path.chmod(0o600)
                path.write_bytes(b'"aba') if damage == "truncate" else path.unlink()
        assert lab.python(code) == "6 600000"


def test_cancel_reaches_a_job_that_another_thread_or_an_event_loop_waits_for(lab):
    lab.configure(REMOTE)
    out = lab.python("""
        import asyncio, os, threading, time
        import seamless_lite.config
        from seamless_lite import delayed
        from seamless_lite.errors import SeamlessError
        seamless_lite.config.init()
        @delayed
        def sleep(path):
            import os, time
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
        def pid_in(path):
            while not (os.path.exists(path) and open(path).read()):
                time.sleep(0.01)
            return int(open(path).read())
        def gone(pid):
            end = time.monotonic() + 20
            while time.monotonic() < end:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    return True
                time.sleep(0.02)
            return False
        def run(tf):
            try:
                tf.run()
            except SeamlessError as exc:
                print(type(exc).__name__)
        tf = sleep(os.path.abspath("one"))
        thread = threading.Thread(target=run, args=[tf])
        thread.start()
        pid = pid_in("one")
        tf.cancel()
        thread.join(20)
        print(gone(pid))
        async def main():
            task = sleep(os.path.abspath("two")).task()
            await asyncio.get_running_loop().run_in_executor(None, pid_in, "two")
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                print("cancelled")
        asyncio.run(main())
        print(gone(pid_in("two")))
        """)
    assert out.splitlines() == ["JobCancelledError", "True", "cancelled", "True"]


def test_workers_without_any_store_share_a_folder_that_goes_with_the_program(lab):
    (lab.work / "seamless.yaml").write_text("- persistent: false\n- execution: spawn\n")
    out = lab.python("""
        import os
        import seamless_lite.config as config
        from seamless_lite import direct
        config.init()
        @direct
        def pid(x):
            import os
            return os.getpid()
        print(pid(1) != os.getpid(), config.session().stores_spec["buffers"]["directory"])
        """)
    worked, folder = out.split()
    assert worked == "True" and not os.path.exists(folder)


def test_storage_that_is_made_for_a_cluster_is_private(lab):
    lab.configure(REMOTE)
    assert lab.run("-c", "echo hi") == b"hi\n"
    for name in ("buffers", "results"):
        assert (lab.home / name).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_one_sentence_with_file_and_line(lab):
    lab.configure(REMOTE)
    clusters = lab.home / ".seamless/clusters.yaml"
    text = clusters.read_text()
    clusters.write_text(text.replace("%s/buffers" % lab.home, "/dev/null/buffers"))
    code, out, err = lab.python("import seamless_lite.config\nseamless_lite.config.init()", check=False)
    assert code == 1 and "ConfigurationError" in err and "/dev/null/buffers" in err and "clusters.yaml:" in err


@pytest.mark.parametrize("interface, auth, exposed", [
    ("0.0.0.0", False, True), ("10.99.0.1", False, True), ("127.0.0.1", False, False), (None, False, False),
    ("localhost", False, False), ("0.0.0.0", True, False)])
def test_a_service_is_exposed_if_other_machines_reach_it_without_a_signature(interface, auth, exposed):
    spec = launch.ServiceSpec("jobserver", "key", network_interface=interface, port_range=(1, 2), auth=auth)
    assert services.is_exposed(spec) == exposed
