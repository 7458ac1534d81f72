"""Real hosts for the tests: fixtures around the scripts in ``hosts/`` (see their ``--help``).

    ssh_host    factory: one host behind sshd on this machine's loopback, with options for awkward ones
    netns       two bare hosts h1, h2 (python3 and sshd, nothing else) with addresses of their own, and faults
    netns_dask  the same with the Python of these tests (and so its dask) first on the hosts' PATH
    slurm       a SLURM with a login host ``ctl`` and two nodes, the user's files shared by all
    lab_user    factory: a user of a lab, with an empty home: runs scripts and commands where the hosts can be reached

The checkout is hidden on ssh_host, netns and netns_dask, so that only what was shipped can run there.  Labs last for
the whole session and are put in order after each test: faults undone, processes ended, homes emptied.
Without root or the tools a test is skipped, with the reason; with the variable CI it fails.
"""
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

HOSTS = pathlib.Path(__file__).resolve().parent / "hosts"
ROOT = HOSTS.parent.parent
_numbers = itertools.count()


@contextlib.contextmanager
def servers(folder):
    """A hashserver and a database over ``folder`` in this process, as ``SEAMLESS_REMOTE_CLIENTS`` names them."""
    from seamless_lite import database, hashserver, httpbase
    from seamless_lite.folder import Folder
    from seamless_lite.resulttable import ResultTable
    with contextlib.ExitStack() as stack:
        clients = {}
        for kind, service in (("buffer", hashserver.HashService(Folder(str(folder)))),
                              ("database", database.DatabaseService(ResultTable(str(folder / "seamless.db"))))):
            running = httpbase.start(service, httpbase.Listen(host="127.0.0.1"))
            stack.callback(running.stop)
            clients[kind] = [{"readonly": False, "remote_url": running.address}]
        yield json.dumps(clients)


class LabError(Exception):
    """A script of the labs failed; the text is what it said."""


class Finished:
    """A command that ended: ``returncode``, and ``stdout`` and ``stderr`` as text."""

    def __init__(self, argv, returncode, stdout, stderr):
        self.argv, self.returncode, self.stdout, self.stderr = argv, returncode, stdout, stderr

    def __repr__(self):
        return "%s\nexit code %s\nstdout:\n%s\nstderr:\n%s" % (self.argv, self.returncode, self.stdout, self.stderr)

    def ok(self):
        """Its stdout, if it ended with exit code 0."""
        assert self.returncode == 0, self
        return self.stdout


