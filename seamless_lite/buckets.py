"""What a full execution record says of the machine and of the software on it: "buckets", buffers that many records name.

    node         the machine: processors, memory, operating system
    environment  Python, its packages, and the variables on which programs depend
    node_env     the checksums of both

They hold nothing but what they describe, so the same machine and software give the same three buffers each time.
The forms are those of Seamless 1.x; what only its checks of a cluster need is left out.
"""
import functools
import os
import socket
import sys
import threading
import time
import typing as _t

from .celltypes import plain_dumps
from .checksum import Checksum
from .cpus import usable_cpus
from .transformation import Job

_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHASHSEED", "LANG", "LC_ALL", "TZ", "CONDA_PREFIX",
              "CONDA_DEFAULT_ENV", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_started = time.time()
_counter, _lock = [0], threading.Lock()


def details(job: Job, buffers, started_s: float, output_bytes: int) -> _t.Dict[str, object]:
    """What only the process knows that has just run ``job``: for ``record.record_of``.  The buckets are stored in ``buffers``."""
    names, labels, contents, tokens = _probe()
    buffers.put_many(contents)
    with _lock:
        _counter[0] += 1
        count = _counter[0]
    meta, recipe = job.meta, job.recipe
    inputs = [checksum for name, (_, _, checksum) in recipe.pins.items() if name != "code" and checksum is not None]
    return _clean({
        **names, "freshness": {"required_bucket_labels": labels, "required_bucket_checksums": names, "live_tokens": tokens,
                               "bucket_tokens": tokens},
        "execution_envelope": {
            "scratch": meta.scratch, "allow_input_fingertip": True, "language_kind": recipe.language,
            "resolved_env_checksum": str(Checksum.of(plain_dumps(dict(meta.environment)))) if meta.environment else None,
            "active_tf_dunder_keys": (["__env__"] if meta.environment else []) + sorted("META__" + name for name in meta.metavars)},
        "started_at": _iso(started_s), "finished_at": _iso(time.time()),
        "input_total_bytes": sum(length or 0 for length in buffers.lengths(inputs)), "output_total_bytes": output_bytes,
        "hostname": socket.gethostname(), "pid": os.getpid(), "process_started_at": _iso(_started),
        "process_create_time_epoch": round(_started, 2), "worker_execution_index": count})


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@functools.lru_cache(maxsize=1)
def _probe() -> _t.Tuple[_t.Dict[str, str], _t.Dict[str, str], _t.List[bytes], _t.Dict[str, object]]:
    """(checksums, labels, contents, what changes when they may have changed) of the buckets; all but the contents by kind."""
    import sysconfig                        # these are for those who want full records
    host, prefix = socket.gethostname(), "python:" + sys.prefix
    node, environment = _bucket("node", host, _node()), _bucket("environment", prefix, _environment())
    names = {"node": str(Checksum.of(node)), "environment": str(Checksum.of(environment))}
    both = "%(node)s:%(environment)s" % names
    node_env = _bucket("node_env", both, {"node_checksum": names["node"], "environment_checksum": names["environment"]})
    tokens: _t.Dict[str, object] = {
        "node": {"hostname": host, "boot_id": _text("/proc/sys/kernel/random/boot_id").strip() or None},
        "environment": {"sys_prefix": sys.prefix, "purelib_mtime_ns": _mtime_ns(sysconfig.get_path("purelib"))}}
    tokens["node_env"] = dict(tokens)
    names["node_env"] = str(Checksum.of(node_env))
    return names, {"node": host, "environment": prefix, "node_env": both}, [node, environment, node_env], tokens


def _bucket(kind: str, label: str, content: _t.Mapping[str, object]) -> bytes:
    return plain_dumps(_clean({"schema_version": 1, "bucket_kind": kind, "label": label, "contract_ok": True, "contract_violations": [],
                        "validation_snapshot": None, **content}))


def _node() -> _t.Dict[str, object]:
    import platform
    cpu = dict(line.replace("\t", "").split(":", 1) for line in _text("/proc/cpuinfo").split("\n\n")[0].splitlines() if ":" in line)
    memory = [line.split() for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    release = dict(line.split("=", 1) for line in _text("/etc/os-release").splitlines() if "=" in line)
    return {"hostname": socket.gethostname(),
            "platform": dict(zip(("system", "node", "release", "version", "machine", "processor"), platform.uname())),
            "os": {"byteorder": sys.byteorder, "libc": list(platform.libc_ver()), "python_build": list(platform.python_build()),
                   "python_compiler": platform.python_compiler()},
            "distribution": {name: value.strip("\"'") for name, value in release.items()},
            "cpu": {"model_name": cpu.get("model name", "").strip() or None, "flags": cpu.get("flags", "").split(),
                    "logical_cores": os.cpu_count(), "affinity_cores": usable_cpus()},
            "memory_total_bytes": int(memory[0][1]) * 1024 if memory else None}


def _environment() -> _t.Dict[str, object]:
    import importlib.metadata
    import locale
    import platform
    script = os.path.dirname(os.path.abspath(sys.argv[0]))      # on the path, but of the program and not of the environment
    packages = {(dist.metadata["Name"] or "", dist.version or "") for dist in importlib.metadata.distributions()}
    return {"python": {"executable": sys.executable, "implementation": platform.python_implementation(), "prefix": sys.prefix,
                       "version": platform.python_version(), "path": [path for path in dict.fromkeys(sys.path) if os.path.isabs(path) and path != script]},
            "python_packages": [{"name": name, "version": version} for name, version in sorted(packages)],
            "environment_variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "conda_env_export": None, "docker_image": None, "timezone": list(time.tzname),
            "locale": {"preferred_encoding": locale.getpreferredencoding(False)}}


def _clean(value):
    """``value``, JSON-able, with a ``?`` in its texts for every byte that is not UTF-8, which plain JSON cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(path: str) -> str:
    """The content of a file of the system; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _mtime_ns(path: str) -> _t.Optional[int]:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
