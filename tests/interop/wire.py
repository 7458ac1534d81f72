"""Servers of both packages on loopback ports (``Servers``), and the plain HTTP that either is asked in."""
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WAIT_S = 60
#: Service -> (their program, our program).
PROGRAMS = {"hashserver": ("hashserver", "seamless-hashserver"), "database": ("seamless-database",) * 2,
            "jobserver": ("seamless-jobserver",) * 2}


class Server:
    """A server that listens: ``url``, ``port``, ``process``."""

    def __init__(self, process, port):
        self.process, self.port, self.url = process, port, "http://127.0.0.1:%d" % port

    def ask(self, method, path, body=None, **headers):
        """One request in plain HTTP; ``(status, body, headers)``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            if body is not None and not isinstance(body, bytes):
                body, headers["Content_Type"] = json.dumps(body).encode(), "application/json"
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()


class Servers:
    """Starts servers in ``folder`` (their homes and status files lie there), and stops them all."""

    def __init__(self, real, folder):
        self.real, self.folder = real, pathlib.Path(folder)
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
        self.processes = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def environment(self, who, **variables):
        """That of a process of ``theirs`` or ``ours``."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SEAMLESS", "PYTHON"))}
        clean.update(HOME=str(self.home), **variables)
        if who == "theirs":
            clean["PATH"] = "%s%s%s" % (self.real.bin, os.pathsep, clean.get("PATH", os.defpath))
        else:
            clean.update(PYTHONPATH=str(ROOT), SEAMLESS_HOME=str(self.home / ".seamless"))
        return clean

    def start(self, who, service, *argv, parameters=None, timeout=600, **variables):
        """Start a server with a status file, and wait until it says that it listens.  ``argv`` comes last."""
        status = self.folder / ("%s-%s-%d.json" % (who, service, len(self.processes)))
        status.write_text(json.dumps({"parameters": parameters or {}, "ours to keep": 1}))
        if who == "theirs":
            command = [self.real.bin / PROGRAMS[service][0]]
        else:
            command = [sys.executable, ROOT / "bin" / PROGRAMS[service][1], "--auth", "none"]
        command += ["--host", "127.0.0.1", "--port-range", "49200", "65500", "--status-file", status, "--timeout", timeout, *argv]
        with open(status.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen([str(word) for word in command], env=self.environment(who, **variables), cwd=str(self.folder),
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.processes.append(process)
        wait_for(lambda: process.poll() is not None or json.loads(status.read_text()).get("status") == "running",
                 "%s %s" % (who, service))
        said = json.loads(status.read_text())
        assert process.poll() is None and said["ours to keep"] == 1, status.with_suffix(".log").read_text()
        server = Server(process, said["port"])
        wait_for(lambda: answers(server), "the answer of %s %s" % (who, service))
        return server

    def stores(self, who, *argv):
        """A hashserver and a database, and the client lists that name them: ``(hashserver, database, clients)``."""
        folder = self.folder / ("store-" + who)
        folder.mkdir(exist_ok=True)
        hashserver = self.start(who, "hashserver", *argv, folder, "--writable")
        database = self.start(who, "database", "--writable", folder / "seamless.db")
        return hashserver, database, clients(hashserver, database)

    def run(self, who, command, cwd, timeout=WAIT_S, **variables):
        """Run a program of theirs, or ours (by name), or a script (``.py``) to the end."""
        done = subprocess.run(self.command(who, command), cwd=str(cwd), env=self.environment(who, **variables), timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    def begin(self, who, command, cwd, **variables):
        """The same, without waiting for it."""
        process = subprocess.Popen(self.command(who, command), cwd=str(cwd), env=self.environment(who, **variables),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.processes.append(process)
        return process

    def command(self, who, words):
        name, *rest = [str(word) for word in words]
        if name.endswith(".py"):
            return [str(self.real.python) if who == "theirs" else sys.executable, name, *rest]
        return [str(self.real.bin / name)] + rest if who == "theirs" else [sys.executable, str(ROOT / "bin" / name)] + rest

    def stop(self):
        """End what was started here and still runs."""
        for number, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            alive = [process for process in self.processes if process.poll() is None]
            for process in alive:
                process.send_signal(number)
            for process in alive:
                try:
                    process.communicate(timeout=patience_s) if process.stdout else process.wait(patience_s)
                except subprocess.TimeoutExpired:
                    continue


class Ledger:
    """A file into which each job that runs writes a byte."""

    def __init__(self, path):
        self.path = path
        self.path.write_bytes(b"")

    def __str__(self):
        return str(self.path)

    def ran(self):
        """How many jobs have run."""
        return self.path.stat().st_size

    def await_one(self):
        """Wait until a job has begun."""
        wait_for(self.ran, "the job")


def clients(hashserver, database, *jobservers, readonly=False):
    """The value of ``SEAMLESS_REMOTE_CLIENTS`` that names these servers."""
    lists = {"database": [database], "buffer": [hashserver], "jobserver": list(jobservers)}
    return json.dumps({group: [{"readonly": readonly, "url": server.url, "remote_url": server.url} for server in servers]
                       for group, servers in lists.items() if servers})


def answers(server):
    """Whether the server says that it is well."""
    try:
        return server.ask("GET", "/healthcheck")[:2] == (200, b"OK")
    except OSError:
        return False


def wait_for(ready, what, timeout_s=WAIT_S):
    """Return what ``ready()`` returns as soon as that is true."""
    end = time.monotonic() + timeout_s
    while True:
        value = ready()
        if value:
            return value
        assert time.monotonic() < end, "%s did not come within %g s" % (what, timeout_s)
        time.sleep(0.05)
