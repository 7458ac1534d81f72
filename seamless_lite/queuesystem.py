"""What we ask of SLURM and OAR, by their own commands: submit, list, cancel, why a job ended, what a partition offers.

Every command has a deadline, and what it says goes into the error.  Nothing here knows of Dask.
"""
import json
import os
import re
import shlex
import subprocess
import typing as _t

from .errors import ServiceError

COMMAND_S = 60.0            # a busy controller may need half a minute, and says so itself after some seconds
PENDING, RUNNING, ENDING = "pending", "running", "ending"
_MEMORY = re.compile(r"oom[-_ ]?kill|out of memory|exceeded .*memory limit|memory cgroup", re.IGNORECASE)
#: The queue may take the job later; everything else that it says will be the same the next time.
_PASSING = re.compile(r"unable to contact|socket timed out|connection (?:refused|timed out)|connect failure|try again|temporar"
                      r"|did not answer|MaxSubmit|job submit limit|zero bytes were transmitted", re.IGNORECASE)


class QueueError(ServiceError):
    """A command of the queueing system failed; the message holds its own words.  ``passing``: it may work later."""

    @property
    def passing(self) -> bool:
        return bool(_PASSING.search(str(self)))


class Listed(_t.NamedTuple):
    """A job in the queue.  ``state``: pending, running or ending; ``reason``: why it is pending, in the system's own word."""
    state: str
    reason: str


class Partition(_t.NamedTuple):
    """What the nodes of a partition have at least, its time limit for who names none, and the address of one node."""
    cores: _t.Optional[int] = None
    memory: _t.Optional[int] = None         # bytes
    walltime: _t.Optional[str] = None
    most_walltime: _t.Optional[str] = None
    address: _t.Optional[str] = None


