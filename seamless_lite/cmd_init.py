"""``seamless-init``: start the services that the configuration asks for, and say which they are."""
import argparse
import os
import sys
import typing as _t

from . import program
from .session import Session
from .settings import load_settings

PROGRAM = "seamless-init"


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Read the configuration of this folder and start its services, or find them running.",
        epilog="exit codes:\n  0 they run, or none is needed; 1 the configuration is wrong, or a service does not start;\n"
               "  2 wrong usage; 3 a bug in this program; 130 interrupted")
    parser.add_argument("--project", metavar="PROJECT[:SUBPROJECT]", default="", help="instead of the project in seamless.yaml")
    parser.add_argument("--stage", metavar="STAGE[:SUBSTAGE]", default="", help="the stage to start the services of")
    parser.add_argument("-q", action="store_true", dest="quiet", help="say nothing if all is well")
    parser.add_argument("-v", action="count", default=0, dest="verbose", help="say more")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return program.guarded(PROGRAM, lambda: _init(arguments), arguments.verbose > 1)


def _init(arguments) -> int:
    project, _, subproject = arguments.project.partition(":")
    stage, _, substage = arguments.stage.partition(":")
    settings = load_settings(os.getcwd(), project=project or None, subproject=subproject or None, stage=stage or None,
                             substage=substage or None, environ=os.environ)
    for warning in settings.warnings:
        program.say(PROGRAM, warning)
    session = Session(settings)
    try:
        connections = session.connect()
    finally:
        session.close()
    if not arguments.quiet:
        for connection in connections.values():
            print("%-11s %-8s %s (pid %d)" % (connection.service, "started" if connection.started else "runs",
                                              connection.address, connection.pid))
        if not connections:
            print("No service is needed: jobs run in the calling process%s." % (
                ", results are kept in %s" % settings.buffer_directory if settings.buffer_directory else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
