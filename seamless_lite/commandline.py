"""What the commands about stored things share: their options, the stores that these name, and checksums as arguments."""
import argparse
import os
import sys
import typing as _t

from . import program
from .checksum import Checksum, is_checksum
from .errors import ConfigurationError, SeamlessError, UsageError
from .inputs import read_checksum_file
from .session import Session
from .settings import Settings, load_settings

EXIT_CODES = "2 wrong usage; 3 a bug in this program; 130 interrupted"
#: What all commands take from the environment that read a configuration.
_CONFIGURATION = ["  SEAMLESS_CACHE=DIR   everything is in DIR, and no configuration file is read",
                  "  SEAMLESS_REMOTE_CLIENTS=JSON   servers that run already, whatever files say",
                  "  SEAMLESS_HOME=DIR   instead of ~/.seamless"]


def make_parser(name: str, description: str, exit_codes: str, examples: _t.Sequence[str] = (), environment: str = "",
                configured: bool = True) -> argparse.ArgumentParser:
    """A parser with the help that all commands have.

    ``exit_codes`` says what 0 and 1 mean, and what else is special: "0 done; 1 there is no such buffer".
    ``environment``: lines about environment variables; those that the configuration depends on follow if ``configured``.
    """
    epilog = "examples:\n%s\n\n" % "\n".join("  " + line for line in examples) if examples else ""
    epilog += "exit codes:\n  %s;\n  %s" % (exit_codes, EXIT_CODES)
    variables = environment.rstrip().splitlines() + _CONFIGURATION * configured
    epilog += "\n\nenvironment:\n%s" % "\n".join(variables) if variables else ""
    parser = argparse.ArgumentParser(name, description=description, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: tracebacks)")
    return parser


def add_storage(parser) -> None:
    """``--project`` and ``--stage``: which storage."""
    parser.add_argument("--project", metavar="P[:SUB]", help="storage of this project and subproject")
    parser.add_argument("--stage", metavar="S[:SUB]", help="use this stage and substage of the configuration")


def add_store(parser) -> None:
    """As ``add_storage``, or the folder that ``--destination`` names."""
    add_storage(parser)
    parser.add_argument("--destination", metavar="DIR", help="use this buffer folder, and read no configuration")
    parser.add_argument("--database", metavar="FILE", help="the seamless.db that goes with --destination (default: DIR/seamless.db)")


def add_answers(parser) -> None:
    """``-y`` and ``-n``: the answer to questions about sizes."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-y", "--yes", action="store_true", help="transfer much without asking (default if the store is a folder on this machine)")
    group.add_argument("-n", "--no", action="store_true", help="do not ask, and do not transfer much")


def run(parser: argparse.ArgumentParser, argv: _t.Optional[_t.Sequence[str]], action: _t.Callable[[_t.Any], _t.Optional[int]]) -> int:
    """Parse ``argv`` and do ``action(arguments)``; returns the exit code, whatever goes wrong (see ``program.guarded``)."""
    try:
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as exc:               # --help, or a wrong option
        return exc.code if isinstance(exc.code, int) else 2
    return program.guarded(parser.prog, lambda: action(arguments) or 0, arguments.verbose > 1)


def settings_of(arguments, cwd: _t.Optional[str] = None, **keywords) -> Settings:
    """The settings of this folder (or ``cwd``), as ``--project`` and ``--stage`` say; warnings go to stderr.  Raises ``ConfigurationError``."""
    project, _, subproject = (arguments.project or "").partition(":")
    stage, _, substage = (arguments.stage or "").partition(":")
    settings = load_settings(cwd or os.getcwd(), project=project or None, subproject=subproject or None, stage=stage or None,
                             substage=substage or None, environ=os.environ, **keywords)
    for warning in settings.warnings:
        print(warning, file=sys.stderr)
    return settings


def open_session(arguments, **keywords) -> Session:
    """A session for ``settings_of(arguments)``; the caller closes it."""
    return Session(settings_of(arguments, **keywords), who=None if getattr(arguments, "quiet", False) else "seamless_lite")


def named_store(arguments, is_made: bool = False) -> _t.Optional[_t.Tuple[str, str]]:
    """The buffer folder and ``seamless.db`` of ``--destination`` and ``--database``; None if the configuration says which.

    Raises ``SeamlessError`` if what was named is not there, unless it ``is_made`` then.
    """
    if arguments.destination is None:
        if arguments.database is not None:
            raise UsageError("--database needs --destination")
        return None
    if not arguments.destination:
        raise UsageError("--destination is empty: it takes the name of a folder")
    if arguments.project or arguments.stage:
        raise UsageError("--destination excludes --project and --stage")
    directory = os.path.abspath(os.path.expanduser(arguments.destination))
    if not (os.path.isdir(directory) or is_made and not os.path.lexists(directory)):
        raise SeamlessError("there is no buffer folder %s" % directory)
    if arguments.database is not None and not (os.path.isfile(arguments.database) or is_made):
        raise SeamlessError("there is no file %s; --database takes a seamless.db" % arguments.database)
    return directory, os.path.abspath(arguments.database or os.path.join(directory, "seamless.db"))


def store_here(arguments, name: str) -> _t.Tuple[str, _t.Optional[str]]:
    """The buffer folder, which is on this machine, and its ``seamless.db`` if there is one, for the program ``name``.

    Raises ``SeamlessError``.
    """
    directory, database = named_store(arguments) or _configured_store(arguments, name)
    if not os.path.isdir(directory):
        raise SeamlessError("there is no buffer folder %s: nothing was stored there yet, or it was moved" % directory)
    return directory, database if os.path.exists(database) else None


def _configured_store(arguments, name: str) -> _t.Tuple[str, str]:
    settings = settings_of(arguments, execution="process")
    directory, database = settings.buffer_directory, settings.database_file
    if settings.remote_clients is not None or directory is None or database is None:
        raise ConfigurationError("the configuration names no buffer folder: give it with --destination")
    for service in ("hashserver", "database") if settings.cluster is not None else ():
        frontend = settings.cluster.frontend_of(service)
        if frontend is not None and not frontend.is_local:
            raise ConfigurationError("the store is on %s: run it there, as in: ssh %s %s --destination %s --database %s" % (
                frontend.hostname, frontend.ssh_hostname or frontend.hostname, name, directory, database))
    return directory, database


def checksum_argument(text: str) -> Checksum:
    """The checksum that an argument gives: 64 hexadecimal digits, or the name of a file that holds them.

    Raises ``UsageError`` if it is neither, ``SeamlessError`` if the file holds something else.
    """
    if is_checksum(text):
        return Checksum(text)
    try:
        return read_checksum_file(text)
    except FileNotFoundError:
        raise UsageError("'%s' is neither a checksum (64 hexadecimal digits) nor a file that holds one" % text) from None
    except OSError as exc:
        raise SeamlessError("the file %s cannot be read: %s" % (text, exc.strerror)) from exc
    except SeamlessError:
        there = "; '%s.CHECKSUM' may be what you mean" % text if os.path.exists(text + ".CHECKSUM") else ""
        raise UsageError("the file '%s' does not hold a checksum, which is 64 hexadecimal digits%s" % (text, there)) from None
