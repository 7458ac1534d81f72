"""``seamless-run``: run a command, or answer from the cache.

    argv -> options, words -> Plan (command.py) -> look up, or run in the session -> print, write files (outputs.py)

A hit opens the local store and nothing else.  After a job that really ran, inputs that changed meanwhile
take back the record of its result.
"""
import contextlib
import functools
import os
import sys
import typing as _t

from . import command, outputs, program, run_options
from .celltypes import plain_dumps
from .checksum import Checksum
from .compressed import expand_to
from .confirm import LIMITS, Refused, confirm, read_size
from .errors import CacheMissError, CorruptBufferError, JobCancelledError, JobError, JobWritten, SeamlessError, UsageError
from .inputs import readable
from .progress import is_watched, size_text
from .script import STDOUT
from .session import Request, Session
from .settings import load_settings
from .transformation import Meta, Outcome, Recipe

PROGRAM = "seamless-run"

def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options, words = run_options.split(argv)
    parser = run_options.make_parser()
    try:
        arguments = parser.parse_args(options)
    except SystemExit as exc:               # --help, or a wrong option
        return exc.code if isinstance(exc.code, int) else 2
    return program.guarded(PROGRAM, lambda: _Run(arguments, words, argv).run(), arguments.verbose > 1)


class _Run:
    """One invocation."""

    def __init__(self, arguments, words: _t.Sequence[str], argv: _t.Sequence[str] = ()):
        self.arguments = arguments
        self.argv = argv
        self.words = words
        try:
            self.cwd = os.getcwd()
        except FileNotFoundError:
            raise SeamlessError("the current folder does not exist any more; change to another one") from None

    def run(self) -> int:
        self.check_options()
        arguments = self.arguments
        project, _, subproject = (arguments.project or "").partition(":")
        stage, _, substage = (arguments.stage or "").partition(":")
        load = functools.partial(load_settings, self.cwd, project=project or None, subproject=subproject or None, environ=os.environ)
        settings = load(stage=stage or None, substage=substage or None, node=arguments.node, queue=arguments.queue,
                        execution="process" if arguments.local else None)
        for warning in settings.warnings:
            self.say(warning)
        if arguments.node and settings.remote != "daskserver":
            raise UsageError("--node %s: only a daskserver places commands on nodes, and this command would not run on one; leave --node "
                             "out, or set 'execution: remote' and 'remote: daskserver'" % arguments.node)
        if arguments.qsubmit:
            from .queuefile import QueueFile            # most commands are run at once
            self.queue = QueueFile(os.environ, self.cwd)
            self.queue.update()
        self.plan = command.build(self.words, self.command_options(), self.say)
        if arguments.no_download and not self.plan.targets:
            raise UsageError("--no-download: the command has no result file; write one with '>' or name it "
                             "with --capture")
        self.warn_of_missed()
        self.say("transformation %s" % self.plan.recipe.checksum, 1)
        self.session = Session(settings, local=arguments.local, others=lambda: self.default_stage(load) if stage else (),
                               who=None if arguments.quiet else PROGRAM)
        try:
            if arguments.undo:
                return self.undo()
            if arguments.dry:
                return self.dry()
            if arguments.why:
                return self.why()
            outputs.check_appended(self.plan.targets, self.cwd)
            if arguments.qsubmit:
                return self.submit()
            return self.verify(self.meta()) if arguments.verify else self.execute(self.meta())
        finally:
            self.session.close()

    @staticmethod
    def default_stage(load) -> _t.List[Session]:
        """The session without ``--stage``: results of earlier commands, of which only a .CHECKSUM is here, are in its store."""
        try:
            return [Session(load(execution="process"))]
        except SeamlessError:
            return []                       # there may be nothing to be had without a stage

    # --- options --------------------------------------------------------------------------------------

    def check_options(self) -> None:
        arguments = self.arguments
        if not self.words:
            raise UsageError("there is no command; give it after the options, or see %s --help" % PROGRAM)
        if arguments.docker and not arguments.dry:
            raise UsageError("--docker is not supported; use --conda ENV, or run docker inside the command")
        for name in ("write_job", "upload", "write_remote_job"):
            if getattr(arguments, name) and not arguments.dry:
                raise UsageError("--%s needs --dry" % name.replace("_", "-"))
        chosen = [name for name in ("dry", "undo", "why", "verify", "qsubmit") if getattr(arguments, name)]
        if len(chosen) > 1:
            raise UsageError("--%s and --%s exclude each other; choose one" % (chosen[0], chosen[1]))
        if arguments.primary < 1:
            raise UsageError("--primary counts from 1, so it cannot be %d" % arguments.primary)

    def command_options(self) -> command.Options:
        arguments = self.arguments
        fields = set(command.Options._fields) & set(vars(arguments))
        return command.Options(cwd=self.cwd, check_suffixed=not arguments.g1, check_bare=not arguments.g2,
                               search_path=os.environ.get("PATH", os.defpath),
                               **({"maker": self.queue.maker} if arguments.qsubmit else {}),
                               **{name: getattr(arguments, name) for name in fields})

    def environment(self) -> _t.Dict[str, object]:
        arguments = self.arguments
        return {**({"conda_environment": arguments.conda} if arguments.conda else {}),
                **({"docker": {"name": arguments.docker}} if arguments.docker else {})}

    def meta(self) -> Meta:
        arguments = self.arguments
        return Meta(metavars=self.plan.metavars, environment=self.environment(), scratch=arguments.scratch,
                    local=arguments.local, record=self.session.settings.record, label=self.label())

    def label(self) -> str:
        return self.plan.text[:200].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def recipes(self) -> _t.List[Recipe]:
        """Whose results are those of the command: it may have run when its result files were not here yet."""
        earlier = self.plan.earlier
        return [self.plan.recipe] if earlier is None else [earlier, self.plan.recipe]

    def say(self, text: str, verbosity: int = 0) -> None:
        if not self.arguments.quiet and self.arguments.verbose >= verbosity:
            _say(text)

    # --- without running ------------------------------------------------------------------------------

    def undo(self) -> int:
        checksum = self.plan.recipe.checksum
        forgotten = any([self.session.forget(recipe.checksum) for recipe in self.recipes()])
        if self.session.stores.results.get(checksum) is not None:
            _say("the result of this command stays known: it is in a store that is only read (transformation %s)" % checksum)
            return 1
        if not forgotten:
            _say("there is no result of this command to forget (transformation %s)" % checksum)
            return 1
        self.say("forgot the result of transformation %s" % checksum)
        return 0

    def dry(self) -> int:
        arguments, recipe = self.arguments, self.plan.recipe
        if arguments.upload or arguments.write_remote_job:
            self.upload(recipe.buffer)
        if arguments.write_job:
            self.write_job(arguments.write_job)
        if arguments.write_remote_job:
            return self.write_remote_job(arguments.write_remote_job)
        if arguments.upload or arguments.write_job:
            program.write_output(recipe.checksum.encode("ascii") + b"\n")
        return 0

    def upload(self, *buffers: bytes) -> None:
        """Store the inputs, and ``buffers``."""
        settings = self.session.settings
        if settings.buffer_directory is None and settings.remote_clients is None:
            raise UsageError("there is nowhere to upload to: the configuration names no cluster, or one that keeps nothing; set "
                             "SEAMLESS_CACHE, or name a cluster in seamless.profile.yaml")
        with self.inputs() as files:
            self.confirm_upload(files)
            self.session.store.put_many([*self.plan.inputs.buffers.values(), *buffers])
            self.session.push_files(files)

    def submit(self) -> int:
        """Append the command to the queue file.  Its inputs are those of now; those that queued commands make follow later."""
        from .dunders import execution_dunders
        arguments, plan = self.arguments, self.plan
        if not plan.targets:
            raise UsageError("--qsubmit: the command has no result file; write one with '>' or name it with --capture")
        plan.check_pins()
        recipe, earlier = plan.recipe, plan.earlier
        if earlier is not None and (self.queue.queued(earlier.checksum) or self.session.lookup(earlier, False) is not None):
            recipe = earlier
        futures = {pin: maker for pin, maker in plan.futures.items() if pin in recipe.pins}
        self.upload(*([] if futures else [recipe.buffer]))
        self.session.store.has(recipe.inputs())         # those that only a .CHECKSUM names are in use from now on, too
        transformation = {**recipe.to_dict(), **execution_dunders(self.meta(), self.session.store.put)}
        limits = {"max_download_" + name.lower(): int(read_size("SEAMLESS_MAX_DOWNLOAD_" + name, default))
                  for name, default in zip(("FILES", "SIZE"), LIMITS["Download"])}
        names = ("project", "stage", "queue", "node", "local")
        self.queue.append({
            "queue_command": "SUBMIT", "original_command": " ".join([PROGRAM, *self.argv]),
            "transformation_checksum": recipe.checksum,
            "pending_transformation" if futures else "transformation_dict": transformation,
            "result_targets": {target.server: None if target.local == target.server else target.local for target in plan.targets},
            "params": {"undo": False, "scratch": arguments.scratch, "workdir": self.cwd, "download": not arguments.no_download,
                       "auto_confirm": "yes" if arguments.yes else "no",
                       "capture_stdout": any(target.server == STDOUT for target in plan.targets), **limits},
            **({"futures": futures} if futures else {}),
            "config": {"cwd": self.cwd, **{name: getattr(arguments, name) for name in names if getattr(arguments, name)}}}, indent=2)
        self.say("submitted to %s" % self.queue.path, 1)
        return 0

    def write_remote_job(self, folder: str) -> int:
        """Have the executing side write the job to ``folder``: below its home folder ("~/...") or, if relative, below this one."""
        folder = folder if folder.startswith("~") else os.path.join(self.cwd, folder)
        outcome = self.run_job(self.meta()._replace(job_folder=folder))
        error = outcome.exception()
        if isinstance(error, JobWritten):
            self.say("the job is in %s" % error.folder)
            program.write_output(b"Transformation submitted to remote server\n")
            return 0
        if error is not None:
            return self.failed(error)
        raise SeamlessError("no job was written, because %s; forget the result with --undo first" % (
            "the result of the command is known" if outcome.cached else "the service ran it instead, being too old for --write-remote-job"))

    def write_job(self, folder: str) -> None:
        """The transformation as files, in a new folder."""
        from .dunders import execution_dunders
        recipe = self.plan.recipe
        dropped = execution_dunders(self.meta(), self.session.store.put if self.arguments.upload else Checksum.of)
        dropped.pop("__env__", None)
        files = {"transformation.json": recipe.buffer, "command.txt": self.plan.code.encode("utf-8")}
        if self.arguments.upload:
            files = {"transformation.json.CHECKSUM": recipe.checksum.encode("ascii")}
        elif self.environment():
            files["env.json"] = plain_dumps(self.environment())
        if dropped:
            files["dunder.json"] = plain_dumps(dropped)
        try:
            os.mkdir(folder)
            for name, data in files.items():
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(data)
        except FileExistsError:
            raise UsageError("--write-job %s: it exists already; name a new folder" % folder) from None
        except OSError as exc:
            raise SeamlessError("--write-job %s: %s" % (folder, exc.strerror)) from exc

    def why(self) -> int:
        """Say whether the command would run, and why."""
        from .why import explain                # only for those who ask
        value = not self.arguments.no_download
        if self.arguments.conda or self.plan.metavars:
            self.say("--conda and the values of --metavar are not part of what names a result: they never make a command run again")
        found = [explain(self.session, recipe, self.plan.inputs.buffers, value) for recipe in self.recipes()]
        why = min(found, key=lambda why: (not why.hit, why.nearest is None, len(why.lines)))
        program.write_output(_line(why))
        return 0 if why.hit else 1

    def verify(self, meta: Meta) -> int:
        """Run the command although its result is known, and compare."""
        from .verify import verify
        self.plan.check_pins()
        known = [recipe for recipe in self.recipes() if self.session.stores.results.get(recipe.checksum) is not None]
        recipe = (known or [self.plan.recipe])[0]
        with self.inputs() as files:
            self.confirm_upload(files)
            try:
                verdict = verify(self.session, recipe, meta, self.plan.inputs.buffers, files,
                                 sys.stderr.fileno() if sys.stderr else None)
            except KeyboardInterrupt:
                self.session.cancel(recipe.checksum)
                raise
        program.write_output(_line(verdict))
        return 0 if verdict else 1

    # --- running --------------------------------------------------------------------------------------

    def execute(self, meta: Meta) -> int:
        value = not self.arguments.no_download
        found = self.session.lookup_many([Request(recipe, value=value) for recipe in self.recipes()])
        for recipe in self.recipes():
            outcome = found.get(recipe.checksum)
            if outcome is not None:
                self.say("the result is cached", 1)
                try:
                    return self.deliver(outcome)
                except CacheMissError:      # it was damaged, or somebody deletes buffers: make it again
                    self.session.doubt(recipe.checksum, outcome.result)
        self.plan.check_pins()
        with outputs.announced(self.plan.targets, self.cwd, self.plan.recipe.checksum):
            outcome = self.run_job(meta)
            if self.plan.inputs.packed and isinstance(outcome.exception(), CacheMissError):
                outcome = self.run_job(meta)        # a compressed input that turned out to be damaged is expanded now
            error = outcome.exception()
            if error is not None:
                return self.failed(error)
            self.check_inputs(outcome)
            return self.deliver(outcome)

    def run_job(self, meta: Meta) -> Outcome:
        checksum = self.plan.recipe.checksum
        with self.inputs() as files:
            self.confirm_upload(files)
            try:
                return self.session.run(self.plan.recipe, meta, self.plan.inputs.buffers, files,
                                        log_fd=sys.stderr.fileno() if sys.stderr else None)
            except KeyboardInterrupt:
                self.session.cancel(checksum)
                _say("Canceled transformation %s" % checksum)
                raise

    @contextlib.contextmanager
    def inputs(self):
        """checksum -> path of the input files, to be uploaded in the ``with`` block.

        Compressed ones that the store lacks are expanded meanwhile.  Raises ``SeamlessError`` if one has changed.
        """
        try:
            with self.unpacked() as files:
                yield files
        except (CorruptBufferError, OSError):
            changed = self.changed_inputs()
            if not changed:
                raise
            raise SeamlessError("%s changed while the command was being prepared; run it again"
                                % _listed(changed)) from None

    @contextlib.contextmanager
    def unpacked(self):
        files, packed = self.plan.inputs.files, self.plan.inputs.packed
        names = [checksum for checksum in packed if checksum not in files]
        missing = [name for name, there in zip(names, self.session.store.has(names)) if not there]
        if not missing:
            yield files
            return
        import tempfile                     # slow to import, and compressed inputs are rare
        with tempfile.TemporaryDirectory(prefix="seamless-inputs-") as folder:
            files = dict(files)
            for checksum in missing:
                files[checksum] = os.path.join(folder, checksum)
                expand_to(packed[checksum], files[checksum], checksum)
            yield files

    def failed(self, error: SeamlessError) -> int:
        """Show what there is of a job that failed; returns the exit code."""
        if isinstance(error, JobCancelledError):
            _say("Canceled transformation %s" % self.plan.recipe.checksum)
            return 130
        partial = getattr(error, "partial", None)
        if partial:                         # what the command had printed so far
            with contextlib.suppress(CacheMissError):
                self.results(Outcome(Checksum(partial))).print()
        code = getattr(error, "returncode", None)
        if not isinstance(error, JobError) or not code:
            raise error
        self.say(error.args[0], 0 if code < 0 or is_watched() else 1)
        if len(self.words) > 1 and any(len(word.split()) > 1 for word in self.words):
            self.say("the quotes around words were removed by your shell; to keep them, write the command as -c '...'")
        return 128 - code if code < 0 else code

    def warn_of_missed(self) -> None:
        """Name the words for which a shell would find a file, and the job will not."""
        missed = self.plan.missed
        if missed:
            self.say("%s %s here, but not where the command runs, because only words of the first pipeline, before '>',"
                     " become inputs; add %s" % (_listed(missed), "is" if len(missed) == 1 else "are", " ".join(
                         "-i " + command.quote(readable(word)) for word in missed[:5])))

    def changed_inputs(self) -> _t.List[str]:
        return [os.path.relpath(entry.path, self.cwd) for entry in self.plan.inputs.seen if entry.changed()]

    def check_inputs(self, outcome: Outcome) -> None:
        """If an input changed while the job ran, take back that its result was recorded."""
        changed = [] if outcome.cached else self.changed_inputs()
        if changed:
            self.session.forget(self.plan.recipe.checksum)
            _say("%s changed while the command ran, so its result was not recorded" % _listed(changed))

    # --- results --------------------------------------------------------------------------------------

    def deliver(self, outcome: Outcome) -> int:
        """Print the result, or write the files.  Raises ``CacheMissError`` if the result is gone."""
        results = self.results(outcome)
        if not self.plan.targets:
            results.print()
            return 0
        contents = results.contents(self.plan.targets)
        download = not (self.arguments.no_download or self.arguments.scratch)
        if download and self.is_remote():
            try:
                self.confirm("Download", *results.size(contents))
            except Refused:                 # what the command made is stored, and its sidecars say how to get it
                results.save(contents, self.cwd, False, self.say)
                if not self.arguments.no:
                    raise
                download = False
                self.say("not downloaded: %s; seamless-download brings it" % ", ".join(target.local for target in contents))
        results.save(contents, self.cwd, download, self.say)
        return 0

    def results(self, outcome: Outcome) -> outputs.Results:
        return outputs.Results(self.session.supply, outcome, None if self.arguments.quiet else PROGRAM)

    # --- large transfers ------------------------------------------------------------------------------

    def is_remote(self) -> bool:
        """True if buffers go through a service, perhaps on another host."""
        return self.session.store.remote

    def confirm_upload(self, files: _t.Mapping[Checksum, str]) -> None:
        names = list(files)
        missing = [files[name] for name, there in zip(names, self.session.store.has(names)) if not there]
        size = sum(os.path.getsize(path) for path in missing)
        if missing:
            self.say("Upload %d files, total %s" % (len(missing), size_text(size)), 0 if is_watched() else 1)
        if self.is_remote():
            self.confirm("Upload", len(missing), size)

    def confirm(self, what: str, count: int, size: int) -> None:
        confirm(what, count, size, self.arguments.yes, self.arguments.no)


def _line(text) -> bytes:
    return (str(text) + "\n").encode("utf-8", "backslashreplace")


def _say(text: str) -> None:
    program.say(PROGRAM, text)


def _listed(names: _t.Sequence[str]) -> str:
    """'a' / 'a' and 'b' / 'a', 'b' and 3 more."""
    shown = ["'%s'" % readable(name) for name in names[:5]] + (["%d more" % (len(names) - 5)] if len(names) > 5 else [])
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]


if __name__ == "__main__":
    sys.exit(main())
