"""Both packages on one store: ``Real`` starts programs of the real package, ``Lab`` those of both.

A process of the real package needs a second to start.  ``Lab.theirs_many`` therefore runs many command lines in forks of
one process, each its own program otherwise.
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SUITE = "seamless-suite==1.4.3"
TIMEOUT_S = 240

#: Stdin: a JSON list of [program, argv, folder, {variable: value}]; stdout: a JSON list of [exit code, stdout, stderr].
MANY = """
import functools, importlib.metadata, json, os, runpy, sys, tempfile
programs = {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}
lines = json.load(sys.stdin)
folder = os.path.dirname(sys.executable)
mains = {name: programs[name].load() if name in programs else functools.partial(
    runpy.run_path, os.path.join(folder, name), run_name="__main__") for name in sorted({line[0] for line in lines})}
report, done = os.dup(1), []
for name, argv, folder, variables in lines:
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if not pid:
        os.close(report)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        os.chdir(folder)
        os.environ.update(variables)
        sys.argv = [name] + argv
        code = mains[name]()
        sys.exit(code if isinstance(code, int) else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode("utf-8", "surrogateescape"))
    done.append([status] + texts)
os.write(report, b"\\0" + json.dumps(done).encode())
"""


class Done:
    """What a program left: ``code``, ``out`` and ``err`` (text)."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return "exit code %d\nstdout: %s\nstderr: %s" % (self.code, self.out, self.err)


class Real:
    """A virtual environment with the real package."""

    def __init__(self, venv):
        self.venv = pathlib.Path(venv)
        self.bin = self.venv / "bin"
        self.python = self.bin / "python"


class Lab:
    """A folder with a store (``cache``), a working folder (``work``), and a home for either package.

    ``configure`` gives both a cluster definition; until then the store is ``SEAMLESS_CACHE``.
    """

    def __init__(self, real, folder):
        self.real, self.folder = real, pathlib.Path(folder)
        self.cache, self.work, self.ledger = self.folder / "cache", self.folder / "work", self.folder / "ledger"
        self.project = "__TOPLEVEL__"
        self.homes = {"theirs": self.folder / "their-home", "ours": self.folder / "our-home"}
        for path in (self.cache, self.work, *self.homes.values()):
            path.mkdir(parents=True)
        # Any bash that runs for a job writes a line into the ledger.
        (self.folder / "ledger.sh").write_text('echo ran >> "$LEDGER"\n')
        self.variables = {"SEAMLESS_CACHE": str(self.cache), "LEDGER": str(self.ledger),
                          "BASH_ENV": str(self.folder / "ledger.sh")}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def store(self):
        """The folder of buffers and ``seamless.db`` of the project that both use."""
        return self.cache / self.project

    @property
    def table(self):
        return self.store / "seamless.db"

    def configure(self, project, subproject):
        """A cluster definition for both, in place of ``SEAMLESS_CACHE``; theirs starts its own servers."""
        self.project = "%s/%s" % (project, subproject)
        del self.variables["SEAMLESS_CACHE"]
        definition = """\
local_cluster: here
here:
  type: local
  workers: 1
  frontends:
    - hostname: localhost
      hashserver: {bufferdir: %(cache)s, conda: null, network_interface: 127.0.0.1, port_start: 50100, port_end: 59900}
      database: {database_dir: %(cache)s, conda: null, network_interface: 127.0.0.1, port_start: 50100, port_end: 59900}
""" % {"cache": self.cache}
        for home in self.homes.values():
            (home / ".seamless").mkdir()
            (home / ".seamless" / "clusters.yaml").write_text(definition)
        (self.work / "seamless.yaml").write_text(
            "- project: %s\n- subproject: %s\n- execution: process\n- cluster: here\n" % (project, subproject))

    def environment(self, who):
        """The environment of a process of ``theirs`` or ``ours``."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SEAMLESS", "PYTHON"))}
        clean.update(self.variables, HOME=str(self.homes[who]))
        if who == "ours":
            clean["PYTHONPATH"] = str(ROOT)
        else:                               # its programs look for each other on PATH
            clean["PATH"] = "%s%s%s" % (self.real.bin, os.pathsep, clean.get("PATH", os.defpath))
        return clean

    def start(self, who, argv, cwd=None, **options):
        options.setdefault("env", self.environment(who))
        return subprocess.Popen([str(word) for word in argv], cwd=str(cwd or self.work), stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def run(self, who, argv, cwd=None, stdin=b""):
        """Run to the end; a ``Done``."""
        process = self.start(who, argv, cwd)
        try:
            out, err = process.communicate(stdin, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError("%s did not end: %s" % (argv, Done(-1, out, err))) from None
        return Done(process.returncode, *(text.decode("utf-8", "surrogateescape") for text in (out, err)))

    def script(self, who, path, *argv):
        """Run a Python script that prints JSON as its last line; what it printed."""
        python = sys.executable if who == "ours" else self.real.python
        done = self.run(who, [python, path, *argv])
        assert done.code == 0, done
        return json.loads(done.out.splitlines()[-1])

    def program(self, who, name, *argv, cwd=None):
        """Run a program of the package, such as ``seamless-run``; a ``Done``."""
        if who == "ours":
            return self.run(who, [sys.executable, ROOT / "bin" / name, *argv], cwd)
        return self.run(who, [self.real.bin / name, *argv], cwd)

    def many(self, who, lines):
        """Run command lines [program, argv, folder], one after the other; a list of ``Done``."""
        lines = [[name, [str(word) for word in argv], str(folder), dict(*more)] for name, argv, folder, *more in lines]
        if who == "ours":
            return [self.run(who, ["env", *("%s=%s" % item for item in more.items()), sys.executable, ROOT / "bin" / name,
                                   *argv], folder) for name, argv, folder, more in lines]
        done = self.run(who, [self.real.python, "-c", MANY], stdin=json.dumps(lines).encode())
        assert done.code == 0 and "\0" in done.out, done
        return [Done(*one) for one in json.loads(done.out.rpartition("\0")[2])]

    def ran(self):
        """How many jobs have run since the last call."""
        try:
            return len(self.ledger.read_text().splitlines())
        except FileNotFoundError:
            return 0
        finally:
            self.ledger.unlink(missing_ok=True)

    def close(self):
        """Stop the servers that the real package has started: those with this folder among their arguments."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._servers():
                os.kill(pid, number)
            deadline = time.monotonic() + 5
            while self._servers() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _servers(self):
        shown = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
        found = [line.split(None, 1) for line in shown.splitlines() if str(self.folder) in line]
        return [int(pid) for pid, args in found if "hashserver" in args or "seamless-database" in args]
