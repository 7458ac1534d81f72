"""``Managed``: the jobs of SLURM or OAR in which the workers of one Dask cluster live.

How many there are is decided in one thread that looks at the scheduler several times a second.  distributed's own ``Adaptive``
does not do: it never learns that a job died before its worker came, counts a lost job as present, lets go of
tasks that run in a worker at the end of its lifetime, and asks for a job for every long task, however many run in one.

    look (tasks that wait, slots) -> jobs in the queue (squeue, every few seconds) -> what ended, and how
    -> workers near the end of their lifetime take no more tasks -> idle jobs end -> as many new ones as are needed

All jobs of a cluster have one name that no other has, which ``QueueState`` keeps.
"""
import logging
import math
import os
import threading
import time
import typing as _t

from .daskjob import END, GRACE_S, LIFE, refusal
from .durable import remove_file
from .queuescript import Plan
from .queuestate import QueueState
from .queuesystem import ENDING, PENDING, RUNNING, Listed, QueueError

PREFIX = "seamless"         # so Dask calls all tasks whose names are those of jobs
LOOK_S = 0.2
ASK_S = (1.0, 10.0)         # how often the queue is listed: at first, and when nothing has changed for a while
IDLE_S = 5.0                # a job without tasks is kept so long
LOST_S = 15.0               # a running job whose worker is gone is given up after this
PATIENCE_S = 60.0           # a queueing system that does not answer is asked again for so long
RETRY_S = 3.0
REFUSED_S = 30.0            # with jobs at work, a refusal to take one more is no failure, and is tried again after this
QUICK_FAILURES = 3
TAIL_BYTES = 2000
REMEMBERED = 200
log = logging.getLogger(__name__)


class Job:
    """A job that we submitted.  Times are monotonic."""

    def __init__(self, name: str, id: str, workers: _t.Collection[str], log_path: str, script: str):
        self.name, self.id, self.workers, self.log_path, self.script = name, id, frozenset(workers), log_path, script
        self.submitted_s = time.monotonic()
        self.listed = Listed(PENDING, "")
        self.connected = False                      # a worker of it has been seen
        self.useful = False                         # a worker of it has had a task
        self.seen_s = self.submitted_s              # when a worker was last seen, or it began to run
        self.busy_s = self.submitted_s              # when it last had a task
        self.draining = False
        self.end_s = math.inf                       # when it ends by itself because of its walltime
        self.closing_s: _t.Optional[float] = None   # when we told it to end
        self.ended: _t.Optional[str] = None         # how; "" if nobody knows yet


class Worker(_t.NamedTuple):
    """A Dask worker as the scheduler saw it."""
    address: str
    name: str
    threads: int
    tasks: int
    data: int
    draining: bool
    life_s: float
    end_s: float


class View(_t.NamedTuple):
    """The scheduler at one moment.  ``slots``: how many would do all tasks within the target duration."""
    workers: _t.Sequence[Worker]
    waiting: int
    slots: int
    longest_s: float        # the largest time limit among the waiting tasks
    usual_s: float          # how long our tasks have taken so far, in the mean; 0 if that is not known


