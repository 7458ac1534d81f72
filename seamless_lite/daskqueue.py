"""A Dask cluster whose workers live in the jobs of SLURM and OAR: ``make_cluster`` -> ``queuejobs.Managed``.

    managed = make_cluster(parameters, security=..., host=..., scheduler_options=..., environment=..., log_folder=..., state_file=...)
    managed.cluster, managed.slots, managed.describe(), managed.epitaph(worker), managed.close()

dask_jobqueue knows how a job's script looks and how the scheduler is started; ``queuescript`` what a queue asks for.
``state_file`` says which jobs there are (see ``queuestate``).
"""
import logging
import os
import re
import shlex
import socket
import sys
import typing as _t

from .errors import ConfigurationError, ServiceError
from .queuejobs import Managed
from .queuescript import as_variables, conda_python, dotted, exports, plan, with_lifetime
from .queuestate import QueueState
from .queuesystem import SYSTEMS

#: On a node with several networks: the address that it has for the scheduler.
OWN_ADDRESS = ("import socket, sys; f, k, _, _, a = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]; "
               "s = socket.socket(f, k); s.connect(a); print(s.getsockname()[0])")
log = logging.getLogger(__name__)


def make_cluster(parameters: _t.Mapping, *, security, host: _t.Optional[str], scheduler_options: _t.Mapping, environment: _t.Mapping[str, str],
                 log_folder: str, state_file: str) -> Managed:
    """A cluster as the queue in ``parameters`` (those of the status file) asks for; no job is submitted before it is needed.

    ``security``: Dask's, with files that the nodes can read; ``host``: where the scheduler listens (None, or all: the address
    from which a node is reached); ``environment``: variables of the workers, such as PYTHONPATH; ``log_folder``: private, and
    visible on the nodes.  Raises ``ConfigurationError``, ``ServiceError``.
    """
    kind = str(parameters.get("type"))
    system = SYSTEMS[kind]()
    try:
        import dask                         # only a daskserver needs it
        import dask_jobqueue
    except ImportError as exc:
        raise ConfigurationError("a cluster of type '%s' needs dask-jobqueue on %s (%s): install it there with"
                                 " 'pip install seamless_lite[hpc]'" % (kind, os.uname().nodename, exc)) from None
    queue = parameters.get("queue") or {}
    found, notes = plan(parameters, system, environment, conda_python(queue.get("conda"), sys.executable))
    for note in notes:
        log.warning("defaults of the queue could not be found out: %s", note)
    log.info("each %s job: %d Dask workers with %d slots, %d cores, %d MiB, walltime %g s, new tasks for %g s",
             system.title, found.processes, found.threads, found.cores, found.memory >> 20, found.walltime_s, found.lifetime_s)
    state = QueueState(state_file)
    # What waits, waits at the scheduler and not at a worker; what was lost with its job is run once more.
    dask.config.set({"distributed.scheduler.worker-saturation": 1.0, "distributed.scheduler.allowed-failures": 1})
    dask.config.set(dotted(found.config))
    tag = "seamless-%s-%s" % (re.sub(r"[^A-Za-z0-9_]", "_", str(parameters.get("cluster") or kind))[:30], os.urandom(4).hex())
    options = {**found.options, "job_name": tag}
    security, keys = _in_files(security, os.path.join(log_folder, tag))
    if host in (None, "", "0.0.0.0", "::"):
        host = host_for_nodes(found.address) or host
    cls = getattr(dask_jobqueue, {"slurm": "SLURMCluster", "oar": "OARCluster"}[kind])
    try:
        cluster = cls(n_workers=0, security=security, protocol="tls://" if security is not None else "tcp://",
                      scheduler_options={"host": host, "dashboard_address": "127.0.0.1:0", **scheduler_options},
                      shared_temp_directory=log_folder, **options)
    except (RuntimeError, OSError, ValueError, TypeError) as exc:
        raise ServiceError("the Dask scheduler for %s could not be started: %s" % (system.title, exc)) from exc
    options.update(security=security, protocol="tls://" if security is not None else "tcp://")

    async def script(name, log_path):       # in the event loop, as dask_jobqueue's object makes a lock for it
        return job_script(cluster, options, name, with_lifetime(found), system, log_path)
    return Managed(cluster, found, system, tag, state, log_folder, lambda name, log_path: cluster.sync(script, name, log_path), keys)


def _in_files(security, prefix: str) -> _t.Tuple[_t.Any, _t.List[str]]:
    """``security`` with the worker's keys in files that begin with ``prefix``, instead of in its memory; and their paths."""
    if security is None:
        return None, []
    from distributed import Security
    worker, paths, changed = security.get_tls_config_for_role("worker"), [], {}
    for key, field in (("ca_file", "tls_ca_file"), ("cert", "tls_worker_cert"), ("key", "tls_worker_key")):
        if worker.get(key) and "\n" in worker[key]:
            path = changed[field] = "%s.%s.pem" % (prefix, key)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(worker[key])
            paths.append(path)
    own = {"tls_%s_%s" % (role, what): security.get_tls_config_for_role(role)[what]
           for role in ("scheduler", "client") for what in ("cert", "key")}
    return Security(**{**own, "require_encryption": True, **changed}) if paths else security, paths


def host_for_nodes(node: _t.Optional[str]) -> _t.Optional[str]:
    """Our address as it is seen from ``node``; None if that is not known."""
    if not node:
        return None
    try:
        family, kind, _, _, where = socket.getaddrinfo(node, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(where)             # sends nothing
            return sock.getsockname()[0]
    except OSError:
        return None


def job_script(cluster, options: _t.Mapping, name: str, lines: _t.Sequence[str], system, log_path: str) -> str:
    """The script of the job for the worker ``name``; ``lines`` come before all other commands."""
    quoted = log_path.replace("%", "%%") if system.kind == "slurm" else log_path
    output = (['--output="%s"' % quoted, "--open-mode=append"] if system.kind == "slurm" else
              ['-O "%s"' % quoted, '-E "%s"' % quoted])
    prologue = options["job_script_prologue"]
    options = {**options, "job_extra_directives": [*output, *options["job_extra_directives"]],
               "job_script_prologue": [*lines, *prologue]}
    scheduler = cluster.scheduler
    address = getattr(scheduler, "contact_address", None) or scheduler.address
    if options["security"] is not None:     # dask_jobqueue does not quote paths; and the clients that tasks make need them too
        keys = options.pop("security").get_tls_config_for_role("worker")
        config = {"distributed.comm.tls.%s.%s" % (role, what): keys[what] for role in ("worker", "client") for what in ("cert", "key")}
        config.update({"distributed.comm.tls.ca-file": keys["ca_file"], "distributed.comm.require-encryption": True})
        options["job_script_prologue"] += exports(as_variables(config))
    options["job_script_prologue"].append("SEAMLESS_JOB_HOST=$(%s -c '%s' %s)" % (
        options["python"], OWN_ADDRESS, shlex.quote(re.sub(r"^\w+://|:\d+$", "", address).strip("[]"))))
    options["worker_extra_args"] = [*options["worker_extra_args"], "--host", '"$SEAMLESS_JOB_HOST"']
    return cluster.job_cls(address, name=name, **options).job_script()
