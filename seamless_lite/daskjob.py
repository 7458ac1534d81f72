"""What each Dask worker does because it lives in a job of SLURM or OAR: it knows when the job ends.

The job's script says when it began (by the node's own clock), how long it may last and until when new tasks
are welcome; the worker tells the scheduler with every heartbeat how much of both is left.  ``seamless_drain`` is
what the scheduler calls when a worker shall take no more tasks; ``is_too_late`` is what a task asks.  distributed's own ``--lifetime``
does not do: it gives up the tasks that are running.  Shortly before the end of the job the worker closes; what runs
then is run again elsewhere.

Loaded by ``dask worker --preload``, so the name ``dask_setup`` is Dask's.
"""
import asyncio
import logging
import os
import time

END_S = 10.0                # so long before its walltime the job ends by itself
GRACE_S = 2.0               # between a decision and a task's beginning
FRESH_S = 60.0              # the first task of a worker that has just come is always welcome
_CLOSE_S = 5.0
LIFE, END = "seamless_life_s", "seamless_end_s"
log = logging.getLogger(__name__)
_ends = {}                  # LIFE and END -> when, on the monotonic clock; empty if there is no such limit, or this is no job
_fresh_until_s = 0.0


def left_s(name: str, environ=os.environ) -> float:
    """Seconds until ``SEAMLESS_JOB_<name>`` after the beginning of the job; infinite if the job has no such limit."""
    limit = environ.get("SEAMLESS_JOB_" + name)
    return float(limit) - (time.time() - float(environ["SEAMLESS_JOB_BEGAN"])) if limit else float("inf")


async def dask_setup(worker):
    """Called by Dask when the worker starts, before it registers."""
    global _fresh_until_s
    now = time.monotonic()
    for name, variable in ((LIFE, "LIFETIME"), (END, "END")):
        if left_s(variable) != float("inf"):
            _ends[name] = end = now + left_s(variable)
            worker.metrics[name] = lambda _worker, end=end: end - time.monotonic()
    _fresh_until_s = now + FRESH_S

    async def drain():
        """Take no more tasks; returns the keys of those that wait here, and would never be run."""
        _close_the_door(worker)
        return {"waiting": [task.key for task in worker.state.tasks.values() if task.state in ("ready", "constrained", "waiting")]}

    worker.handlers["seamless_drain"] = drain
    if END in _ends:
        asyncio.get_running_loop().call_later(max(0.0, _ends[END] - now), _end, worker)


def refusal(limit_s, end_s=None):
    """Why a task with this time limit can never run in jobs that end after ``end_s`` (None: as this one does); None if it can."""
    if end_s is None:
        end_s = float(os.environ.get("SEAMLESS_JOB_END") or "inf")
    if limit_s is None or limit_s + GRACE_S <= end_s:
        return None
    return "it may take %g s, but the jobs of this queue end after %g s: raise 'walltime', or lower the limit" % (limit_s, end_s)


def is_too_late(worker, limit_s=None) -> bool:
    """Whether a task that begins now, and may take ``limit_s``, should ``raise Reschedule()``: the job ends too soon for it.

    Then the worker gets no more tasks.  To be called in the worker's event loop.
    """
    global _fresh_until_s
    now = time.monotonic()
    late = now > _ends.get(LIFE, now) or limit_s is not None and now + limit_s > _ends.get(END, float("inf"))
    if late and now < _fresh_until_s:
        late = False                # elsewhere it would be no better, and so it would go round for ever
    _fresh_until_s = 0.0
    if late:
        _close_the_door(worker)
    return late


def _close_the_door(worker) -> None:
    from distributed.core import Status     # this process is Dask's
    if worker.status in (Status.running, Status.paused):
        worker.status = Status.closing_gracefully       # "paused" would be undone by the memory monitor


def _end(worker) -> None:
    log.warning("the walltime of the job is reached: the tasks that are running are given up")
    _end.task = asyncio.ensure_future(_exit(worker))        # or it may be collected


async def _exit(worker):
    """End at once: for the scheduler a worker that died, so that a task which is always too long is not tried for ever."""
    try:
        if worker.nanny:
            # or it would start another one
            await asyncio.wait_for(worker.rpc(worker.nanny).close_gracefully(reason="walltime"), _CLOSE_S)
    except (OSError, asyncio.TimeoutError) as exc:
        log.warning("the nanny does not answer: %s", exc)
    finally:
        logging.shutdown()
        os._exit(0)
