"""``seamless-run-transformation`` and ``seamless-cancel``: transformations by their checksum."""
import contextlib
import io
import json
import os
import sys
import typing as _t

from . import commandline, config, program
from .checksum import Checksum
from .cmd_resolve import add_debug, write_to
from .errors import CacheMissError, JobCancelledError, SeamlessError, UsageError
from .transformation import Meta, Recipe

_RUN, _CANCEL = "seamless-run-transformation", "seamless-cancel"
_ENDED = {"unknown": "not-running", "canceled": "not-running"}     # canceled before
_WAIT_S = 60.0


def _parser(name: str, description: str, exit_codes: str, examples: _t.Sequence[str]):
    parser = commandline.make_parser(name, description, exit_codes, examples)
    parser.add_argument("checksum", metavar="CHECKSUM", help="of the transformation: 64 hexadecimal digits, or a file that holds them")
    commandline.add_storage(parser)
    add_debug(parser)
    return parser


# --- running ------------------------------------------------------------------------------------------

def run_transformation(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the transformation with a given checksum."""
    parser = _parser(_RUN, "Run a transformation that is stored, or find its result, and print the checksum of the result.\n"
                     "Inputs that are not stored are made again, if it is known how (see seamless-fingertip).",
                     "0 there is a result; 1 there is no such transformation, it failed, or cannot be run; 130 it was canceled",
                     ["seamless-run --dry --upload -j job 'wc -l data.csv'", _RUN + " job/transformation.json.CHECKSUM"])
    parser.add_argument("--direct-print", action="store_true", help="show what the job prints, as it comes, on standard error")
    parser.add_argument("--scratch", action="store_true", help="do not keep the result, only its checksum (result files are kept)")
    parser.add_argument("--fingertip", action="store_true", help="make missing inputs again (this is done in any case)")
    parser.add_argument("--strict", action="store_true", help="fail if the same transformation is running with other dunders, instead of "
                        "waiting for its result")
    parser.add_argument("--output", metavar="FILE", help="write the checksum to this file (default: standard output)")
    parser.add_argument("--dunder", metavar="FILE", help="JSON file with variables and the environment (default: dunder.json beside the "
                        "checksum file, if there is one)")
    return commandline.run(parser, argv, _run)


def _run(arguments) -> int:
    checksum = commandline.checksum_argument(arguments.checksum)
    dunders = _dunders(arguments)
    with contextlib.closing(commandline.open_session(arguments)) as session, config.using(session):
        recipe = _recipe(session, checksum)
        try:
            outcome = session.run(recipe, _meta(session, dunders, arguments), value=not arguments.scratch,
                                  log_fd=sys.stderr.fileno() if arguments.direct_print and sys.stderr else None)
        except KeyboardInterrupt:
            session.cancel(checksum)
            program.say(_RUN, "Canceled transformation %s" % checksum)
            raise
        error = outcome.exception()
        if isinstance(error, JobCancelledError):
            raise error
        if error is not None:               # with the user's traceback and what the job printed
            program.say(_RUN, error.args[0] if arguments.direct_print else str(error))
            return error.exit_code
        if arguments.verbose:
            program.say(_RUN, "the result is cached" if outcome.cached else "transformation %s has run" % checksum)
    data = outcome.result.encode("ascii") + b"\n"
    if arguments.output is None:
        program.write_output(data)
    else:
        write_to(arguments.output, io.BytesIO(data))
    return 0


def _recipe(session, checksum: Checksum) -> Recipe:
    """The transformation with this checksum.  Raises ``SeamlessError``."""
    try:
        data = session.get_buffer(checksum)
    except CacheMissError:
        raise CacheMissError("transformation %s is in none of the stores; upload it, as seamless-run --dry --upload does"
                             % checksum) from None
    try:
        recipe = Recipe.from_bytes(data)
    except (SeamlessError, ValueError, TypeError) as exc:
        raise SeamlessError("buffer %s is not a transformation: %s" % (checksum, exc)) from None
    if recipe.checksum != checksum:
        raise SeamlessError("buffer %s is not a transformation in the form that Seamless writes; what it describes is transformation %s"
                            % (checksum, recipe.checksum))
    return recipe


def _dunders(arguments) -> dict:
    """What ``--dunder`` names, or lies beside the checksum file.  Raises ``UsageError``."""
    path = arguments.dunder
    if path is None:
        path = os.path.join(os.path.dirname(arguments.checksum), "dunder.json")
        if not (os.path.isfile(arguments.checksum) and os.path.isfile(path)):
            return {}
    try:
        with open(path, encoding="utf-8") as file:
            dunders = json.load(file)
    except OSError as exc:
        raise UsageError("--dunder: '%s' cannot be read: %s" % (path, exc.strerror)) from None
    except ValueError as exc:
        raise UsageError("--dunder: '%s' is not JSON: %s" % (path, exc)) from None
    if not isinstance(dunders, dict):
        raise UsageError("--dunder: '%s' holds no JSON object" % path)
    return dunders


def _meta(session, dunders: dict, arguments) -> Meta:
    from .dunders import execution_meta     # few transformations have any
    if not dunders:
        return Meta(scratch=arguments.scratch, strict=arguments.strict)
    try:
        meta = execution_meta(dunders, session.get_buffer, arguments.scratch)
    except CacheMissError as exc:
        raise CacheMissError("a value in the dunder file is not stored: %s" % exc.args[0]) from None
    except (SeamlessError, ValueError) as exc:
        raise UsageError("the dunder file cannot be understood: %s" % exc) from None
    return meta._replace(strict=arguments.strict)


# --- cancelling ---------------------------------------------------------------------------------------

def cancel(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Cancel the transformation with a given checksum."""
    parser = _parser(_CANCEL, "Cancel a transformation that is running on the jobserver or daskserver of this configuration, whoever waits\n"
                     "for it, and print what became of it. No server is started. What runs in a program of its own is canceled\n"
                     "there, with Ctrl-C.",
                     "0 it was canceled; 1 the server cannot be asked, or CHECKSUM is none; 2 (after a line like 'jobserver: not-running') it is not running",
                     [_CANCEL + " 706b247db5f69ec5dc5b452a1a9164089faed42eaab3d461b8dfdf3217a36550"])
    return commandline.run(parser, argv, _cancel)


def _cancel(arguments) -> int:
    try:
        checksum = commandline.checksum_argument(arguments.checksum)
    except UsageError as exc:               # 2 has another meaning here
        raise SeamlessError(exc.args[0]) from None
    settings = commandline.settings_of(arguments)
    canceled, state = _ask(settings, checksum)
    print("%s: %s" % (settings.remote or settings.execution, state if canceled else _ENDED.get(state, state)))
    return 0 if canceled else 2


def _ask(settings, checksum: Checksum) -> _t.Tuple[bool, str]:
    """(whether it was canceled now, its state), as the server says that these settings name."""
    named = next((client.url for client in settings.remote_clients or () if client.service == "jobserver"), None)
    if named is not None:                   # SEAMLESS_REMOTE_CLIENTS: it may be one of Seamless 1.x
        from .httpclient import HttpClient
        with contextlib.closing(HttpClient(named)) as http:
            answer = http.request("POST", "/cancel-transformation/" + checksum, timeout_s=_WAIT_S).expect(200).json()
        return bool(answer.get("canceled")), str(answer.get("status"))
    if settings.remote is not None and settings.cluster is not None:
        from . import services              # only remote execution has any
        connection = services.running(settings)
        if connection is not None:
            with contextlib.closing(services.client(connection)) as client:
                was_running = client.status([checksum])[checksum]["state"] in ("queued", "running", "waiting")
                state = client.cancel([checksum], force=True)[checksum]
            return was_running and state == "canceled", state
    return False, "not-running"
