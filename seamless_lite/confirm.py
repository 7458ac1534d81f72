"""Much data is not moved over a network without asking: limits from the environment, and the question (compat/cli.md)."""
import os
import sys

from .errors import SeamlessError, UsageError
from .progress import size_text

#: What -> (files, bytes) that are moved without a question.
LIMITS = {"Upload": (400, "100 MB"), "Download": (2000, "500 MB")}
_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
          "KB": 2**10, **{unit + end: 2 ** (10 * power) for power, unit in enumerate("KMGTP", 1) for end in ("", "iB")}}


class Refused(SeamlessError):
    """The answer was no."""


def confirm(what: str, count: int, size: int, yes: bool = False, no: bool = False) -> None:
    """Ask at the terminal before ``what`` ("Upload" or "Download") moves many files or bytes; without one the answer is no.

    ``yes`` and ``no`` are answers given before.  Raises ``Refused`` if the answer is no, ``UsageError`` if a limit
    in the environment cannot be read.
    """
    prefix = "SEAMLESS_MAX_%s_" % what.upper()
    most_files, most_bytes = (read_size(prefix + name, default) for name, default in zip(("FILES", "SIZE"), LIMITS[what]))
    if yes or count <= most_files and size <= most_bytes:
        return
    question = "%s %d files, total %s" % (what, count, size_text(size))
    if not ask(question, no):
        raise Refused("%s: refused; answer yes at a terminal, add -y, or raise %sFILES or %sSIZE" % (question, prefix, prefix))


def ask(question: str, no: bool = False) -> bool:
    """Whether the user says yes at the terminal; False without a terminal, or if ``no`` was the answer before."""
    answer = "n" if no or sys.stdin is None or not sys.stdin.isatty() else ""
    while answer not in ("y", "yes", "n", "no"):
        sys.stderr.write(question + " (y/[n])? ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip().lower() or "n"
    return answer in ("y", "yes")


def read_size(variable: str, default) -> float:
    """The number with a unit that the environment has under this name, else ``default``.  Raises ``UsageError``."""
    return size_of(os.environ.get(variable, "").strip() or str(default), variable)


def size_of(text: str, what: str) -> float:
    """``text``, a number and perhaps a unit (``kB MB GB``: powers of 1000; ``K KB KiB M G``: of 1024), in bytes.

    Raises ``UsageError``, whose sentence begins with ``what``.
    """
    number = text.rstrip("kKMGTPiB ")
    try:
        size = float(number) * _UNITS[text[len(number):].strip()]
        if not size >= 0:                   # or not a number at all
            raise ValueError
        return size
    except (KeyError, ValueError):
        raise UsageError("%s is '%s': it takes a number and a unit such as kB, MB or GB" % (what, text)) from None