class Running:
    """A command under way in a process group of its own; its output goes to files, so that it never waits for us."""

    def __init__(self, argv, folder, **kwargs):
        self.argv = [str(word) for word in argv]
        base = pathlib.Path(folder) / ("out%d" % next(_numbers))
        self._files = [base.with_suffix(".stdout"), base.with_suffix(".stderr")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(self.argv, stdout=out, stderr=err, stdin=kwargs.pop("stdin", subprocess.DEVNULL),
                                            start_new_session=True, **kwargs)

    @property
    def stdout(self):
        return self._files[0].read_text("utf-8", "replace")

    @property
    def stderr(self):
        return self._files[1].read_text("utf-8", "replace")

    def until(self, condition, what, timeout_s=60):
        """``wait_until``, which fails at once when the command ends before."""
        def look():
            value = condition()
            if not value and self.process.poll() is not None:
                pytest.fail("ended before %s: %r" % (what, self.finish()))
            return value
        return wait_until(look, what, timeout_s)

    def finish(self, timeout_s=60):
        """Wait until it has ended; a test fails that has to wait longer than ``timeout_s``."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail("still running after %s s: %r" % (timeout_s, Finished(self.argv, None, self.stdout, self.stderr)))
        return Finished(self.argv, self.process.returncode, self.stdout, self.stderr)

    def kill(self, number=signal.SIGKILL):
        """A signal to the command and all it started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run(argv, timeout_s=60, **kwargs):
    """Run a command to its end, with a deadline that ends its whole process group."""
    with tempfile.TemporaryDirectory(prefix="seamless-lab-") as folder:
        return Running(argv, folder, **kwargs).finish(timeout_s)


def wait_until(condition, what, timeout_s=30):
    """Ask ``condition`` until it gives something true, which is returned; fail after ``timeout_s`` and say ``what``."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail("not within %s s: %s" % (timeout_s, what() if callable(what) else what))
        time.sleep(0.05)


def _options(options):
    """{"noise": True, "sshd_option": ["a", "b"]} -> --noise --sshd-option a --sshd-option b"""
    words = []
    for key, value in options.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and item is not False:
                words += ["--" + key.replace("_", "-")] + ([] if item is True else [str(item)])
    return words


def _name(letter):
    """A lab's name, new on this machine, of seven characters."""
    number = next(_numbers) % 676
    return "%s%04d%c%c" % (letter, os.getpid() % 10 ** 4, 97 + number // 26, 97 + number % 26)


def _empty(home):
    for path in home.iterdir():
        if path.name != ".ssh":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Lab:
    """What the labs have in common.  ``info`` is what the script says; ``bin`` holds an ``ssh`` that knows the hosts."""

    def __init__(self, *command):
        self.command = [str(word) for word in command]
        self.info = {}

    def __call__(self, *argv, timeout_s=60):
        """Run the lab's script; returns its stdout, raises ``LabError``."""
        done = run([sys.executable, *self.command, *argv], timeout_s,
                   env=dict(os.environ, HOME="/"))
        if done.returncode:
            raise LabError(done.stderr)
        return done.stdout

    @property
    def bin(self):
        return self.info["bin"]

    @property
    def client(self):
        """The words before a command that make it run where the hosts can be reached."""
        return []


class SshHost(Lab):
    """One host; ``name`` is the one for ssh, ``home`` its account's home folder as it is seen from here."""

    def __init__(self, **options):
        self.name = _name("s")
        super().__init__(HOSTS / "ssh-host")
        options.setdefault("hide", str(ROOT))
        self.info = json.loads(self("start", "--name", self.name, *_options(options)))

    def __call__(self, verb, *argv, **kwargs):
        return super().__call__(verb, *(() if verb == "start" else ("--name", self.name)), *argv, **kwargs)

    @property
    def home(self):
        return pathlib.Path(self.info["home"] if self.info["user"] == "root" else self.info["dir"] + "/h/home")

    def run(self, *argv, root=False, timeout_s=60):
        """A command on the host, without ssh; returns its stdout."""
        return self("exec", *(["--root"] if root else []), "--", *argv, timeout_s=timeout_s)

    def log(self):
        """What sshd wrote so far."""
        return pathlib.Path(self.info["log"]).read_text("utf-8", "replace")

    def logins(self):
        """How often somebody authenticated (start-up does so too: compare two values)."""
        return self.log().count("Accepted publickey for")

    def stop(self):
        self("stop")


class Netns(Lab):
    """Hosts h1..hN; call it for faults: ``netns("cut", "h1")``."""

    def __init__(self, **options):
        self.name = _name("t")
        super().__init__(HOSTS / "netns-lab", "--lab", self.name)
        options.setdefault("hide", str(ROOT))
        options.setdefault("hosts", 2)
        self.info = json.loads(self("up", *_options(options)))

    @property
    def client(self):
        return [sys.executable, *self.command, "exec", "client", "--"]

    def run(self, host, *argv, root=False, timeout_s=60):
        """A command on a host, without ssh; returns its stdout."""
        return self("exec", *(["--root"] if root else []), host, "--", *argv, timeout_s=timeout_s)

    def home(self, host):
        """The account's home folder on a host, as it is seen from here."""
        return pathlib.Path(self.info["hosts"][host]["dir"]) / "home"

    def log(self, host):
        """What the host's sshd wrote so far."""
        return (pathlib.Path(self.info["hosts"][host]["dir"]) / "sshd.log").read_text("utf-8", "replace")

    def logins(self, host):
        """How often somebody authenticated there (start-up does so too: compare two values)."""
        return self.log(host).count("Accepted publickey for")

    def processes(self, host):
        """The command lines of the account's processes on a host."""
        return [line for line in self.run(host, "ps", "-u", "tester", "-o", "pid=,args=").splitlines()
                if " ps -u tester" not in line]

    def tidy(self):
        """Undo all faults; end all processes on the hosts; empty their homes."""
        self("restore")
        for host in self.info["hosts"]:
            self("reboot", host)
            self.run(host, "find", "/tmp", "/var/tmp", "/dev/shm", "-xdev", "-user", "tester", "-delete", root=True)
            _empty(self.home(host))

    def stop(self):
        self("down")


class Slurm(Lab):
    """A SLURM whose login host for ssh is ``ctl``; ``info["env"]`` makes its commands work here (flat network)."""

    def __init__(self, **options):
        self.name = _name("u")
        super().__init__(HOSTS / "slurm-lab", "--name", self.name)
        self.info = json.loads(self("start", *_options(options)))

    @property
    def client(self):
        return [sys.executable, *self.command, "exec", "--"]

    def run(self, *argv, timeout_s=60):
        """A command as a submitting client on this machine (squeue, sbatch, ...); returns its stdout."""
        return self("exec", "--", *argv, timeout_s=timeout_s)

    def login(self, *argv, root=False, timeout_s=60):
        """A command on the login host, without ssh; returns its stdout."""
        return self("login", *(["--root"] if root else []), "--", *argv, timeout_s=timeout_s)

    @property
    def home(self):
        """The ordinary user's home folder, on all hosts, as it is seen from here."""
        return pathlib.Path(self.info["dir"]) / "home"

    def jobs(self):
        """Ids of the jobs in the queue, waiting or running."""
        return self.run("squeue", "-h", "-o", "%i").split()

    def tidy(self):
        """Start what was stopped, empty the queue, wait for idle nodes."""
        for host, running in json.loads(self("info"))["running"].items():
            if not running:
                self("node", host, "boot")
        for job in self.jobs():
            self.run("scancel", "-f", job)
        self.login("sh", "-c", "kill -9 -1")            # all of the user's processes there but this one
        self("wait", "30")
        _empty(self.home)

    def stop(self):
        self("stop")


class LabUser:
    """Somebody with an empty home and an empty working folder, at the place from where a lab's hosts can be reached."""

    def __init__(self, lab, folder, pythonpath=str(ROOT), python=sys.executable):
        self.lab, self.python_exe = lab, str(python)
        self.home, self.work = pathlib.Path(folder) / "home", pathlib.Path(folder) / "work"
        self.home.mkdir(parents=True)
        self.work.mkdir()
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith("SEAMLESS_") and name != "XDG_RUNTIME_DIR"}
        self.env.update(HOME=str(self.home), PYTHONPATH=pythonpath,
                        PATH=os.pathsep.join([lab.bin, os.path.dirname(self.python_exe), os.environ["PATH"]]))

    def configure(self, clusters=None, project=None):
        """Write ``clusters.yaml`` and ``seamless.yaml``."""
        (self.home / ".seamless").mkdir(mode=0o700, exist_ok=True)
        if clusters is not None:
            (self.home / ".seamless/clusters.yaml").write_text(clusters)
        if project is not None:
            (self.work / "seamless.yaml").write_text(project)

    def start(self, *argv, **kwargs):
        """Start a command in the working folder; the first word may be a program of ours: ``seamless-run``."""
        words = list(argv)
        if str(words[0]).startswith("seamless-"):
            words[:1] = [self.python_exe, ROOT / "bin" / words[0]]
        env = dict(self.env, **kwargs.pop("env", {}))
        return Running([*self.lab.client, *words], self.home.parent, env=env, cwd=kwargs.pop("cwd", self.work), **kwargs)

    def run(self, *argv, timeout_s=60, **kwargs):
        """Run a command to its end; returns what it said and its exit code."""
        return self.start(*argv, **kwargs).finish(timeout_s)

    def start_python(self, code, *args, **kwargs):
        """Start a Python script."""
        path = self.work / ("script%d.py" % next(_numbers))
        path.write_text(textwrap.dedent(code))
        return self.start(self.python_exe, path, *args, **kwargs)

    def python(self, code, *args, timeout_s=60, **kwargs):
        """Run a Python script to its end."""
        return self.start_python(code, *args, **kwargs).finish(timeout_s)

    def processes(self):
        """Pids of all processes on this machine that have this user's home in their environment (services, ...) or
        command line (an ssh master, which writes its title over its environment)."""
        found, mark = [], os.fsencode(self.home)
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):          # it ended while we looked, or is not ours
                    if mark in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def end(self, timeout_s=10):
        """End all processes of this user on this machine."""
        deadline = time.monotonic() + timeout_s
        while self.processes() and time.monotonic() < deadline:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def missing(reason):
    """Skip the test for want of a tool; where CI is set, a step that should have installed it is missing: fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(*modules, program=None):
    """Modules, and a program on PATH, without which a test cannot run."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            missing("needs the Python package %s" % name)
    if program is not None and shutil.which(program) is None:
        missing("needs the program %s" % program)


