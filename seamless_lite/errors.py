"""The exceptions of seamless_lite, and the JSON form in which they cross a wire.

One family under ``SeamlessError``.  A caller cares about few differences: the user's own code failed
(``JobError``), the user asked for something impossible (``UsageError``, ``ConfigurationError``,
``FunctionError``, ``CelltypeError``), data is missing or damaged (``CacheMissError``,
``CorruptBufferError``), a service or worker died (``ServiceError``: worth another try), a deadline
passed (``DeadlineError``), or somebody cancelled (``JobCancelledError``).

Every message is one sentence that says what is wrong, where, and what to do about it.
"""
import typing as _t


class SeamlessError(Exception):
    """Base class.  ``str(error)`` is a complete sentence for a person; ``exit_code`` is for programs."""
    exit_code = 1


class UsageError(SeamlessError):
    """A command line or a call that cannot mean anything."""
    exit_code = 2


class ConfigurationError(SeamlessError):
    """A configuration file, or a stage or cluster that was asked for, is wrong."""


class FunctionError(SeamlessError, TypeError):
    """A Python function cannot become a transformation, or was called with wrong arguments."""


class CelltypeError(SeamlessError, TypeError):
    """A value cannot be written as, or a buffer cannot be read as, the given celltype."""


class ChecksumError(SeamlessError, ValueError):
    """Something that should be a checksum is not 64 hexadecimal digits."""


class CacheMissError(SeamlessError):
    """A buffer that is needed is in none of the stores that were asked."""


class CorruptBufferError(SeamlessError):
    """Stored or received bytes do not hash to their name."""


class ServiceError(SeamlessError):
    """A service cannot be reached, died, or answered nonsense.  The only kind worth another try."""


class DeadlineError(SeamlessError, TimeoutError):
    """Something did not finish in the time that it was given."""


class JobCancelledError(SeamlessError):
    """The job was cancelled before it had a result."""
    exit_code = 130


class JobWritten(SeamlessError):
    """The job did not run: it was written to ``folder`` where it would have run, as was asked for."""
    PREFIX = "the job was not run, but written to "

    @property
    def folder(self) -> str:
        """An absolute path, on the executing side."""
        return self.args[0][len(self.PREFIX):]


class JobError(SeamlessError, RuntimeError):
    """The user's function or command failed.

    ``traceback`` is the text of the user's own traceback ("" for commands), ``logs`` the end of what
    the job printed, ``returncode`` the exit code of a command (negative: the signal that killed it;
    None for functions), ``partial`` the checksum of what a command had written to stdout by then.
    """

    def __init__(self, message, traceback="", logs="", returncode=None, partial=None):
        super().__init__(message)
        self.traceback = traceback
        self.logs = logs
        self.returncode = returncode
        self.partial = partial

    def __str__(self):
        text = self.args[0]
        if self.traceback:
            text += "\n" + self.traceback.rstrip("\n")
        if self.logs:
            text += "\n--- output of the job ---\n" + self.logs.rstrip("\n")
        return text


class WorkerDiedError(JobError):
    """The process that ran the job died (twice): out of memory, killed, or crashed."""


_FIELDS = ("traceback", "logs", "returncode", "partial")


def error_to_dict(error: BaseException) -> dict:
    """The JSON form of ``error``: kind, message and, for jobs, traceback, logs and returncode."""
    kind = type(error).__name__
    if kind not in _KINDS:
        return {"kind": "SeamlessError", "message": "%s: %s" % (kind, error)}
    data: _t.Dict[str, object] = {"kind": kind, "message": str(error.args[0]) if error.args else kind}
    for name in _FIELDS:
        if getattr(error, name, None):
            data[name] = getattr(error, name)
    return data


def error_from_dict(data: dict) -> SeamlessError:
    """The exception that ``data`` describes; an unknown kind becomes a plain ``SeamlessError``."""
    cls = _KINDS.get(str(data.get("kind")), SeamlessError)
    message = str(data.get("message") or "an error without a message")
    if issubclass(cls, JobError):
        return cls(message, **{name: data[name] for name in _FIELDS if data.get(name) is not None})
    return cls(message)


def _family(cls):
    yield cls
    for sub in cls.__subclasses__():
        yield from _family(sub)


_KINDS = {cls.__name__: cls for cls in _family(SeamlessError)}