class Managed:
    """A Dask cluster whose workers live in jobs.  Safe from several threads.

    ``cluster`` is dask_jobqueue's, ``slots`` what one Dask worker runs at a time.  Whoever submits tasks may
    set ``limits[key]`` to a task's time limit in seconds: it goes to no worker that ends sooner.  ``on_failure`` is called
    with a sentence, from our thread, when there will be no jobs: then the tasks that wait wait in vain.
    ``script_of(name, log)`` is the script of the job for the worker ``name``; ``files`` are removed at the end.
    """

    def __init__(self, cluster, plan: Plan, system, tag: str, state: QueueState, folder: str, script_of: _t.Callable[[str, str], str],
                 files: _t.Sequence[str] = ()):
        self.cluster, self.plan, self.system, self.tag = cluster, plan, system, tag
        self.slots, self.folder = plan.threads, folder
        self.limits: _t.Dict[str, float] = {}
        self.on_failure: _t.Callable[[str], None] = log.error
        self._state, self._script_of, self._files = state, script_of, files
        self._jobs: _t.Dict[str, Job] = {}                  # alive, by id
        self._past: _t.Dict[str, Job] = {}                  # by the name of a worker
        self._names: _t.Dict[str, str] = {}                 # worker address -> name
        self._serial, self._quick, self._asked_s, self._changed_s = 0, 0, 0.0, time.monotonic()
        self._wait_until_s = 0.0                            # no submission before
        self._trouble: _t.Optional[str] = None
        self._trouble_s, self._failed = 0.0, False
        self._said = describe_nothing(system)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="seamless-queue", daemon=True)
        self._save()
        self._thread.start()

    # --- for others -----------------------------------------------------------------------------------

    def describe(self) -> dict:
        """For GET /info: workers, pending_jobs, running_jobs, reason, waiting_tasks, sentence.  Does not block."""
        return self._said

    def tend(self) -> None:
        """It looks after itself."""

    def refuses(self, limit_s: _t.Optional[float]) -> _t.Optional[str]:
        """Why a task with this time limit can never run here; None if it can."""
        return refusal(limit_s, self.plan.end_s)

    def epitaph(self, worker: str, wait_s: float = 5.0) -> _t.Optional[str]:
        """How the job ended in which the worker with this name or address lived, as a clause; None if it lives.

        Waits for the queueing system to say so; not to be called in the event loop.
        """
        name = self._names.get(worker, worker)
        deadline = time.monotonic() + wait_s
        while True:
            job = self._past.get(name)
            if job is None:
                return None
            how = job.ended or self._how(job)
            if how:
                job.ended = how
                return "was in %s job %s, which %s" % (self.system.title, job.id, how)
            if time.monotonic() > deadline:
                return None
            self._asked_s = 0.0
            time.sleep(0.2)

    def close(self) -> None:
        """End all jobs and the scheduler.  May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(10)
        try:
            self.system.cancel(sorted({*self._jobs, *self.system.jobs(self.tag)}))
            if not self._thread.is_alive():     # else it may be submitting one more
                self._state.end()
        except QueueError as exc:
            log.error("jobs may be left in the queue; the next start cancels them: %s", exc)
        try:
            self.cluster.close(timeout=10)
        except Exception as exc:            # of whatever kind: the jobs are gone, and so shall we be
            log.warning("the scheduler did not close in order: %s: %s", type(exc).__name__, exc)
        ours = [job for job in list(self._past.values()) if job.useful or job.id in self._jobs]  # the others' logs say why they failed
        for path in sum(([job.script, job.log_path] for job in ours), list(self._files)):
            remove_file(path)

    # --- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self.step()
            except QueueError as exc:
                self._in_trouble(str(exc), passing=True)
            except Exception as exc:        # a full disk, a defect of ours; whoever waits must hear of it
                if not self._stopping.is_set():
                    log.exception("looking after the jobs failed")
                    self._in_trouble("looking after the jobs failed: %s: %s" % (type(exc).__name__, exc), passing=True)
                    self._stopping.wait(RETRY_S)

    def step(self) -> None:
        """Look at everything once, and do what is to be done."""
        view = self.cluster.sync(self._look, callback_timeout=30)
        now = time.monotonic()
        self._ask_queue(view, now)
        self._meet(view, now)
        self._bury(view, now)
        self._drain(view)
        self._let_go(view, now)
        self._grow(view, now)
        self._said = self._describe(view)

    async def _look(self) -> View:
        scheduler, target_s = self.cluster.scheduler, self.plan.target_s
        workers, stacked, work_s = [], 0, 0.0
        for state in scheduler.workers.values():
            busy = [task for task in state.processing if task not in state.long_running]       # the others hold no slot
            stacked += max(0, len(busy) - state.nthreads)
            for task in busy[:state.nthreads]:
                past_s, usual_s = state.executing.get(task, 0.0), self._usual_s(task)
                # A task that takes longer than others is expected to take as long again.
                work_s += min(target_s, max(past_s, usual_s - past_s))
            since_s = time.time() - state.last_seen
            life_s, end_s = (state.metrics.get(key, math.inf) - since_s for key in (LIFE, END))
            self._names[state.address] = str(state.name)
            workers.append(Worker(state.address, str(state.name), state.nthreads, len(state.processing), len(state.has_what),
                                  state.status.name == "closing_gracefully", life_s, end_s))
        waiting = [*scheduler.queued, *scheduler.unrunnable]
        sample = [self._usual_s(task) for task in waiting[:200]]
        usual_s = sum(sample) / len(sample) if sample else self.plan.unknown_s
        work_s += min(target_s, usual_s) * (len(waiting) + stacked)
        limits = [self.limits.get(task.key, 0.0) for task in waiting] if self.limits else []
        ours = scheduler.task_prefixes.get(PREFIX)
        return View(workers, len(waiting) + stacked, math.ceil(work_s / target_s), max(limits, default=0.0),
                    max(0.0, ours.duration_average) if ours is not None else 0.0)

    def _usual_s(self, task) -> float:
        """How long tasks like this one have taken."""
        mean_s = task.prefix.duration_average if task.prefix is not None else -1
        return self.plan.unknown_s if mean_s < 0 else mean_s

    def _ask_queue(self, view: View, now: float) -> None:
        """List the jobs in the queue, if it is time to."""
        quiet_s = now - self._changed_s
        known = {name for job in self._jobs.values() for name in job.workers}
        nothing = not self._jobs and all(worker.name in known for worker in view.workers)
        if nothing or now < self._asked_s + min(ASK_S[1], max(ASK_S[0], quiet_s / 10)):
            return
        self._asked_s = now
        listed = self.system.jobs(self.tag)
        self._asked_s = now = time.monotonic()
        for id in sorted(set(listed) - set(self._jobs)):
            if listed[id].state != ENDING:      # sbatch had been given up, or squeue did not list it once
                log.warning("the job %s is in the queue although it should not be: it is cancelled", id)
                self.system.cancel([id])
        for job in list(self._jobs.values()):
            state = listed.get(job.id)
            if state is None and now - job.submitted_s < ASK_S[0] * 2:
                continue                    # a busy controller lists it a little later
            if state is not None and state != job.listed:
                if state.state == RUNNING and job.listed.state == PENDING:
                    job.seen_s = now
                job.listed, self._changed_s = state, now
            if state is None or state.state == ENDING:
                job.ended = job.ended or ""
        if self._trouble is not None and self._wait_until_s <= now:
            self._trouble = None

    def _meet(self, view: View, now: float) -> None:
        """Note which jobs have workers, and tasks."""
        seen = {worker.name: worker for worker in view.workers}
        for job in self._jobs.values():
            own = [seen[name] for name in job.workers if name in seen]
            if own:
                if not job.connected:
                    job.connected, job.listed, job.busy_s, self._changed_s = True, Listed(RUNNING, ""), now, now
                job.seen_s, job.end_s = now, now + min(worker.end_s for worker in own)
                if any(worker.tasks for worker in own):
                    job.busy_s, job.useful = now, True
                    self._quick, self._trouble = 0, None
            elif job.connected and now - job.seen_s < 1.0:
                self._asked_s = 0.0         # its worker has just gone: the queue knows more

    def _bury(self, view: View, now: float) -> None:
        """Forget jobs that have ended; a failure that repeats is told."""
        for job in list(self._jobs.values()):
            if job.ended is None and job.connected and job.closing_s is None and now - job.seen_s > LOST_S:
                log.warning("the worker in job %s is gone, and the job is not: it is cancelled", job.id)
                self._cancel([job], now)
                job.ended = "was given up, because its worker could not be reached any more"
            if job.ended is None and job.closing_s is not None and now - job.closing_s > LOST_S:
                self._cancel([job], now)    # once more
            if job.ended is None:
                continue
            del self._jobs[job.id]
            self._changed_s = now
            self._save()
            remove_file(job.script)
            if job.useful or job.closing_s is not None:
                if job.closing_s is not None:
                    remove_file(job.log_path)
                continue
            self._quick += 1
            how = job.ended = job.ended or self._how(job) or "ended"
            sentence = "%s job %s %s before it had a task; %s" % (self.system.title, job.id, how, _last_words(job.log_path))
            log.warning("%s", sentence)
            self._wait_until_s = now + min(self._quick, REFUSED_S)
            if self._quick >= QUICK_FAILURES and not any(job.connected for job in self._jobs.values()):
                self._fail("%d jobs in a row failed at once: the last one, %s" % (self._quick, sentence))

    def _how(self, job: Job) -> _t.Optional[str]:
        how = self.system.ending(job.id, _tail(job.log_path))
        if how and how.startswith("ended") and job.seen_s > job.end_s - GRACE_S:
            return "reached its walltime of %s" % self.plan.options["walltime"]        # just before, and so in good order
        return how

    def _drain(self, view: View) -> None:
        """Workers that end too soon for new tasks get none, and hand back those that have not begun."""
        useful = {name for job in self._jobs.values() if job.useful for name in job.workers}
        for worker in view.workers:
            # Who has just come is kept for the first task, however long tasks usually are: the next one would be no better.
            usual_s = view.usual_s if worker.name in useful or worker.end_s < self.plan.end_s / 2 else 0.0
            late = not worker.draining and (worker.life_s <= 0 or worker.end_s < max(view.longest_s, usual_s) + GRACE_S)
            if late:
                log.info("worker %s takes no more tasks: its job ends in %.0f s", worker.name, worker.end_s)
            if late or worker.draining and worker.tasks:        # one more may have been on its way
                self.cluster.sync(self._drain_worker, worker.address, callback_timeout=30)

    async def _drain_worker(self, address: str) -> None:
        scheduler = self.cluster.scheduler
        state = scheduler.workers.get(address)
        if state is None:
            return
        try:
            answer = await scheduler.rpc(address).seamless_drain()
        except (OSError, AttributeError) as exc:        # it is gone, or not one of ours
            log.warning("the worker %s cannot be told to take no more tasks: %s", address, exc)
            return
        back = {key: "released" for key in answer["waiting"] if key in scheduler.tasks and scheduler.tasks[key].processing_on is state}
        if back:
            # There is no public way to give a task to another worker; this is what distributed does for ``raise Reschedule``.
            scheduler.transitions(back, stimulus_id="seamless-drain-%s" % time.time())

    def _let_go(self, view: View, now: float) -> None:
        """End jobs that are not needed."""
        seen = {worker.name: worker for worker in view.workers}
        spare = len(self._jobs) - self.plan.minimum
        for job in sorted(self._jobs.values(), key=lambda job: -job.submitted_s):
            own = [seen[name] for name in job.workers if name in seen]
            job.draining = bool(own) and all(worker.draining for worker in own)
            if job.closing_s is not None or any(worker.tasks for worker in own):
                continue
            idle = view.waiting == 0 and now - job.busy_s >= IDLE_S and spare > 0
            others = any(not worker.draining for worker in view.workers if worker.name not in job.workers)
            if any(worker.data for worker in own) and not others:
                continue                    # results that somebody holds, and nobody else to take them
            if idle or job.draining:
                spare -= 1
                if own:
                    job.closing_s = now
                    if not self.cluster.sync(self._retire, [worker.address for worker in own], callback_timeout=60):
                        job.closing_s = None
                else:
                    self._cancel([job], now)

    async def _retire(self, addresses: _t.List[str]) -> bool:
        """Close idle workers, after their data has moved; False if one has got a task meanwhile, which then is its last."""
        scheduler = self.cluster.scheduler
        for address in addresses:
            await self._drain_worker(address)
        states = [scheduler.workers[address] for address in addresses if address in scheduler.workers]
        if any(state.processing for state in states):
            return False
        await scheduler.retire_workers(workers=[state.address for state in states], close_workers=True, remove=True)
        return True

    def _cancel(self, jobs: _t.Sequence[Job], now: float) -> None:
        for job in jobs:
            job.closing_s = now
        self.system.cancel([job.id for job in jobs])

    def _grow(self, view: View, now: float) -> None:
        """Submit as many jobs as are needed and allowed."""
        seen = {worker.name for worker in view.workers}
        there = sum(worker.threads for worker in view.workers if not worker.draining)
        there += self.plan.slots * sum(job.closing_s is None and not job.workers & seen for job in self._jobs.values())
        if self._failed and not view.waiting:
            self._failed, self._wait_until_s = False, 0.0
        wanted = math.ceil(max(0, view.slots - there) / self.plan.slots) if view.waiting else 0
        wanted = max(wanted, self.plan.minimum - len(self._jobs))
        for _ in range(min(wanted, self.plan.maximum - len(self._jobs))):
            if time.monotonic() < self._wait_until_s or self._stopping.is_set() or not self._submit():
                break

    def _submit(self) -> bool:
        self._serial += 1
        name = "%s-%d" % (self.tag, self._serial)
        path = os.path.join(self.folder, name)
        with open(os.open(path + ".sh", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o700), "w", encoding="utf-8") as file:
            file.write(self._script_of(name, path + ".log"))
        workers = [name] if self.plan.processes == 1 else ["%s-%d" % (name, n) for n in range(self.plan.processes)]
        try:
            id = self.system.submit(path + ".sh")
        except QueueError as exc:
            remove_file(path + ".sh")
            self._in_trouble(str(exc), exc.passing)
            return False
        if self._stopping.is_set():         # ``close`` did not wait for us
            self.system.cancel([id])
        job = Job(name, id, workers, path + ".log", path + ".sh")
        self._jobs[id], self._changed_s, self._trouble = job, time.monotonic(), None
        for worker in workers:
            self._past[worker] = job
        for old in list(self._past)[:-REMEMBERED]:
            if self._past[old].id not in self._jobs:
                forgotten = self._past.pop(old)
                if forgotten.useful:
                    remove_file(forgotten.log_path)
        log.info("submitted job %s for worker %s", id, name)
        self._save()
        return True

    # --- trouble ----------------------------------------------------------------------------------------

    def _in_trouble(self, words: str, passing: bool) -> None:
        """The queueing system refused, or did not answer.  With jobs at work that is no reason to give up."""
        now = time.monotonic()
        if self._trouble is None:
            self._trouble_s = now
        self._trouble = words
        log.warning("%s", words)
        self._wait_until_s = now + (RETRY_S if passing or not self._jobs else REFUSED_S)
        if not any(job.connected for job in self._jobs.values()) and (not passing and not self._jobs or now - self._trouble_s > PATIENCE_S):
            self._fail("%s refuses the job: %s" % (self.system.title, words) if not passing else
                       "%s has not taken a job for %g s: %s" % (self.system.title, PATIENCE_S, words))

    def _fail(self, sentence: str) -> None:
        self._quick, self._trouble, self._trouble_s = 0, sentence, time.monotonic()
        self._wait_until_s = self._trouble_s + REFUSED_S        # or until these tasks are gone
        self._failed = True
        jobs = [job for job in self._jobs.values() if not job.connected and job.closing_s is None]
        try:
            self._cancel(jobs, time.monotonic())
        finally:
            self.on_failure(sentence)

    # --- telling ------------------------------------------------------------------------------------------

    def _describe(self, view: View) -> dict:
        jobs = [job for job in self._jobs.values() if job.closing_s is None and job.ended is None]
        pending = [job for job in jobs if job.listed.state == PENDING]
        reasons = [job.listed.reason for job in pending if job.listed.reason not in ("", "None")]
        reason = max(set(reasons), key=reasons.count) if reasons else None
        parts = []
        for n, state in ((len(pending), "pending"), (len(jobs) - len(pending), "running")):
            if n:
                parts.append("%d %s job%s %s%s" % (n, self.system.title, "" if n == 1 else "s", state,
                                                 " (%s)" % reason if state == "pending" and reason else ""))
        parts = parts or ["no %s jobs" % self.system.title]
        trouble = self._trouble if view.waiting else None
        if view.waiting:
            parts.append("%d task%s waiting" % (view.waiting, "" if view.waiting == 1 else "s"))
        if trouble is not None:
            parts.append(trouble)
        return {"workers": len(view.workers), "pending_jobs": len(pending), "running_jobs": len(jobs) - len(pending),
                "reason": reason or trouble, "waiting_tasks": view.waiting, "sentence": ", ".join(parts)}

    def _save(self) -> None:
        self._state.save(self.tag, self.system.kind, self._jobs)


def describe_nothing(system) -> dict:
    """What ``describe`` says before the first look."""
    return {"workers": 0, "pending_jobs": 0, "running_jobs": 0, "reason": None, "waiting_tasks": 0, "sentence": "no %s jobs" % system.title}


# --- small ---------------------------------------------------------------------------------------------------

def _tail(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_words(path: str) -> str:
    lines = [line for line in _tail(path).splitlines() if line.strip()][-12:]
    return "its log %s ends:\n%s" % (path, "\n".join(lines)) if lines else "it wrote no log (%s): can the nodes see that folder?" % path
