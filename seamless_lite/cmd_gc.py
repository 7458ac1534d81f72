"""``seamless-gc``: say how much the buffer store holds, delete what has not been used for long, and pin what shall stay."""
import contextlib
import os
import re
import sys
import time
import typing as _t

from . import commandline, gc, program
from .checksum import Checksum
from .confirm import size_of
from .errors import SeamlessError, UsageError
from .folder import Folder
from .pins import Pins
from .progress import size_text
from .resulttable import ResultTable

PROGRAM = "seamless-gc"
_UNITS = {"min": 60.0, "h": 3600.0, "d": gc.DAY_S, "w": 7 * gc.DAY_S, "y": 365 * gc.DAY_S}
_LEAST_GRACE_S = 3600.0
_DESCRIPTION = """\
Delete buffers that have not been used for long from the store of this folder's configuration, or from the folder that
--destination names; without a limit, say how much there is and what could go.

The least recently used go first.  What stays in any case: what was used within the time that --grace says; what jobs
need that run or wait in a program that runs; what is pinned; what a seamless.db given with --share-with refers to.  What
waits in a queue file while no seamless-queue runs stays for the time of --grace alone.  Others may work in the store
meanwhile.  The records of results stay: a command or function whose result was deleted simply runs again when it is
wanted.  SIZE is a number and a unit (kB MB GB TB, or KiB MiB GiB), AGE a number and min, h, d, w or y."""
_EXAMPLES = ("seamless-gc                                    # how much is there, and what could go",
             "seamless-gc --older-than 90d -n                # what would be deleted",
             "seamless-gc --max-size 50GB --older-than 1y",
             "seamless-gc --pin figure.png.CHECKSUM          # the result stays, with all that it was made from",
             "seamless-gc --destination /data/buffers --share-with /data/other/seamless.db --max-size 1TB")


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(PROGRAM, _DESCRIPTION, "0 done, also if nothing had to be deleted; 1 it cannot be done", _EXAMPLES)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-size", metavar="SIZE", help="delete until all buffers together are not larger")
    limits.add_argument("--older-than", metavar="AGE", help="delete what was not used for so long")
    limits.add_argument("--grace", metavar="AGE", help="delete nothing that was used within this time; default 25h, as Seamless 1.x and "
                                                       "programs of other users leave a trace once a day; at least 1h")
    limits.add_argument("-n", "--dry-run", action="store_true", help="list what would be deleted, and why; delete nothing")
    keep = parser.add_argument_group("what is kept")
    keep.add_argument("--pin", metavar="CHECKSUM", action="append", default=[],
                      help="keep this transformation or buffer, or the one whose checksum is in this file; with code, inputs and result (repeatable)")
    keep.add_argument("--unpin", metavar="CHECKSUM", action="append", default=[], help="remove a pin (repeatable)")
    keep.add_argument("--pins", action="store_true", help="list the pins: checksum, date, and what --pin was given")
    keep.add_argument("--share-with", metavar="FILE.db", action="append", default=[],
                      help="keep all that the results in this seamless.db refer to (repeatable)")
    store = parser.add_argument_group("which store")
    commandline.add_store(store)
    return commandline.run(parser, argv, lambda arguments: _Command(arguments).run())


