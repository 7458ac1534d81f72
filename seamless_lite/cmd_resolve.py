"""``seamless-resolve`` and ``seamless-fingertip``: the buffer with a given checksum, to a file or to standard output."""
import contextlib
import typing as _t

from . import commandline, config, outputs
from .checksum import Checksum
from .errors import CacheMissError, SeamlessError
from .transformation import Outcome

_CODES = "0 the buffer was written; 1 %s, or it cannot be written"


def resolve(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Write a buffer that is stored."""
    parser = _parser("seamless-resolve", "Write the buffer with this checksum, byte for byte. Nothing is run: for a buffer that is not kept,\n"
                     "see seamless-fingertip.", "there is no such buffer")
    return commandline.run(parser, argv, lambda arguments: _write(arguments, parser.prog, _refuse))


def fingertip(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Write a buffer; if it is not stored, make it again."""
    parser = _parser("seamless-fingertip", "Write the buffer with this checksum, byte for byte. One that is not stored (it was a scratch result,\n"
                     "or was deleted) is made again, if it is known which transformation made it, and that and its inputs\n"
                     "are stored, or can be made again too. It is not stored then, unless a command wrote it as a file. If\n"
                     "something else comes out, that is an error. Nothing is recorded of a command then: its variables\n"
                     "(--metavar) and its conda environment are not known. A function is recorded as irreproducible.",
                     "there is no such buffer, and it cannot be made")
    return commandline.run(parser, argv, lambda arguments: _write(arguments, parser.prog, _make))


def _parser(name: str, description: str, miss: str):
    parser = commandline.make_parser(name, description, _CODES % miss, [
        name + " 5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", name + " --output result.txt result.txt.CHECKSUM"])
    parser.add_argument("checksum", metavar="CHECKSUM", help="64 hexadecimal digits, or the name of a file that holds them")
    commandline.add_storage(parser)
    add_debug(parser)
    parser.add_argument("--output", metavar="FILE", help="write to this file (default: standard output)")
    return parser


def add_debug(parser) -> None:
    """``--debug``, as Seamless 1.x calls it."""
    parser.add_argument("--debug", dest="verbose", action="store_const", const=2, help="the same as -vv")


def _write(arguments, name: str, when_missing: _t.Callable[[_t.Any, Checksum], None]) -> None:
    checksum = commandline.checksum_argument(arguments.checksum)
    with contextlib.closing(commandline.open_session(arguments)) as session, config.using(session):
        results = outputs.Results(session.supply, Outcome(checksum), name)
        try:
            file = results.open(checksum)
        except CacheMissError:
            when_missing(session, checksum)
            file = results.open(checksum)
        with file:
            if arguments.output is None:
                results.copy(file)
            else:
                write_to(arguments.output, file)


def write_to(path: str, file: _t.BinaryIO) -> None:
    """Write what ``--output`` asks for.  Raises ``SeamlessError``."""
    try:
        outputs.write_over(path, file)
    except OSError as exc:
        raise SeamlessError("'%s' cannot be written: %s" % (path, exc.strerror)) from exc


def _refuse(session, checksum: Checksum) -> None:
    from .references import makers          # hardly ever needed
    found = makers(checksum, session.store, session.stores.results)
    raise CacheMissError("buffer %s is in none of the stores%s" % (checksum, "" if not found else (
        ", but transformation %s made it: seamless-fingertip may make it again" % found[0])))


def _make(session, checksum: Checksum) -> None:
    from .fingertip import make
    make(session, checksum)
