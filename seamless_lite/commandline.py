"""What the commands about stored things share: their options, the stores that these name, and checksums as arguments."""
import argparse
import os
import sys
import typing as _t

from . import program
from .checksum import Checksum, is_checksum
from .errors import UsageError
from .inputs import read_checksum_file
from .session import Session
from .settings import Settings, load_settings

EXIT_CODES = "2 wrong usage; 3 a bug in this program; 130 interrupted"


def make_parser(name: str, description: str, exit_codes: str, examples: _t.Sequence[str] = (), environment: str = "",
                **keywords) -> argparse.ArgumentParser:
    """A parser with the help that all commands have.

    ``exit_codes`` says what 0 and 1 mean, and what else is special: "0 done; 1 there is no such buffer".
    ``environment``: lines about environment variables.
    """
    epilog = "examples:\n%s\n\n" % "\n".join("  " + line for line in examples) if examples else ""
    epilog += "exit codes:\n  %s;\n  %s" % (exit_codes, EXIT_CODES)
    epilog += "\n\nenvironment:\n%s" % environment if environment else ""
    parser = argparse.ArgumentParser(name, description=description, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: tracebacks)")
    return parser


def add_storage(parser) -> None:
    """``--project`` and ``--stage``: which storage."""
    parser.add_argument("--project", metavar="P[:SUB]", help="storage of this project and subproject")
    parser.add_argument("--stage", metavar="S[:SUB]", help="use this stage and substage of the configuration")


def add_answers(parser) -> None:
    """``-y`` and ``-n``: the answer to questions about sizes."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-y", "--yes", action="store_true", help="transfer much without asking")
    group.add_argument("-n", "--no", action="store_true", help="do not ask, and do not transfer much")


def run(parser: argparse.ArgumentParser, argv: _t.Optional[_t.Sequence[str]], action: _t.Callable[[_t.Any], _t.Optional[int]]) -> int:
    """Parse ``argv`` and do ``action(arguments)``; returns the exit code, whatever goes wrong (see ``program.guarded``)."""
    try:
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as exc:               # --help, or a wrong option
        return exc.code if isinstance(exc.code, int) else 2
    return program.guarded(parser.prog, lambda: action(arguments) or 0, arguments.verbose > 1)


def settings_of(arguments, **keywords) -> Settings:
    """The settings of this folder, as ``--project`` and ``--stage`` say; warnings go to stderr.  Raises ``ConfigurationError``."""
    project, _, subproject = (arguments.project or "").partition(":")
    stage, _, substage = (arguments.stage or "").partition(":")
    settings = load_settings(os.getcwd(), project=project or None, subproject=subproject or None, stage=stage or None,
                             substage=substage or None, environ=os.environ, **keywords)
    for warning in settings.warnings:
        print(warning, file=sys.stderr)
    return settings


def open_session(arguments, **keywords) -> Session:
    """A session for ``settings_of(arguments)``; the caller closes it."""
    return Session(settings_of(arguments, **keywords), who=None if getattr(arguments, "quiet", False) else "seamless_lite")


def checksum_argument(text: str) -> Checksum:
    """The checksum that an argument gives: 64 hexadecimal digits, or the name of a file that holds them.

    Raises ``UsageError`` if it is neither, ``SeamlessError`` if the file holds something else.
    """
    if is_checksum(text):
        return Checksum(text)
    if not os.path.exists(text):
        raise UsageError("'%s' is neither a checksum (64 hexadecimal digits) nor a file that holds one" % text)
    return read_checksum_file(text)