class _Command:
    """One invocation."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.max_size = size_of(arguments.max_size, "--max-size") if arguments.max_size is not None else None
        if self.max_size is not None and not arguments.max_size.rstrip()[-1:].isalpha():
            raise UsageError("--max-size is '%s': it takes a number and a unit such as kB, MB or GB" % arguments.max_size)
        self.older_than_s = _seconds(arguments.older_than, "--older-than") if arguments.older_than is not None else None
        self.grace_s = _seconds(arguments.grace, "--grace") if arguments.grace is not None else gc.GRACE_S
        if self.grace_s < _LEAST_GRACE_S:
            raise UsageError("--grace is '%s': it takes 1h at least, because jobs that run say so only now and then" % arguments.grace)
        self.directory, file = commandline.store_here(arguments, PROGRAM)
        self.results = _table(file) if file is not None else None
        self.pins = Pins(self.directory)

    def run(self) -> int:
        arguments = self.arguments
        for given in arguments.unpin:
            if not self.pins.remove(commandline.checksum_argument(given)):
                raise SeamlessError("%s is not pinned; see --pins" % given)
        for given in arguments.pin:
            self.pin(commandline.checksum_argument(given), given)
        if arguments.pins:
            for pin in self.pins.list():
                print("%s  %s  %s" % (pin.checksum, _date(pin.made_s), pin.name))
        limited = self.max_size is not None or self.older_than_s is not None
        if limited or not (arguments.pin or arguments.unpin or arguments.pins):
            self.warn()
            delete = limited and not arguments.dry_run
            with gc.collecting(self.directory) if delete else contextlib.nullcontext():
                self.collect(limited, delete)
        return 0

    def pin(self, checksum: Checksum, given: str) -> None:
        """Pin it, and see to it that what it keeps is in use: a run that is deleting now has not read the new pin."""
        folder = Folder(self.directory)
        known = self.results is not None and (self.results.get(checksum) is not None or self.results.irreproducible(checksum))
        if not known and not folder.has([checksum])[0]:
            raise SeamlessError("there is neither a buffer nor a result of %s in %s" % (checksum, self.directory))
        survey = gc.Survey(self.directory, self.results, 0.0)
        makers = survey.makers(checksum)
        self.pins.add(checksum, given, makers)
        survey.keep_pinned([checksum, *makers])
        folder.has(survey.kept)

    def warn(self) -> None:
        """Say what cannot be seen."""
        if os.statvfs(self.directory).f_flag & getattr(os, "ST_NOATIME", 0):
            program.say(PROGRAM, "the file system of %s is mounted with noatime: that Seamless 1.x or others read a buffer is not "
                                 "seen there" % self.directory)

    def collect(self, limited: bool, delete: bool) -> None:
        """Look, and delete or report."""
        survey = gc.Survey(self.directory, self.results, self.grace_s)
        if delete:
            gc.take_back(survey)
        pins = [name for pin in self.pins.list() for name in (pin.checksum, *pin.makers)]
        survey.keep_pinned(pins)
        if self.results is None and limited and any(survey.is_transformation(pin) for pin in pins):
            raise SeamlessError("a transformation is pinned, and its result is only known from seamless.db: give it with --database")
        for file in self.arguments.share_with:
            survey.keep_shared(_table(file))
        victims = survey.choose(self.max_size, self.older_than_s)
        if limited and (not delete or self.arguments.verbose):
            for victim in victims:
                print("%s  %10s  used %s  %s" % (victim.checksum, size_text(victim.buffer.size), _date(victim.buffer.used_s),
                                                 "older than " + self.arguments.older_than if victim.is_old else "over " + self.arguments.max_size))
        if not delete:
            self.report(survey, victims, limited)
            return
        done = gc.Collected()
        try:
            gc.collect(survey, victims, done)
        finally:                            # also when interrupted
            _say("deleted %s of %s" % (_amount(done.count, done.size), self.directory))
        Folder(self.directory).remove_stale()
        for number, text in ((done.spared - done.refused, "needed again meanwhile"), (done.refused, "not yours to delete")):
            if number:
                _say("%d more stay: %s" % (number, text))
        count, size = survey.sizes().get("all", (0, 0))
        _say("%s are left" % _amount(count, size))
        if self.max_size is not None and size > self.max_size:
            _say("that is more than --max-size, but all the rest is kept, or was used in the last %s" % _span(self.grace_s))

    def report(self, survey: gc.Survey, victims: _t.Sequence[gc.Victim], limited: bool) -> None:
        """What there is, and what would go."""
        sizes = survey.sizes()
        if limited:
            _say("%s would be deleted" % _amount(len(victims), sum(victim.buffer.size for victim in victims)))
        _say("%s are in %s" % (_amount(*sizes.get("all", (0, 0))), self.directory))
        for key, text in (("pinned", "pinned"), ("shared", "shared with another seamless.db"),
                          ("in use", "used in the last %s, or needed by what was" % _span(self.grace_s)), ("free", "may be deleted")):
            if key in sizes:
                _say("  %s: %s" % (_amount(*sizes[key]), text))
        for days in () if limited else (1, 7, 30, 90, 365):
            old = survey.choose(None, days * gc.DAY_S)
            if old:
                _say("    %s: not used for %d day%s" % (_amount(len(old), sum(victim.buffer.size for victim in old)), days, "s" * (days > 1)))


def _table(file: str) -> ResultTable:
    if not os.path.isfile(file):
        raise SeamlessError("there is no file %s" % file)
    return ResultTable(file)                # it may have to be put right after a crash


def _seconds(text: str, option: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?) *(min|h|d|w|y)", text.strip())
    if not match:
        raise UsageError("%s is '%s': it takes a number and min, h, d, w or y" % (option, text))
    return float(match[1]) * _UNITS[match[2]]


def _say(text: str) -> None:
    print(text, flush=True)


def _amount(count: int, size: float) -> str:
    return "%d buffer%s (%s)" % (count, "" if count == 1 else "s", size_text(size))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _span(seconds: float) -> str:
    return "%g h" % (seconds / 3600)


if __name__ == "__main__":
    sys.exit(main())