def run(argv: _t.Sequence[str], timeout_s: float = COMMAND_S) -> str:
    """What the command prints.  Raises ``QueueError``."""
    try:
        done = subprocess.run(list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=timeout_s, cwd="/", env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise QueueError("%s did not answer within %g s" % (argv[0], timeout_s)) from None
    except OSError as exc:
        raise QueueError("%s cannot be run on %s: %s; a cluster of this type works only on a host that has it"
                         % (argv[0], os.uname().nodename, exc.strerror)) from None
    out, err = (data.decode("utf-8", "replace").strip() for data in (done.stdout, done.stderr))
    if done.returncode:
        raise QueueError("%s (%s, exit code %d)" % (" ".join((err or out or "it said nothing").split()), argv[0], done.returncode))
    return out


class Slurm:
    """sbatch, squeue, scancel, scontrol, sinfo."""
    title, kind, mark = "SLURM", "slurm", "#SBATCH "

    def submit(self, script: str) -> str:
        """Submit the file ``script``; returns the job's id.  Raises ``QueueError``."""
        out = run(["sbatch", "--parsable", script])
        if not re.match(r"\d+", out):
            raise QueueError("sbatch said %r, which holds no job id" % out)
        return out.split(";")[0]

    def jobs(self, tag: str) -> _t.Dict[str, Listed]:
        """Our jobs with the name ``tag`` by id.  Raises ``QueueError``."""
        found = {}
        for line in run(["squeue", "-h", "-o", "%i|%T|%r", "--user=%d" % os.getuid(), "--name=" + tag]).splitlines():
            id, state, reason = line.strip().split("|", 2)
            state = PENDING if state in ("PENDING", "REQUEUED") else ENDING if state == "COMPLETING" else RUNNING
            found[id] = Listed(state, reason)
        return found

    def cancel(self, ids: _t.Collection[str]) -> None:
        """End jobs; those that have ended are no error.  Raises ``QueueError``."""
        if ids:
            try:
                run(["scancel", *ids])
            except QueueError as exc:
                if "Invalid job id" not in str(exc) and "already completing" not in str(exc):
                    raise

    def ending(self, id: str, log: str = "") -> _t.Optional[str]:
        """How a job ended, as the end of a sentence; None if it has not, or nobody knows.  ``log``: what it printed."""
        try:
            words = dict(word.split("=", 1) for word in run(["scontrol", "-o", "show", "job", id], 10).split() if "=" in word)
        except QueueError:
            return _by_log(log)             # forgotten: it ended long ago
        state, node = words.get("JobState", ""), words.get("BatchHost") or words.get("NodeList", "a node")
        if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
            return None
        if state == "TIMEOUT" or words.get("Reason") == "TimeLimit":
            return "reached its walltime of %s on %s" % (words.get("TimeLimit"), node)
        if state == "OUT_OF_MEMORY" or _MEMORY.search(log):
            return "ran out of memory on %s (the queue asks for %s; 'memory:' changes that)" % (node, words.get("MinMemoryNode", "less"))
        if state in ("NODE_FAIL", "BOOT_FAIL"):
            return "was lost with its node %s" % node
        if state == "CANCELLED":
            return "was cancelled on %s" % node
        if state == "COMPLETED":
            return "ended on %s" % node
        code, _, number = words.get("ExitCode", "").partition(":")
        return "%s on %s (%s)" % ({"FAILED": "failed", "PREEMPTED": "was preempted"}.get(state, "ended as " + state), node,
                                  "signal " + number if number not in ("", "0") else "exit code " + code)

    def partition(self, name: _t.Optional[str], node: _t.Optional[str]) -> Partition:
        """What the partition (None: the default one) and the node (None: any) offer.  Raises ``QueueError``."""
        found = [dict(word.split("=", 1) for word in line.split() if "=" in word)
                 for line in run(["scontrol", "-o", "show", "partition"] + ([name] if name else []), 20).splitlines()]
        chosen = next((words for words in found if name or words.get("Default") == "YES"), {})
        rows = [line.split("|") for line in run(
            ["sinfo", "-h", "-N", "-o", "%N|%c|%m|%o"] + (["-p", chosen["PartitionName"]] if chosen else [])
            + (["-n", node] if node else []), 20).splitlines()]
        if not rows:
            return Partition()
        times = (chosen.get("DefaultTime"), chosen.get("MaxTime"))
        walltime, most = (None if time in (None, "NONE", "UNLIMITED") else time for time in times)
        return Partition(min(int(row[1].rstrip("+")) for row in rows), min(int(row[2].rstrip("+")) for row in rows) << 20,
                         walltime, most, rows[0][3].strip() or rows[0][0])


class Oar:
    """oarsub, oarstat, oardel, oarnodes."""
    title, kind, mark = "OAR", "oar", "#OAR "
    _ENDED = ("Terminated", "Error")

    def submit(self, script: str) -> str:
        """Submit the file ``script``; returns the job's id.  Raises ``QueueError``."""
        with open(script, encoding="utf-8") as file:
            lines = file.read().splitlines()
        # The options stand in the script, as dask-jobqueue writes it.
        options = [_words(line[len(self.mark):].strip()) for line in lines if line.startswith(self.mark)]
        out = run(["oarsub", *sum(options, []), "bash " + shlex.quote(script)])      # read when the job begins
        match = re.search(r"OAR_JOB_ID=(\d+)", out)
        if not match:
            raise QueueError("oarsub said %r, which holds no job id" % out)
        return match[1]

    def _stat(self, *arguments: str, timeout_s: float = COMMAND_S) -> _t.Dict[str, dict]:
        text = run(["oarstat", "-J", *arguments], timeout_s)
        try:
            return json.loads(text) if text.startswith("{") else {}
        except ValueError:
            raise QueueError("oarstat -J answered with something that is not JSON: %.200s" % text) from None

    def jobs(self, tag: str) -> _t.Dict[str, Listed]:
        """The jobs with the name ``tag`` by id.  Raises ``QueueError``."""
        import getpass
        found = {}
        for id, job in self._stat("-u", getpass.getuser()).items():
            state = job.get("state")
            if job.get("name") == tag and state not in self._ENDED:
                why = re.search(r"\((.*)\)", job.get("message") or "")
                found[id] = Listed(RUNNING if state in ("Running", "Launching", "Suspended", "Resuming") else
                                   ENDING if state in ("Finishing", "toError") else PENDING, why[1] if why else str(state))
        return found

    def cancel(self, ids: _t.Collection[str]) -> None:
        """End jobs; those that have ended are no error.  Raises ``QueueError``."""
        for id in ids:
            try:
                run(["oardel", id])
            except QueueError as exc:
                if exc.passing:
                    raise

    def ending(self, id: str, log: str = "") -> _t.Optional[str]:
        """How a job ended, as the end of a sentence; None if it has not, or nobody knows.  ``log``: what it printed."""
        try:
            job = self._stat("-f", "-j", id, timeout_s=10).get(id, {})
        except QueueError:
            return _by_log(log)
        if job.get("state") not in self._ENDED:
            return None
        events, node = json.dumps(job.get("events", "")), " and ".join(job.get("assigned_network_address") or ["no node"])
        if "WALLTIME" in events:
            return "reached its walltime on %s" % node
        if job.get("exit_code") and not _by_log(log):
            return "failed on %s (exit code %d)" % (node, job["exit_code"] >> 8 or job["exit_code"])
        return _by_log(log) or ("was cancelled on %s" if "FRAG" in events else "ended on %s") % node

    def partition(self, name: _t.Optional[str], node: _t.Optional[str]) -> Partition:
        """What the nodes offer.  Raises ``QueueError``."""
        text = run(["oarnodes", "-J"] + ([node] if node else []), 20)
        counts: _t.Dict[str, int] = {}
        try:
            resources = json.loads(text)
            for resource in resources.values() if isinstance(resources, dict) else resources:
                host = resource.get("network_address") or resource.get("host")
                if host and resource.get("type", "default") == "default":
                    counts[host] = counts.get(host, 0) + 1
        except (ValueError, AttributeError):
            counts = {}
        return Partition(min(counts.values()), address=sorted(counts)[0]) if counts else Partition()


def _words(option: str) -> _t.List[str]:
    """The arguments that a line of options for OAR stands for; a property is SQL, with quotes of its own."""
    match = re.match(r"(-p|--property)[\s=]\s*(.*)", option)
    if match is None:
        return shlex.split(option)
    outer = re.fullmatch(r"(['\"])(.*)\1", match[2])
    return [match[1], outer[2] if outer else match[2]]


def _by_log(log: str) -> _t.Optional[str]:
    return "ran out of memory" if _MEMORY.search(log) else None


SYSTEMS: _t.Mapping[str, _t.Any] = {"slurm": Slurm, "oar": Oar}
