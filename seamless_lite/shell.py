"""Run one shell recipe here (compat/bash.md section 6).

    a private folder                inputs become files and variables (``jobfolder``)
      -> bash in a session of its own    stdin is empty; what it prints is passed on as it comes
      -> RESULT                     becomes the result
      -> the folder is removed      always, and so is what is left of the session

A process that made a session of its own (``setsid``) outlives a command that ends by itself, but not one that is
cancelled, interrupted or too slow.

One pipe takes standard output and error (RESULT aside), so their order is kept; it is read all the time, so
that no amount of output can block the command.
"""
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import typing as _t

from .checksum import Checksum
from .errors import ConfigurationError, DeadlineError, JobCancelledError, JobError, JobWritten, SeamlessError
from .jobfolder import remove_folder, store_result, write_inputs
from .processes import MARK, kill_family
from .transformation import Meta, Recipe
from .values import fetch

TAIL_BYTES = 1 << 16            # so much of the end of the output goes into an error
ARGUMENT_BYTES = 120_000        # Linux allows 128 KiB for one argument; longer code is run from a file
POLL_S = 0.1                    # how often to look whether the job was cancelled
TERM_S = 2.0                    # from SIGTERM to SIGKILL
LINGER_S = 1.0                  # for processes that outlive the command and still hold its output open
# The command runs in a subshell, where $$ is still this shell, which would ignore "kill -INT $$" while it waits.
# Background jobs end with the command.  (What has left bash's job table is killed with the session, later.)
_HEADER = "set -u -e\ntrap 'kill $(jobs -p) 2>/dev/null || :' EXIT\ntrap 'exit 130' INT\n"


def run_shell(recipe: Recipe, meta: Meta, store, *, log_fd: _t.Optional[int] = None, run_dir=None,
              cancelled=None) -> Checksum:
    """Run the command and return the checksum of its result, which is in ``store`` then.

    What it prints goes to the descriptor ``log_fd``, if given, as it comes; the end of it goes into errors.
    ``run_dir`` is where its private folder is made (default: the system's temporary folder).  ``cancelled``
    has ``is_set()``, as ``threading.Event``; when that turns true the job is killed.

    Raises ``JobError`` (with ``returncode`` and ``logs``; if the command failed after it had written a file
    RESULT, ``partial`` is the checksum of that), ``DeadlineError`` after ``meta.timeout_s``,
    ``JobCancelledError``, ``CacheMissError`` for a missing input, ``ConfigurationError`` for an environment
    that is not there; ``JobWritten`` if ``meta.job_folder`` asks for that.
    """
    pin = recipe.pins.get("code")
    if pin is None or pin[2] is None:
        raise JobError("the transformation %s has no code" % recipe.checksum)
    code = fetch(store, pin[2], "the code of the job").decode("utf-8", "surrogateescape")
    label = meta.label or _summary(code)
    header = _HEADER + _environment_header(meta.environment)
    if meta.job_folder:
        _write_job(recipe, meta, store, code, header, label)
    try:
        folder = tempfile.mkdtemp(prefix="seamless-bash-", dir=run_dir)
    except OSError as exc:
        raise SeamlessError("cannot make a folder for the job in %s: %s" % (run_dir or tempfile.gettempdir(),
                                                                            exc.strerror)) from None
    try:
        arguments, variables = _furnish(recipe, meta, store, code, header, label, folder)
        command = _Command(arguments, dict(os.environ, **variables), folder, label, log_fd)
        command.run(meta.timeout_s, cancelled)
        return _result(recipe, store, os.path.join(folder, "RESULT"), command)
    finally:
        remove_folder(folder)


def _result(recipe: Recipe, store, path: str, command: "_Command") -> Checksum:
    celltype = recipe.output[1]
    if command.returncode != 0:
        error = JobError("the command '%s' failed: %s" % (command.label, _reason(command.returncode)),
                         logs=command.logs, returncode=command.returncode)
        if celltype == "bytes" and os.path.isfile(path):
            error.partial = store_result(store, path, celltype)
        raise error
    if not os.path.exists(path):
        raise JobError("the command '%s' succeeded but left no file or folder RESULT" % command.label,
                       logs=command.logs, returncode=0)
    try:
        return store_result(store, path, celltype)
    except JobError as exc:
        raise JobError("%s (command '%s')" % (exc.args[0], command.label), logs=command.logs, returncode=0) from None


def _reason(returncode: int) -> str:
    number = -returncode if returncode < 0 else returncode - 128
    try:
        return "exit code %d (%s)" % (returncode if returncode > 0 else 128 + number, signal.Signals(number).name)
    except ValueError:
        return "exit code %d" % returncode


# --- preparations ------------------------------------------------------------------------------------------

