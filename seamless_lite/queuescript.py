"""From the keys of a queue (compat/config.md section 3) to the jobs that hold Dask workers.

``plan`` fills in what a queue does not say: from what the partition offers, else with what suits most.

    cores           of one job, all used for tasks; an exclusive job has those of its node
    processes       Dask workers in a job (1); each has cores / processes slots, or ``worker_threads``
    job_cores       what the queueing system is asked for, if that is not ``cores``
    memory          of one job: its share of a node's memory, by cores; MB if it is a bare number
    walltime        of one job, as the queueing system writes it or with a unit (2h): what the partition gives to
                    who says nothing, at most an hour where it has no limit
    lifetime        how long a job's workers take new tasks: what is left of the walltime after ``unknown_task_duration``;
                    less a random part of ``lifetime_stagger`` (4m, at most a tenth), so that not all end at once
    unknown_task_duration (60s), target_duration (60s): so many slots that the work is done within the second,
                    if a task takes as long as those before it, or the first
    maximum_jobs    10
    tmpdir          where a job makes its own folder for temporary files, if it can be written; else $TMPDIR or /tmp
"""
import math
import os
import random
import re
import shlex
import typing as _t

from .conda import conda_script
from .daskjob import END_S
from .errors import ConfigurationError
from .queuesystem import Partition, QueueError

DEATH_S = 40                # so long a worker looks for its scheduler
MAXIMUM_JOBS = 10
HOUR_S = 3600.0
DURATION_S = 60.0
STAGGER_S = 240.0
_PACKAGE = __package__


class Plan(_t.NamedTuple):
    """What the jobs of a queue are like.  Times in seconds, infinite for a job without a walltime."""
    processes: int
    threads: int                            # slots of one Dask worker
    cores: int
    memory: int                             # bytes
    walltime_s: float
    lifetime_s: float
    stagger_s: float
    unknown_s: float
    target_s: float
    minimum: int
    maximum: int
    address: _t.Optional[str]               # of a node
    config: _t.Mapping[str, object]         # for Dask
    options: _t.Mapping[str, object]        # for dask_jobqueue's cluster and job classes

    @property
    def slots(self) -> int:
        """Tasks that one job runs at the same time."""
        return self.processes * self.threads

    @property
    def end_s(self) -> float:
        """After so long a job ends by itself."""
        return self.walltime_s - _margin(self.walltime_s)


def plan(parameters: _t.Mapping, system, environment: _t.Mapping[str, str], python: str) -> _t.Tuple[Plan, _t.List[str]]:
    """The plan for the queue in ``parameters`` (those of the status file), and what it could not find out.

    ``system``: a ``queuesystem`` class' object; ``environment``: what the workers need in theirs.
    Raises ``ConfigurationError``.
    """
    queue, node = parameters.get("queue") or {}, parameters.get("node")
    where = "the queue %r of cluster %r" % (queue.get("name", "default"), parameters.get("cluster"))
    notes, partition = [], Partition()
    try:
        partition = system.partition(queue.get("partition"), node)
    except QueueError as exc:
        notes.append(str(exc))
    processes, threads, cores = _shape(queue, parameters, partition, where)
    memory = memory_bytes(queue.get("memory"), where) or _share(partition, cores, bool(queue.get("exclusive")))
    walltime_s = _walltime(queue.get("walltime") or partition.walltime, system.kind, where)
    if walltime_s is None:
        walltime_s = min(HOUR_S, _walltime(partition.most_walltime, system.kind, where) or HOUR_S)
    times = {key: _duration(queue.get(key), key, where) for key in (
        "unknown_task_duration", "target_duration", "lifetime", "lifetime_stagger")}
    unknown_s = times["unknown_task_duration"] or DURATION_S
    lifetime_s, stagger_s = _lifetime(walltime_s, times, unknown_s)
    options = {
        "queue": queue.get("partition"), "walltime": _clock(walltime_s, system.kind), "cores": processes * threads,
        "memory": str(memory), "processes": processes, "nanny": processes > 1, "python": shlex.quote(python),
        "death_timeout": DEATH_S, "local_directory": '"$SEAMLESS_JOB_FOLDER"',
        "worker_extra_args": ["--no-dashboard", "--preload", _PACKAGE + ".daskjob", *_resources(queue.get("dask_resources"))],
        "job_script_prologue": _prologue(queue, environment, walltime_s, where),
        "job_extra_directives": _directives(queue, node, system), "config_name": system.kind}
    if system.kind == "slurm":
        options.update(account=queue.get("project"), job_cpu=queue.get("job_cores") or cores,
                       job_mem="0" if queue.get("exclusive") and not queue.get("memory") else "%dM" % math.ceil(memory / 2 ** 20))
    else:
        options.update(project=queue.get("project"), resource_spec="/nodes=1" if queue.get("exclusive") else
                       "/nodes=1/core=%d" % (queue.get("job_cores") or cores),
                       memory_per_core_property_name=parameters.get("memory_per_core_property_name") or "not_applicable")
    found = Plan(processes, threads, cores, memory, walltime_s, lifetime_s, stagger_s, unknown_s,
                 times["target_duration"] or DURATION_S, 1 if queue.get("interactive") else 0,
                 queue.get("maximum_jobs") or MAXIMUM_JOBS, partition.address, queue.get("extra_dask_config") or {},
                 {key: value for key, value in options.items() if value is not None})
    return found, notes


