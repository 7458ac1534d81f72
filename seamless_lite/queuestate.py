"""Which jobs a cluster has in the queue, on disk: so that the next start of any can cancel what a killed one left.

The jobs' name is written before the first of them is submitted, and the queue knows all jobs with that name.  Jobs
without their scheduler end by themselves, but those that wait in the queue would have to begin first.
"""
import contextlib
import glob
import json
import logging
import os
import shutil
import time
import typing as _t

from . import hostside
from .durable import remove_file
from .queuesystem import SYSTEMS, QueueError

FILE = "jobs.json"          # in the folder of a daskserver
KEEP_S = 7 * 86400.0
log = logging.getLogger(__name__)


class QueueState:
    """The file ``path``.  Making one cancels what a dead process left; what could not be cancelled, or is no business of
    ours, stays in the file."""

    def __init__(self, path: str):
        self.path = path
        self._left = [state for state in _read(path) if not _cancelled(state)]

    def save(self, tag: str, kind: str, ids: _t.Iterable[str]) -> None:
        """The jobs called ``tag`` in a system of this kind are ours."""
        pid = os.getpid()
        state = {"tag": tag, "system": kind, "node": os.uname().nodename, "pid": pid, "pid_started": hostside.identity(pid),
                 "ids": sorted(ids), "left": self._left}
        aside = "%s.%d.tmp" % (self.path, pid)
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)

    def end(self) -> None:
        """None of our jobs is left."""
        self._left = [state for state in self._left if not _cancelled(state)]
        if self._left:
            self.save("", "", ())
        else:
            remove_file(self.path)


def sweep(parent: str) -> None:
    """Cancel what dead clusters left in the queue, each with a folder in ``parent``, and remove the folders.

    Those of clusters that live, or on other hosts, stay; and for a while what else was left, such as the logs of jobs that failed.
    """
    for folder in glob.glob(os.path.join(glob.escape(parent), "*")):
        with contextlib.suppress(OSError):  # another one sweeps too
            states = _read(os.path.join(folder, FILE))
            if all([_cancelled(state) for state in states]) and (states or os.stat(folder).st_mtime < time.time() - KEEP_S):
                shutil.rmtree(folder, ignore_errors=True)


def _read(path: str) -> _t.List[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        return [*state.pop("left", ()), state]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        log.error("%s cannot be read, so jobs may be left in the queue: %s", path, exc)
        return []


def _cancelled(state: dict) -> bool:
    """Whether nothing is left of the jobs of ``state``."""
    make = SYSTEMS.get(str(state.get("system")))
    if make is None or not state.get("tag"):
        return True
    if state.get("node") != os.uname().nodename or hostside.alive(state):
        return False                        # somebody else's; or nobody can know from here whether it lives
    system = make()
    try:
        ids = sorted(system.jobs(state["tag"]))
        system.cancel(ids)
    except QueueError as exc:
        log.error("jobs of an earlier cluster may be left in the queue: %s", exc)
        return False
    if ids:
        log.warning("cancelled %d jobs that an earlier cluster left in the queue: %s", len(ids), " ".join(ids))
    return True