def make_lab(make, **options):
    """A lab, or the reason why there is none."""
    try:
        return make(**options)
    except LabError as exc:
        missing(str(exc).strip())


@pytest.fixture
def ssh_host():
    """``ssh_host(shell="/bin/tcsh", noise=True, sshd_option=["MaxSessions 1"], ...)``: the options of hosts/ssh-host."""
    hosts = []

    def make(**options):
        hosts.append(make_lab(SshHost, **options))
        return hosts[-1]
    yield make
    for host in hosts:
        host.stop()


def _session_lab(make, **options):
    lab = make_lab(make, **options)
    try:
        yield lab
    finally:
        lab.stop()


def _tidied(lab):
    yield lab
    lab.tidy()


@pytest.fixture(scope="session")
def _netns():
    yield from _session_lab(Netns)


@pytest.fixture
def netns(_netns):
    """Hosts h1 and h2 that have a python3 without any extra package."""
    yield from _tidied(_netns)


@pytest.fixture(scope="session")
def _netns_dask():
    need("distributed")
    yield from _session_lab(Netns, python=sys.executable)


@pytest.fixture
def netns_dask(_netns_dask):
    """Hosts h1 and h2 whose first python3 is that of these tests, with dask."""
    yield from _tidied(_netns_dask)


@pytest.fixture(scope="session")
def _slurm():
    need("dask_jobqueue")
    yield from _session_lab(Slurm, nodes=2, cpus=2, user="tester", python=sys.executable)


@pytest.fixture
def slurm(_slurm):
    """A SLURM with nodes n1 and n2 of two cores each; the ordinary user is ``tester``."""
    yield from _tidied(_slurm)


@pytest.fixture
def lab_user():
    """``lab_user(lab)``: a new user of that lab; ``pythonpath=`` another source, ``python=`` another interpreter."""
    users = []

    def make(lab, **kwargs):
        # not tmp_path: paths of sockets must be short, and a real home's path is
        users.append(LabUser(lab, tempfile.mkdtemp(prefix="lab-"), **kwargs))
        return users[-1]
    yield make
    for user in users:
        user.end()
        shutil.rmtree(user.home.parent)