def _furnish(recipe: Recipe, meta: Meta, store, code: str, header: str, label: str, folder: str):
    """Write inputs and ``transform.sh`` into ``folder``; (arguments, added environment variables) of the process to start."""
    try:
        variables = write_inputs(recipe, store, folder)
        variables.update(("META__" + name, value) for name, value in meta.metavars.items())
        _make_target_folders(code, folder)
        return _arguments(header, code, variables, folder), variables
    except OSError as exc:
        raise JobError("the inputs of '%s' cannot be written: %s (%s)" % (label, exc.strerror, exc.filename)) from None


def _write_job(recipe: Recipe, meta: Meta, store, code: str, header: str, label: str) -> None:
    """Make ``meta.job_folder``, complete or not at all.  Raises ``JobWritten``; ``JobError`` if it cannot be made."""
    folder = os.path.abspath(os.path.expanduser(meta.job_folder))
    aside = "%s.%s" % (folder, os.urandom(4).hex())
    try:
        if os.path.lexists(folder):
            raise JobError("the job cannot be written to %s on %s: it exists already; name a new folder" % (folder, os.uname().nodename))
        os.makedirs(aside)
        try:
            _furnish(recipe, meta, store, code, header, label, aside)
            os.rename(aside, folder)
        except BaseException:
            remove_folder(aside)
            raise
    except OSError as exc:
        raise JobError("the job cannot be written to %s on %s: %s; the folder is one where the command would run, such as ~/job"
                       % (folder, os.uname().nodename, exc.strerror)) from None
    raise JobWritten(JobWritten.PREFIX + folder)


def _summary(code: str) -> str:
    """The user's command in code that ``seamless-run`` made, or the first line of other code; one line, cut."""
    lines = [line for line in code.splitlines()
             if line.strip() not in ("", "(") and not re.match(r"export |chmod \+x |mkdir -p RESULT/|#", line)]
    line = lines[0] if lines else code.strip()
    return line if len(line) <= 200 else line[:200] + "..."


def _environment_header(environment: _t.Mapping) -> str:
    """The lines of bash that enter the conda environment, if any is wanted.  Raises ``ConfigurationError``."""
    if environment.get("docker"):
        raise ConfigurationError("docker images are not supported: use a conda environment, or install what the "
                                 "command needs")
    name = environment.get("conda_environment")
    if not name:
        return ""
    from .conda import conda_script        # few commands want one
    script = conda_script()
    if script is None:
        raise ConfigurationError("the command wants the conda environment '%s', but there is no conda on this "
                                 "machine: install it, set CONDA_ROOT, or leave out --conda" % name)
    # conda's scripts use unset variables
    return "set +u\nsource %s\nconda activate %s\nset -u\n" % (shlex.quote(script), shlex.quote(str(name)))


def _make_target_folders(code: str, folder: str) -> None:
    """Make ``sub`` for a target ``sub/out``, which is there in a plain run too (bash.md section 7).

    Not if the command itself names ``sub``: it may be about to make it, and ``mkdir sub`` would fail.
    """
    lines = code.splitlines()
    first = next((i for i, line in enumerate(lines) if not re.match(r"export |chmod \+x ", line)), len(lines))
    if first == len(lines) or not lines[first].startswith("mkdir -p RESULT/"):
        return
    command = "\n".join(line for line in lines[first + 1:] if not re.match(r"mv .* RESULT/\S*\Z", line))
    try:
        words = shlex.split(lines[first])[2:]
    except ValueError:
        return                  # not written by seamless-run
    for word in words:
        target = word[len("RESULT/"):] if word.startswith("RESULT/") else ""
        parts = [part for part in target.split("/") if part]
        if not parts or ".." in parts or target.startswith("/"):
            continue
        named = any(re.search(r"(?<![\w./-])(\./)?%s/?(?![\w./-])" % re.escape("/".join(parts[:n + 1])), command)
                    for n in range(len(parts)))
        if not named:
            os.makedirs(os.path.join(folder, *parts), exist_ok=True)


def _arguments(header: str, code: str, variables: _t.Mapping[str, str], folder: str) -> _t.List[str]:
    """Write ``transform.sh``, to be looked at (and run, if the code is too long for an argument)."""
    bash = "/bin/bash" if os.path.exists("/bin/bash") else shutil.which("bash")
    if bash is None:
        raise ConfigurationError("there is no bash on this machine, which runs commands: install it")
    exports = "".join("export %s=%s\n" % (name, shlex.quote(variables[name])) for name in sorted(variables))
    script = ("#!/bin/bash\n" + exports + header + code).encode("utf-8", "surrogateescape")
    name = "transform.sh"
    while os.path.lexists(os.path.join(folder, name)):      # an input of that name
        name = "_" + name
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(script)
    os.chmod(path, 0o755)
    text = header + code
    if len(text.encode("utf-8", "surrogateescape")) > ARGUMENT_BYTES:
        return [bash, path]
    return [bash, "-c", text]


# --- running -----------------------------------------------------------------------------------------------

