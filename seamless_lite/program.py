"""What all command-line programs have in common: signals, and errors that become one sentence and an exit code.

The exit code is that of the program; 1 for what was expected to go wrong sometimes, 2 for wrong usage, 3 for
a bug of ours, 130 when interrupted.
"""
import contextlib
import errno
import os
import signal
import sys
import threading
import typing as _t

from .errors import SeamlessError


def say(program: str, text: str) -> None:
    """One line for a person, on stderr."""
    if sys.stderr is not None:              # "2>&-"
        print("%s: %s" % (program, text), file=sys.stderr, flush=True)


def guarded(program: str, action: _t.Callable[[], int], traceback: bool = False) -> int:
    """Do ``action``; whatever goes wrong in it becomes a sentence and an exit code.  ``traceback``: show that too."""
    try:
        with _signals():
            code = action()
            if sys.stdout is not None:
                sys.stdout.flush()          # so that what goes wrong is said here, and not when Python ends
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # the reader has had enough, as in "| head"
        _drop_output()
        return 0
    except Exception as exc:
        if traceback:
            import traceback as module      # only when asked for
            module.print_exc()
        if isinstance(exc, SeamlessError):
            say(program, exc.args[0])
            return exc.exit_code
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) and exc.filename is None:
            say(program, "what was to be written, to standard output or a temporary file (in TMPDIR), cannot be: %s" % exc.strerror)
            if sys.stdout is not None:
                _drop_output()
            return 1
        if isinstance(exc, FileNotFoundError) and exc.filename is None and _is_nowhere():
            say(program, "the current folder does not exist any more; change to another one")
            return 1
        say(program, "internal error, please report it with the output of -vv: %s: %s" % (type(exc).__name__, exc))
        return 3


def _is_nowhere() -> bool:
    """True if the working folder has been removed."""
    try:
        os.getcwd()
        return False
    except FileNotFoundError:
        return True


def write_output(data: bytes) -> None:
    """Write to standard output, at once.  Raises ``BrokenPipeError``, ``SeamlessError``."""
    if not data:
        return
    if sys.stdout is None:                  # ">&-"
        raise SeamlessError("there is no standard output to print the result to: it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        _drop_output()
        raise SeamlessError("standard output cannot be written: %s" % exc.strerror) from exc


def _drop_output() -> None:
    """Let what is still to be written go nowhere, so that Python does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals():
    """SIGTERM, SIGQUIT and SIGHUP end the program as Ctrl-C does: with its job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
              if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
