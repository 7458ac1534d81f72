"""``seamless-export`` and ``seamless-import``: take transformations with all that belongs to them to another store."""
import os
import sys
import typing as _t

from . import archive, commandline, program
from .durable import remove_file, sync_folder
from .errors import SeamlessError, UsageError
from .folder import Folder
from .progress import size_text
from .resulttable import ResultTable
from .stores import Stores


def _parser(name: str, description: str, exit_codes: str, examples: _t.Sequence[str]):
    parser = commandline.make_parser(name, description, exit_codes, examples)
    commandline.add_store(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing if all is well")
    return parser


def _with_stores(arguments, action: _t.Callable[[Stores], int], is_made: bool = False) -> int:
    """``action`` with the stores of the configuration, or those that ``--destination`` names."""
    named = commandline.named_store(arguments, is_made)
    if named is None:
        session = commandline.open_session(arguments)
        try:
            if session.settings.buffer_directory is None and session.settings.remote_clients is None:
                raise SeamlessError("the configuration keeps nothing (persistent: false): use another stage, or --destination DIR")
            return action(session.stores)
        finally:
            session.close()
    stores = Stores(Folder(named[0]), ResultTable(named[1]))
    try:
        return action(stores)
    finally:
        stores.close()


def export(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """The program ``seamless-export``; returns its exit code."""
    parser = _parser(
        "seamless-export", """\
Write transformations or results with all that belongs to them (code, inputs, results, execution records) to one tar file.
seamless-import adds it to a store.  Unpacked with tar into an empty buffer folder it is a store by itself, for Seamless 1.x
too (for SEAMLESS_CACHE=DIR the folder is DIR/__TOPLEVEL__).  The same content gives the same bytes.""",
        "0 written; 1 something is missing, or the file cannot be written: then there is no file",
        ("seamless-export result.txt.CHECKSUM -o result.tar", "seamless-export result.txt.CHECKSUM -o - | ssh host seamless-import -"))
    parser.add_argument("checksums", nargs="+", metavar="CHECKSUM|FILE.CHECKSUM", help="a transformation, a result, or any other buffer")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the tar file; -: standard output")
    parser.add_argument("--no-inputs", action="store_true", help="leave out code and inputs: only transformations, results and rows")
    parser.add_argument("--incomplete", action="store_true", help="export what is there if some of it is missing")
    return commandline.run(parser, argv, lambda arguments: _with_stores(arguments, lambda stores: _export(arguments, stores)))


def _export(arguments, stores: Stores) -> int:
    roots = [commandline.checksum_argument(text) for text in arguments.checksums]
    who = None if arguments.quiet else "seamless-export"

    def write(file) -> archive.Exported:
        return archive.export(roots, stores, file, not arguments.no_inputs, arguments.incomplete, who)
    if arguments.output == "-":
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError("an archive is not for the terminal: redirect standard output, or name a file")
        done = write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:
        done = _write_file(arguments.output, write)
    for name in done.missing:
        program.say("seamless-export", "missing: %s" % name)
    if not arguments.quiet:
        program.say("seamless-export", "%d buffers (%s), %d results" % (done.buffers, size_text(done.size), done.rows))
    return 0


def _write_file(path: str, write: _t.Callable[[_t.BinaryIO], archive.Exported]) -> archive.Exported:
    """``write`` to a file that gets its name when it is whole; a pipe or device is written as it is."""
    path = os.path.realpath(path)
    aside = "%s-%s" % (path, os.urandom(4).hex())
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                return write(file)
        try:
            with open(aside, "xb") as file:
                done = write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(os.path.dirname(path))
            return done
        finally:
            remove_file(aside)
    except OSError as exc:
        raise SeamlessError("the file %s cannot be written: %s" % (path, exc.strerror)) from exc


def import_(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """The program ``seamless-import``; returns its exit code."""
    parser = _parser(
        "seamless-import", """\
Add what seamless-export wrote to a store.  Every checksum is verified, and nothing is written anywhere but in the store.  What
is there already is skipped, so that an import that was interrupted can be repeated.  A transformation that has another
result here keeps it, and is reported.""",
        "0 done; 1 an archive is damaged or holds what has no place in a store: then none of its results is recorded,\n"
        "  and the files after it are not read",
        ("seamless-import result.tar", "seamless-import --dry-run -v result.tar", "seamless-import --destination ~/buffers - < result.tar"))
    parser.add_argument("files", nargs="+", metavar="FILE", help="a tar file; -: standard input")
    parser.add_argument("--dry-run", action="store_true", help="read and verify, list what would be added, and store nothing")
    return commandline.run(parser, argv, lambda arguments: _with_stores(arguments, lambda stores: _import(arguments, stores), True))


def _import(arguments, stores: Stores) -> int:
    tell = print if arguments.dry_run or arguments.verbose else lambda line: None
    done = archive.Import(stores, arguments.dry_run, tell, None if arguments.quiet else "seamless-import")
    for path in arguments.files:
        if path == "-":
            if sys.stdin is None:
                raise SeamlessError("standard input is closed")
            done.read(sys.stdin.buffer, "on standard input")
            continue
        try:
            file = open(path, "rb")
        except OSError as exc:
            raise SeamlessError("the archive %s cannot be read: %s" % (path, exc.strerror)) from exc
        with file:
            done.read(file, path, os.fstat(file.fileno()).st_size)
    for name, here, there in done.kept:
        program.say("seamless-import", "transformation %s has the result %s here, but %s in the archive: it keeps its own" % (name, here, there))
    if not arguments.quiet:
        program.say("seamless-import", "%s%d buffers (%s) and %d results; %d buffers and %d results were there" % (
            "would add " if arguments.dry_run else "added ", done.added, size_text(done.size), done.rows, done.there, done.known_rows))
    return 0
