"""``Recorder``: what has ended, from the pool to those who wait for it.

    pool's done(outcome, log) -> put -> one commit for all that came while the last one was made -> tell

An outcome is told only after its row is committed; the bytes of the result were stored before, by the worker.
"""
import base64
import logging
import threading
import time
import typing as _t
from queue import Empty, SimpleQueue

from .errors import SeamlessError, error_to_dict
from .record import record_of
from .stores import Stores

_COLLECT_S = 0.005          # so long a commit waits for more, if much is to come
_BATCH = 1000
log = logging.getLogger(__name__)


class Ended(_t.NamedTuple):
    """``job`` has ``id``, ``scratch`` (the result's bytes were not stored), ``keep`` (but they shall be), ``fresh``
    (nothing is to be recorded) and ``again`` (a result was recorded before it ran); ``recording`` is set when these are looked at; ``log`` is whatever the pool calls the job's output, or None."""
    job: _t.Any
    outcome: dict
    log: _t.Any


class Recorder:
    """A thread that records and then calls ``tell`` with a list of ``Ended``.

    ``mode`` and ``target`` are what execution records say about where a job ran; with ``mode`` None the rows
    are written already, by somebody else.  ``many`` says whether more is to come soon.
    """

    def __init__(self, stores: Stores, mode: _t.Optional[str], target: _t.Optional[str],
                 tell: _t.Callable[[_t.List[Ended]], None], many: _t.Callable[[], bool]):
        self._stores, self._mode, self._target, self._tell, self._many = stores, mode, target, tell, many
        self._queue: "SimpleQueue[_t.Optional[Ended]]" = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="seamless-recorder", daemon=True)
        self._thread.start()

    def put(self, job, outcome: dict, log) -> None:
        """This job has ended; returns at once."""
        self._queue.put(Ended(job, outcome, log))

    def close(self) -> None:
        """Record what was put, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            batch = [self._queue.get()]
            if self._mode is not None and self._many():
                time.sleep(_COLLECT_S)      # many are queued: rather fewer commits than each at once
            while len(batch) < _BATCH:
                try:
                    batch.append(self._queue.get_nowait())
                except Empty:
                    break
            going = None not in batch
            ended = [item for item in batch if item is not None]
            try:
                self._commit(ended)
            except Exception as exc:        # whatever it is: who waits for these jobs must hear of it
                log.exception("%d results could not be recorded", len(ended))
                error = SeamlessError("the job ran, but its result could not be recorded: %s" % exc)
                ended = [item if "error" in item.outcome else item._replace(outcome={"error": error_to_dict(error)})
                         for item in ended]
            self._tell(ended)

    def _commit(self, ended: _t.List[Ended]) -> None:
        rows: _t.Dict[bool, list] = {False: [], True: []}
        for job, outcome, _ in ended:
            job.recording = True            # before ``keep`` is looked at: whoever comes now comes too late
            result = outcome.get("result")
            if result is not None:
                if job.scratch and job.keep and "buffer" in outcome:
                    self._stores.buffers.put(base64.b64decode(outcome["buffer"]))
                if self._mode is not None and not job.fresh:
                    rows[job.again].append((job.id, result, record_of(job.id, result, outcome.get("runtime", {}), self._mode, self._target)))
        for again in filter(rows.get, rows):
            self._stores.results.put_many(rows[again], again)