class _Command:
    """A command in a session of its own, which ends with it."""

    def __init__(self, arguments, environment, folder, label, log_fd):
        self.label = label
        self.returncode = 0
        self._start = dict(args=arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, bufsize=0,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        self._mark = ""
        if MARK not in environment:         # in a worker, whose own mark finds the job too
            self._mark = environment[MARK] = os.urandom(8).hex()
        self._process: _t.Optional[subprocess.Popen] = None
        self._log_fd = log_fd
        self._tail = bytearray()

    @property
    def logs(self) -> str:
        """The end of what the command printed."""
        return bytes(self._tail[-TAIL_BYTES:]).decode("utf-8", "replace")

    def run(self, timeout_s: _t.Optional[float], cancelled) -> None:
        """Start the command and wait for it; its processes are gone then, also if this raises."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self._start_process()
            self._watch(deadline, cancelled)
            self._drain(LINGER_S)
        except BaseException:
            self._signal(signal.SIGTERM)
            self._wait(TERM_S)
            if self._mark and self._process is not None:
                kill_family(self._process.pid, self._mark)
            raise
        finally:
            if self._process is not None:
                self._signal(signal.SIGKILL)    # before the leader is reaped: its number is still ours
                self.returncode = self._process.wait()
                self._drain(0.1)
                self._process.stdout.close()

    def _start_process(self) -> None:
        # In a thread, because Python delivers signals to the main thread only: a Ctrl-C while Popen starts
        # the process would leave a process that nobody knows.
        errors: _t.List[BaseException] = []

        def start():
            try:
                self._process = subprocess.Popen(**self._start)
                os.set_blocking(self._process.stdout.fileno(), False)
            except BaseException as exc:        # raised below, in the caller's thread
                errors.append(exc)
            finally:
                done.set()

        done = threading.Event()
        try:
            threading.Thread(target=start, name="seamless-start").start()
            done.wait()
        except BaseException:
            done.wait(TERM_S)
            raise
        if errors:
            if isinstance(errors[0], (OSError, ValueError)):    # ValueError: a NUL character
                raise JobError("the command '%s' cannot be started: %s" % (self.label, errors[0]))
            raise errors[0]
        assert self._process is not None

    def _watch(self, deadline, cancelled) -> None:
        """Until the command has ended.  Raises ``DeadlineError``, ``JobCancelledError``."""
        with _Poller(self._process.pid, self._process.stdout.fileno()) as poller:
            while not self._has_ended():
                timeout_s = None if cancelled is None else POLL_S
                if deadline is not None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise DeadlineError("the command '%s' took longer than its time limit (timeout_s) and was "
                                            "stopped" % self.label)
                    timeout_s = left if timeout_s is None else min(left, timeout_s)
                if cancelled is not None and cancelled.is_set():
                    raise JobCancelledError("the command '%s' was cancelled" % self.label)
                if poller.readable(timeout_s) and not self._read():
                    poller.forget_pipe()

    def _wait(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while self._process is not None and not self._has_ended() and time.monotonic() < end:
            self._read()
            time.sleep(0.01)

    def _drain(self, timeout_s: float) -> None:
        """Read until all writers are gone, or for ``timeout_s``: some may have left the session and live on."""
        end = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._process.stdout.fileno(), select.POLLIN)
        while time.monotonic() < end:
            if poller.poll(50) and not self._read():
                break

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _signal(self, number: int) -> None:
        try:
            if self._process is not None:
                os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass        # nobody is left (macOS says EPERM for a group of zombies)

    def _read(self) -> bool:
        """Pass on what the command has printed; False if all its writers are gone."""
        try:
            data = os.read(self._process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        if data and self._log_fd is not None:
            self._pass_on(data)
        return bool(data)

    def _pass_on(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._log_fd, view):]
            except BlockingIOError:
                select.select([], [self._log_fd], [], 1.0)
            except OSError:             # the reader of the log is gone; the job goes on
                self._log_fd = None
                return


class _Poller:
    """Waits for output or for the end of a process."""

    def __init__(self, pid: int, pipe: int):
        self._poll = select.poll()
        self._pipe = pipe
        self._poll.register(pipe, select.POLLIN)
        self._process_fd = None
        if hasattr(os, "pidfd_open"):
            try:
                self._process_fd = os.pidfd_open(pid)
                self._poll.register(self._process_fd, select.POLLIN)
            except OSError:
                pass        # an old kernel, or a container that forbids it: look now and then instead

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._process_fd is not None:
            os.close(self._process_fd)

    def readable(self, timeout_s: _t.Optional[float]) -> bool:
        """Whether there is something to read; returns early when the process ends."""
        if self._process_fd is None:
            timeout_s = 0.02 if timeout_s is None else min(0.02, timeout_s)
        events = self._poll.poll(None if timeout_s is None else max(1, int(timeout_s * 1000)))
        return any(fd == self._pipe for fd, _ in events)

    def forget_pipe(self) -> None:
        """Nothing more will come."""
        self._poll.unregister(self._pipe)
