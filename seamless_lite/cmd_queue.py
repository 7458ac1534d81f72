"""``seamless-queue`` runs what ``seamless-run --qsubmit`` has queued; ``seamless-queue-finish`` has it end, and waits.

    queue file --update--> submissions --ready (all that they wait for has ended)--> Session.submit_many
        --outcome--> result files written --> ENDED in the queue file

Whatever is not noted as ended is run by the next queue; what had a result by then is answered from the cache.
"""
import argparse
import contextlib
import itertools
import json
import os
import queue as queue_module
import sys
import threading
import time
import types
import typing as _t

from . import commandline, outputs, program
from .celltypes import plain_dumps
from .checksum import Checksum, is_checksum
from .confirm import size_of
from .cpus import usable_cpus
from .dunders import execution_meta
from .errors import SeamlessError, ServiceError
from .inputs import readable
from .leases import RENEW_S
from .progress import size_text
from .queuefile import POLL_S, QueueFile, Submission
from .script import Target
from .session import Request, Session
from .transformation import Outcome, Recipe

QUEUE, FINISH = "seamless-queue", "seamless-queue-finish"
APPEAR_S = 10.0             # a queue that was started just before seamless-queue-finish is there by then
MOST = 10_000               # commands that are sent to a cluster at the same time
ENVIRONMENT = "  SEAMLESS_QUEUE_FILE (.seamless-queue): the queue file; QUEUE.LOCK and QUEUE.RUNNING stand beside it"


def queue(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """The program ``seamless-queue``; returns its exit code."""
    parser = commandline.make_parser(
        QUEUE, "Run the commands that seamless-run --qsubmit has queued, many at a time, until seamless-queue-finish is called.\n"
        "A command that uses a result of another one in the queue runs after it.\n"
        "After an interruption (Ctrl-C, a crash) start it again: what has ended is not run again, the rest has stayed queued.",
        "0 all commands have a result; 1 some failed, or a service is down",
        ["seamless-queue --workers 4 &", "seamless-run --qsubmit -c 'sort a.txt > sorted.txt'",
         "seamless-run --qsubmit -c 'uniq sorted.txt > unique.txt'", "seamless-queue-finish"], ENVIRONMENT)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--workers", type=_positive, metavar="N",
                        help="commands that run at the same time (default: as many as CPUs here; all, if a cluster runs them)")
    return commandline.run(parser, argv, lambda arguments: _Queue(arguments).run())


