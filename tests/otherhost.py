"""Another host without root and without sshd: ``ssh`` is a script on PATH that runs the command here, under another HOME.

What is not real is the network and the log-in; the programs there are started, found and stopped as anywhere.  The script
can neither share connections nor forward, so everything goes through one long-lived "ssh".
"""
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
SSH = """\
#!%s -S
import os, sys
words = sys.argv[1:]
with open(%r, "a") as file:
    file.write(" ".join(words)[:60] + "\\n")
if "-f" in words or "-O" in words:
    sys.exit("unix_listener: not here")
if "-G" in words:
    sys.exit(0)
n = 0
while words[n].startswith("-"):
    n += 2 if words[n] in ("-F", "-S", "-o", "-E", "-p", "-l", "-i") else 1
home = os.path.join(%r, words[n])
os.makedirs(home, exist_ok=True)
environment = {k: v for k, v in os.environ.items() if not k.startswith(("SEAMLESS", "PYTHON", "XDG"))}
os.chdir(home)
os.execvpe("sh", ["sh", "-c", " ".join(words[n + 1:])], {**environment, "HOME": home})
"""


class OtherHosts:
    """Every host name is a folder below ``folder``, which is the home there.  ``home`` and ``work`` are the user's here."""

    def __init__(self, folder, home):
        self.folder, self.home, self.work = folder, home, folder / "work"
        (folder / "bin").mkdir()
        self.work.mkdir()
        self.log = folder / "log"
        program = folder / "bin" / "ssh"
        program.write_text(SSH % (sys.executable, str(self.log), str(folder)))
        program.chmod(0o755)
        self.env = dict(os.environ, PYTHONPATH=str(ROOT), PATH="%s:%s" % (program.parent, os.environ["PATH"]))

    def configure(self, clusters, commands):
        """Write the cluster file and ``seamless.yaml``."""
        (self.home / ".seamless").mkdir(exist_ok=True)
        (self.home / ".seamless/clusters.yaml").write_text(textwrap.dedent(clusters))
        (self.work / "seamless.yaml").write_text(textwrap.dedent(commands))

    def start(self, *command, **kwargs):
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.work, env=self.env,
                                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs})

    def python(self, code, check=True):
        """What a script prints; with ``check=False`` (exit code, stdout, stderr)."""
        (self.work / "script.py").write_text(textwrap.dedent(code))
        return self._finish(self.start("script.py"), check)

    def run(self, *words, check=True):
        """The same for ``seamless-run``."""
        return self._finish(self.start(ROOT / "bin/seamless-run", *words), check)

    @staticmethod
    def _finish(process, check):
        out, err = (text.decode() for text in process.communicate(timeout=90))
        if check:
            assert process.returncode == 0, err
            return out
        return process.returncode, out, err

    def records(self, host=None):
        """(service, pid) of those that run on a host, or here."""
        run = (self.home / ".seamless" if host is None else self.folder / host / ".seamless") / "run"
        found = []
        for path in run.glob("*.json"):
            with contextlib.suppress(ValueError, KeyError):
                record = json.loads(path.read_text())
                if record["status"] == "running" and os.path.exists("/proc/%d" % record["pid"]):
                    found.append((record["service"], record["pid"]))
        return found

    def services(self, host=None):
        """The names of those services."""
        return {service for service, _ in self.records(host)}

    def kill(self, host=None, number=signal.SIGKILL):
        """End all services of a host."""
        for _, pid in self.records(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self):
        for path in self.folder.iterdir():
            if (path / ".seamless").is_dir():
                self.kill(path.name, signal.SIGTERM)
        self.kill(None, signal.SIGTERM)