# --- numbers ----------------------------------------------------------------------------------------------

def _shape(queue, parameters, partition, where) -> _t.Tuple[int, int, int]:
    """(processes, threads of each, cores that are asked for)"""
    cores = queue.get("cores") or (partition.cores if queue.get("exclusive") else None)
    processes, threads = queue.get("processes"), queue.get("worker_threads")
    if cores is None and threads is None:
        raise ConfigurationError("%s has no 'cores'%s; add 'cores: NUMBER'" % (
            where, ", and the queueing system does not say how many its nodes have" if queue.get("exclusive") else ""))
    if processes is None:
        processes = max(1, cores // threads) if cores and threads else 1
    if threads is None:
        if processes > cores:
            raise ConfigurationError("%s has 'processes: %d', but only %d cores; lower it" % (where, processes, cores))
        threads = cores // processes
    return processes, threads, cores or processes * threads


def _share(partition: Partition, cores: int, exclusive: bool) -> int:
    """A job's share of a node, by its cores; 1 GiB for each core if nobody knows."""
    if not partition.memory or not partition.cores:
        return cores << 30
    return partition.memory if exclusive else min(partition.memory, partition.memory * cores // partition.cores)


def memory_bytes(text, where: str) -> _t.Optional[int]:
    """What 'memory' of a queue means.  Raises ``ConfigurationError``."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ConfigurationError("%s has 'memory: %s', which is not an amount like 16GB" % (where, text))
    unit = (match[2] or "M").upper()        # as SLURM reads it; and a K of it is 1024
    return int(float(match[1]) * 1024 ** (1 + "KMGTP".index(unit)))


def _duration(text, key, where) -> _t.Optional[float]:
    """Seconds; a bare number is seconds."""
    if text is None:
        return None
    clock = re.fullmatch(r"\s*(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)\s*", str(text))
    if clock:
        days, hours, minutes, seconds = (int(group or 0) for group in clock.groups())
        return days * 86400.0 + hours * 3600 + minutes * 60 + seconds
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "ms": 0.001}
    total, rest = 0.0, str(text).strip().lower()
    for number, word in re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", rest):
        unit = word if word in units else word[:1]
        if unit not in units:
            break
        total += float(number) * units[unit]
    if not re.fullmatch(r"(\d+(\.\d+)?\s*[a-z]*\s*)+", rest) or total <= 0:
        raise ConfigurationError("%s has '%s: %s', which is not a time like 90s, 5m or 1:30:00" % (where, key, text))
    return total


def _walltime(text, kind, where) -> _t.Optional[float]:
    """Seconds of a walltime as SLURM or OAR writes it, or with a unit; infinite for UNLIMITED."""
    text = None if text is None else str(text).strip()
    if not text:
        return None
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return _duration(text, "walltime", where)
    days, first, second, third = (None if group is None else int(group) for group in match.groups())
    if kind == "oar" or days is not None or third is not None:      # hours come first
        seconds = (days or 0) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    else:
        seconds = first * 60 + (second or 0)
    if seconds <= 0:
        raise ConfigurationError("%s has 'walltime: %s', which is no time at all" % (where, text))
    return float(seconds)


def _clock(seconds: float, kind: str) -> str:
    if seconds == math.inf:
        return "UNLIMITED" if kind == "slurm" else "8760:00:00"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return "%02d:%02d:%02d" % (minutes // 60, minutes % 60, rest)


def _margin(walltime_s: float) -> float:
    """How long before its walltime a job ends by itself."""
    return min(END_S, walltime_s / 4)


def _lifetime(walltime_s: float, times: _t.Mapping, unknown_s: float) -> _t.Tuple[float, float]:
    """(lifetime, stagger)"""
    most = walltime_s - _margin(walltime_s)
    lifetime_s = min(most, times["lifetime"] or max(most - unknown_s, most / 2))
    stagger_s = times["lifetime_stagger"]
    if lifetime_s == math.inf:
        return lifetime_s, 0.0
    return lifetime_s, min(STAGGER_S, lifetime_s / 10) if stagger_s is None else min(stagger_s, lifetime_s / 2)


# --- the script --------------------------------------------------------------------------------------------

def _directives(queue, node, system) -> _t.List[str]:
    own = []
    if system.kind == "slurm":
        # A job that begins again would be a second worker of the same name: we submit anew.
        own = ["--no-requeue", "--chdir=/"] + (["--nodelist=" + node] if node else []) + (["--exclusive"] if queue.get("exclusive") else [])
    elif node:
        own = ["-p host='%s'" % node]     # SQL: ``Oar.submit`` leaves the quotes alone
    extra = [line[len(system.mark):] if line.startswith(system.mark) else line for line in queue.get("job_extra_directives") or ()]
    return own + [line.strip() for line in extra]


def _resources(resources) -> _t.List[str]:
    return ["--resources", shlex.quote(" ".join("%s=%s" % item for item in resources.items()))] if resources else []


def _prologue(queue, environment, walltime_s, where) -> _t.List[str]:
    """Shell lines before the worker starts.  The clock comes first: what follows may take its time."""
    lines = ["export SEAMLESS_JOB_BEGAN=$(date +%s)"]
    if walltime_s != math.inf:
        lines.append("export SEAMLESS_JOB_END=%d" % (walltime_s - _margin(walltime_s)))
    variables = {**environment, **as_variables(queue.get("extra_dask_config") or {})}
    lines += exports(variables)
    lines += _activation(queue.get("conda"), where)
    lines += queue.get("job_script_prologue") or ()
    folders, check = [], []
    if queue.get("tmpdir"):
        folders = [_with_variables(queue["tmpdir"])]
        check = ['[ "$folder" = %s ] || echo "there can be no temporary files in "%s": $folder is taken" >&2' % (folders[0], folders[0])]
    lines += [
        'SEAMLESS_JOB_NAME="seamless-job-${HOSTNAME%%.*}-"',
        'for folder in ' + " ".join(folders + ['"${SLURM_TMPDIR:-}"', '"${TMPDIR:-}"', "/tmp", "/var/tmp", '"$HOME"; do']),
        '  [ -n "$folder" ] && SEAMLESS_JOB_FOLDER=$(mktemp -d "$folder/${SEAMLESS_JOB_NAME}XXXXXXXX" 2>/dev/null) && break',
        "done",
        *check,
        'trap \'cd /; rm -rf "$SEAMLESS_JOB_FOLDER"\' EXIT',
        # Jobs that were killed left theirs; those of others that live, here on this node, are locked: before the lock has
        # the name that others look for.
        'exec 9>"$SEAMLESS_JOB_FOLDER/new"; flock -n 9; mv "$SEAMLESS_JOB_FOLDER/new" "$SEAMLESS_JOB_FOLDER/lock"',
        'for old in "$folder/$SEAMLESS_JOB_NAME"*/lock; do [ -O "$old" ] && flock -n "$old" rm -rf "${old%/lock}"; done',
        'export TMPDIR="$SEAMLESS_JOB_FOLDER" SEAMLESS_JOB_FOLDER',
        'cd "$SEAMLESS_JOB_FOLDER"']        # "python -m" would import what lies in the folder from which the job was sent
    return lines


def _with_variables(path: str) -> str:
    """A word for the shell, in which ``$NAME``, ``${NAME}`` and ``~`` at the beginning still mean something."""
    text = re.sub(r'[\\"`]|\$(?!\w|\{\w+\})', r"\\\g<0>", path)
    return '"%s"' % re.sub(r"^~(?=/|$)", "$HOME", text)


def exports(variables: _t.Mapping[str, str]) -> _t.List[str]:
    """Shell lines that set them."""
    return ["export %s=%s" % (name, shlex.quote(value)) for name, value in sorted(variables.items())]


def dotted(config: _t.Mapping, prefix: str = "") -> _t.Dict[str, object]:
    """Dask's configuration with one dotted key for each value: a nested mapping would replace all that stands beside it."""
    found = {}
    for key, value in config.items():
        found.update(dotted(value, "%s%s." % (prefix, key)) if isinstance(value, dict) and value else {prefix + str(key): value})
    return found


def as_variables(config: _t.Mapping) -> _t.Dict[str, str]:
    """Dask's configuration as the environment variables that it reads."""
    return {"DASK_" + key.replace(".", "__").replace("-", "_").upper(): repr(value) for key, value in dotted(config).items()}


def conda_python(name: _t.Optional[str], python: str) -> str:
    """The interpreter of the workers: that of the conda environment, which the job activates, or else ``python``."""
    return "python" if name else python


def _activation(name: _t.Optional[str], where: str) -> _t.List[str]:
    """Shell lines that activate the conda environment ``name`` (or folder).  Raises ``ConfigurationError``."""
    if not name:
        return []
    script = conda_script()
    if script is None:
        raise ConfigurationError("%s has 'conda: %s', but no conda was found on %s; set CONDA_ROOT to its folder"
                                 % (where, name, os.uname().nodename))
    return [". %s" % shlex.quote(script),
            "conda activate %s || { echo 'the conda environment' %s 'cannot be activated' >&2; exit 1; }" % ((shlex.quote(name),) * 2)]


def with_lifetime(found: Plan) -> _t.List[str]:
    """The shell line that says how long this job's workers take new tasks."""
    if found.lifetime_s == math.inf:
        return []
    return ["export SEAMLESS_JOB_LIFETIME=%d" % (found.lifetime_s - random.random() * found.stagger_s)]