def queue_finish(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """The program ``seamless-queue-finish``; returns its exit code."""
    parser = commandline.make_parser(
        FINISH, "Have seamless-queue end when it has run all that is queued, and wait for that.",
        "0 all commands have a result; 1 some failed, or no queue is running", ["seamless-queue-finish && echo all is done"], ENVIRONMENT,
        configured=False)
    return commandline.run(parser, argv, lambda arguments: _finish())


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("'%s' is not a number of commands, 1 or more" % text)
    return int(text)


def _finish() -> int:
    file = QueueFile(os.environ, os.getcwd())
    end = time.monotonic() + APPEAR_S
    file.update()
    existed = bool(file.submissions)
    if existed and not file.eof:
        file.append({"queue_command": "EOF"})
    while not file.is_held():
        if existed and not os.path.exists(file.path):
            return _report(file)                # a short one, or one of Seamless 1.x
        if time.monotonic() > end:
            file.update()
            raise SeamlessError("no seamless-queue is running on %s, so nobody runs the %d commands in it; start seamless-queue, which "
                                "then ends after the last of them" % (file.path, len(file.pending()))
                                if existed else "no seamless-queue is running on %s, and nothing is queued" % file.path)
        time.sleep(POLL_S)
    if not existed:
        file.append({"queue_command": "EOF"})
    while file.is_held():
        file.update()                           # opens the file, which can be read when it has been removed
        time.sleep(POLL_S)
    file.update()
    if os.path.exists(file.path) and file.pending():
        raise SeamlessError("the seamless-queue on %s ended before it had run all: %d commands are left; start seamless-queue again"
                            % (file.path, len(file.pending())))
    return _report(file)


def _report(file: QueueFile) -> int:
    file.update()
    failed = len(file.failed()) + file.left_out
    if failed:
        program.say(FINISH, "%d of %d commands failed; seamless-queue has said why" % (failed, len(file.submissions) + file.left_out))
    return 1 if failed else 0


class _Queue:
    """One run of ``seamless-queue``."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.file = QueueFile(os.environ, os.getcwd())
        self.sessions: _t.Dict[str, Session] = {}
        self.limit = arguments.workers or MOST
        self.started: _t.Dict[int, _t.Tuple[Submission, Session, Recipe]] = {}      # by ``at``
        self.outcomes: "queue_module.SimpleQueue" = queue_module.SimpleQueue()
        self.touched = time.monotonic()
        self.renewed = -RENEW_S

    def say(self, text: str, verbosity: int = 0) -> None:
        if not self.arguments.quiet and self.arguments.verbose >= verbosity:
            program.say(QUEUE, text)

    def run(self) -> int:
        with self.file.hold(), contextlib.ExitStack() as stack:
            stack.callback(outputs.remove_file, self.file.running)
            stack.callback(self.close)
            try:
                self.limit = min(self.limit, self.session({}).workers or MOST)      # a wrong configuration is told at once
                self.say("running the commands in %s, until seamless-queue-finish is called" % self.file.path)
                while not self.step():
                    pass
            except BaseException:
                left = len(self.file.pending())
                if left:
                    self.say("stopped; %d commands stay queued in %s" % (left, self.file.path))
                self.summary()
                raise
            return self.summary()

    def step(self) -> bool:
        """Read, start, and take one outcome, if there is one soon; True at the end of the queue."""
        if self.file.is_replaced():
            if self.file.submissions:
                raise SeamlessError("the queue file %s was removed while its commands ran, so the rest of them are not run" % self.file.path)
            self.file = QueueFile(os.environ, os.getcwd())
        for problem in self.file.update():
            program.say(QUEUE, readable(problem))
        self.start()
        if self.file.eof and not self.started and not self.file.pending() and self.file.remove():
            return True
        self.touch()
        self.renew()
        with contextlib.suppress(queue_module.Empty):
            self.finished(*self.outcomes.get(timeout=0.1))
            while True:
                self.finished(*self.outcomes.get_nowait())
        return False

    # --- starting -------------------------------------------------------------------------------------

    def session(self, config: _t.Mapping) -> Session:
        """The session for commands that were submitted with these options."""
        key = json.dumps(config, sort_keys=True)
        if key not in self.sessions:
            options = types.SimpleNamespace(project=config.get("project"), stage=config.get("stage"))
            settings = commandline.settings_of(options, config.get("cwd"), queue=config.get("queue"), node=config.get("node"),
                                               execution="process" if config.get("local") else None)
            if settings.remote is None:         # one session for all folders that want the same
                settings = settings._replace(workdir="", warnings=(), files=(), stages=())
            self.sessions[key] = (next((session for session in self.sessions.values() if session.settings == settings), None)
                                  or self.open(settings))
        return self.sessions[key]

    def open(self, settings) -> Session:
        """A session whose commands run in processes of their own, also here: they end with this one, even if it is killed."""
        workers = None
        if settings.remote is None:
            workers = self.arguments.workers or settings.workers or usable_cpus()
        return Session(settings, workers=workers, others=lambda: list(self.sessions.values()), who=None if self.arguments.quiet else QUEUE)

    def start(self) -> None:
        """Submit the commands that wait for nothing, as many as may run."""
        batches: _t.Dict[Session, _t.List[_t.Tuple[Submission, Request]]] = {}
        room = self.limit - len(self.started)
        for submission in self.file.pending():
            if room <= 0:
                break
            if submission.at in self.started or submission.after - self.file.ended.keys():
                continue
            try:
                session, request = self.prepare(submission)
            except ServiceError:
                raise
            except SeamlessError as exc:
                self.fail(submission, exc.args[0])
                continue
            batches.setdefault(session, []).append((submission, request))
            room -= 1
        for session, batch in batches.items():
            for (submission, request), future in zip(batch, session.submit_many([request for _, request in batch])):
                self.say("job %d begins: %s" % (submission.number, readable(submission.command)), 1)
                self.started[submission.at] = (submission, session, request.recipe)
                self.announce(submission, request.recipe.checksum)
                future.add_done_callback(lambda future, at=submission.at: self.outcomes.put((at, future)))

    def prepare(self, submission: Submission) -> _t.Tuple[Session, Request]:
        """What to run for this command.  Raises ``SeamlessError`` if it cannot be."""
        params, transformation = submission.params, submission.transformation
        session = self.session(submission.config)
        self.limit = min(self.limit, session.workers or MOST)
        if params.get("undo"):
            raise SeamlessError("--undo cannot be queued; run seamless-run --undo")
        recipe = Recipe.from_dict(transformation)
        if recipe.checksum != submission.id:
            raise SeamlessError("its entry in the queue file is damaged: the transformation is %s, not %s" % (recipe.checksum, submission.id))
        for pin, (at, server) in submission.makers.items():
            recipe = self.resolve(session, recipe, pin, at, server)
        meta = execution_meta(transformation, session.get_buffer, bool(params["scratch"]))
        meta = meta._replace(record=session.settings.record, job_folder="", local=bool(submission.config.get("local")))
        return session, Request(recipe, meta, value=bool(params["download"]))

    def resolve(self, session: Session, recipe: Recipe, pin: str, at: int, server: str) -> Recipe:
        """``recipe`` with the result of another command as the input ``pin``."""
        maker, ended = self.file.submissions[at], self.file.ended[at]
        if ended.result is None:
            raise SeamlessError("not run, because it uses '%s' of job %d, which failed" % (readable(server), maker.number))
        content = outputs.Results(self.session(maker.config).supply, Outcome(ended.result)).contents([Target(server, server)])
        found = next(iter(content.values()))
        formats = {**_t.cast(dict, recipe.extra.get("__format__", {}))}
        pins = dict(recipe.pins)
        if isinstance(found, str):
            pins[pin] = ("bytes", None, Checksum(found))
            formats[pin] = {"filesystem": {"mode": "file", "optional": True}}
        else:
            pins[pin] = ("mixed", None, session.store.put(plain_dumps(found)))
            formats[pin] = {"celltype": "deepfolder", "filesystem": {"mode": "directory", "optional": True}}
        return recipe._replace(pins=pins, extra={**recipe.extra, "__format__": formats})

    # --- ending ---------------------------------------------------------------------------------------

    def finished(self, at: int, future) -> None:
        """Write the result files of a command that has run."""
        submission, session, _ = self.started[at]
        try:
            outcome = future.result()
            error = outcome.exception()
            if error is None:
                if outcome.logs and not self.arguments.quiet:
                    self.say("job %d printed:" % submission.number)
                    _print(outcome.logs)
                self.deliver(submission, session, outcome)
        except ServiceError:                    # no fault of the command: it stays queued
            raise
        except SeamlessError as exc:
            error = exc
        if error is not None:
            return self.fail(submission, error.args[0], getattr(error, "logs", ""))
        self.end(submission, outcome.result)
        self.say("job %d %s: %s" % (submission.number, "was cached" if outcome.cached else "is done", readable(submission.command)))

    def deliver(self, submission: Submission, session: Session, outcome: Outcome) -> None:
        params = submission.params
        results = outputs.Results(session.supply, outcome)
        contents = results.contents(submission.targets)
        download = bool(params["download"]) and not params["scratch"]
        if download and session.store.remote and params["auto_confirm"] != "yes":
            count, size = results.size(contents)
            if count > params["max_download_files"] or size > size_of(str(params["max_download_size"]), "max_download_size"):
                download = False
                self.say("job %d: %d files of %s are not downloaded without a question (-y of seamless-run answers it); "
                         "seamless-download brings them" % (submission.number, count, size_text(size)))
        results.save(contents, os.path.join(os.getcwd(), params["workdir"]), download, self.say)

    def fail(self, submission: Submission, message: str, logs: str = "") -> None:
        program.say(QUEUE, "job %d failed: %s: %s" % (submission.number, readable(submission.command), message))
        if logs:
            _print(logs)
        self.end(submission, None, message)

    def end(self, submission: Submission, result: _t.Optional[Checksum], message: str = "") -> None:
        """Note that a command has ended; nobody need wait for its results, even if a queue that was killed had announced them."""
        self.started.pop(submission.at, None)
        self.conceal(submission)
        self.file.end(submission, result, message)

    def summary(self) -> int:
        """Say how it went; the exit code."""
        failed = self.file.failed()
        self.say("%d commands are done, %d failed" % (len(self.file.ended) - len(failed), len(failed) + self.file.left_out))
        for submission, message in failed:
            program.say(QUEUE, "failed: job %d: %s: %s" % (submission.number, readable(submission.command), message.split("\n")[0]))
        if self.file.left_out:
            program.say(QUEUE, "failed: %d submissions that cannot be read; the queue file is %s" % (self.file.left_out, self.file.kept))
        return 1 if failed or self.file.left_out else 0

    def close(self) -> None:
        """Cancel what is running, and remove what shows that it is."""
        for _, session, recipe in self.started.values():
            with contextlib.suppress(SeamlessError):        # the service may be what failed
                session.cancel(recipe.checksum)
        for session in set(self.sessions.values()):
            session.close()
        for submission, _, _ in self.started.values():
            self.conceal(submission)

    # --- .FUTURE files --------------------------------------------------------------------------------

    def announce(self, submission: Submission, checksum: Checksum) -> None:
        """Tell commands that are run by hand to wait for the results."""
        for path, text in outputs.future_files(submission.targets, submission.params["workdir"], checksum).items():
            with contextlib.suppress(OSError):              # the result will meet the same error, and tell it
                with open(path, "wb") as file:
                    file.write(text)

    @staticmethod
    def conceal(submission: Submission) -> None:
        """The end of ``announce``."""
        for path in outputs.future_files(submission.targets, submission.params["workdir"], submission.id):
            with contextlib.suppress(OSError):              # there may be none, where nothing can be written
                os.unlink(path)

    def touch(self) -> None:
        if time.monotonic() - self.touched > outputs.TOUCH_S:
            self.touched = time.monotonic()
            for submission, _, recipe in self.started.values():
                for path in outputs.future_files(submission.targets, submission.params["workdir"], recipe.checksum):
                    with contextlib.suppress(OSError):      # somebody has removed it, and may
                        os.utime(path)

    # --- what is needed -------------------------------------------------------------------------------

    def renew(self) -> None:
        """At times, use all that pending commands need, so that seamless-gc keeps it (see leases.py); nothing waits for that."""
        if time.monotonic() - self.renewed < RENEW_S:
            return
        self.renewed = time.monotonic()
        needed: _t.Dict[Session, _t.Set[str]] = {}
        for submission in self.file.pending():
            pins = (pin if isinstance(pin, list) else [pin] for pin in submission.transformation.values())
            needs = [(submission, [submission.id, *itertools.chain(*pins)])]
            needs += [(self.file.submissions[at], [self.file.ended[at].result]) for at in submission.after & self.file.ended.keys()]
            for where, names in needs:
                with contextlib.suppress(SeamlessError):    # it will be met again, and told, when the command is due
                    needed.setdefault(self.session(where.config), set()).update(filter(is_checksum, names))
        threading.Thread(target=_use, args=(needed,), daemon=True).start()


def _use(needed: _t.Mapping[Session, _t.Set[str]]) -> None:
    """Ask each store for all of these at once."""
    for session, names in needed.items():
        with contextlib.suppress(Exception):                # as above; or the queue has ended
            session.store.has(names)


def _print(logs: str) -> None:
    if sys.stderr is not None:
        print(logs.rstrip("\n").encode("utf-8", "replace").decode("utf-8"), file=sys.stderr, flush=True)
