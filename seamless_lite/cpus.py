"""How many CPUs this process may use."""
import os
import typing as _t


def usable_cpus(root: str = "/") -> int:
    """Affinity and the quotas of the control groups counted; at least 1.  ``root``: where the system's files are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in _cgroup_quotas(root):
        if quota > 0 and period > 0:
            count = min(count, -(-quota // period))
    return max(1, count)


def _cgroup_quotas(root: str) -> _t.Iterator[_t.Tuple[int, int]]:
    """(quota, period) of each control group, v1 or v2, that this process is in."""
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        v2 = number == "0" and not controllers
        if not v2 and "cpu" not in controllers.split(","):
            continue
        base = os.path.join(root, "sys/fs/cgroup" if v2 else "sys/fs/cgroup/cpu")
        while True:
            folder = base + path.rstrip("/")
            words = (_read(folder + "/cpu.max") if v2 else
                     _read(folder + "/cpu.cfs_quota_us") + " " + _read(folder + "/cpu.cfs_period_us")).split()
            if len(words) == 2 and words[0].lstrip("-").isdigit() and words[1].isdigit():
                yield int(words[0]), int(words[1])
            if path in ("", "/"):
                break
            path = os.path.dirname(path)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
