"""``seamless-init``: start the services that the configuration asks for, and say which they are."""
import sys
import typing as _t

from . import commandline
from .session import Session

PROGRAM = "seamless-init"


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = commandline.make_parser(
        PROGRAM, "Read the configuration of this folder and start its services, or find them running.",
        "0 they run, or none is needed; 1 the configuration is wrong, or a service does not start")
    commandline.add_storage(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing if all is well")
    return commandline.run(parser, argv, _init)


def _init(arguments) -> int:
    settings = commandline.settings_of(arguments)
    session = Session(settings)
    try:
        connections = session.connect()
    finally:
        session.close()
    if not arguments.quiet:
        for connection in connections.values():
            print("%-11s %-8s %s (pid %d)" % (connection.service, "started" if connection.started else "runs",
                                              connection.address, connection.pid))
        for client in settings.remote_clients or ():
            print("%-11s named    %s" % (client.service, client.url or client.directory))
        if not connections and not settings.remote_clients:
            print("No service is needed: jobs run in the calling process%s." % (
                ", results are kept in %s" % settings.buffer_directory if settings.buffer_directory else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
