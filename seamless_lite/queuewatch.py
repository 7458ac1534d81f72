"""``QueueWatch``: tells the person at the terminal what jobs wait for that a cluster has not begun.

    seamless_lite: waiting: 2 SLURM jobs pending (Resources), 40 tasks waiting

Nothing is asked in the first seconds, or if stderr is no terminal; a line is written when it is another one.
"""
import threading
import typing as _t

from .errors import SeamlessError
from .progress import is_watched, line

FIRST_S = 3.0
AGAIN_S = 3.0


class QueueWatch:
    """``client()`` is that of the server, or None; ``who`` begins the lines, None: there are none.

    ``begin`` and ``end`` are called for each job, or ``with`` is used; a thread looks while there are jobs.
    """

    def __init__(self, client: _t.Callable[[], _t.Any], who: _t.Optional[str]):
        self._client, self._who = client, who if who is not None and is_watched() else None
        self._changed = threading.Condition()
        self._jobs = 0
        self._thread: _t.Optional[threading.Thread] = None
        self._told: _t.Optional[tuple] = None

    def begin(self) -> None:
        """One job more waits."""
        if self._who is None:
            return
        with self._changed:
            self._jobs += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="seamless-queue", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """One job less."""
        if self._who is None:
            return
        with self._changed:
            self._jobs -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """No job waits any more."""
        with self._changed:
            self._jobs = 0
            self._changed.notify_all()

    def __enter__(self):
        self.begin()

    def __exit__(self, *_exc):
        self.end()

    def _look(self) -> None:
        """The thread: ends when there are no jobs, or the server has no queue to tell of."""
        pause_s = FIRST_S
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._jobs <= 0, pause_s):
                    self._thread = None
                    return
            client = self._client()
            try:
                cluster = client.info().get("cluster") if client is not None else {}
            except SeamlessError:
                cluster = {}                # whoever waits for the jobs will say it
            if cluster is None:             # a jobserver: its jobs run at once, or soon
                return
            self._tell(cluster)
            pause_s = AGAIN_S

    def _tell(self, cluster: _t.Mapping[str, _t.Any]) -> None:
        """Say what is waited for, if it is something else than before: not just another number of tasks."""
        state = tuple(cluster.get(name) for name in ("pending_jobs", "running_jobs", "reason"))
        waits = cluster.get("pending_jobs") or cluster.get("workers") == 0
        if waits and cluster.get("sentence") and state != self._told:
            self._told = state
            line("%s: waiting: %s" % (self._who, cluster["sentence"]))
