"""``seamless-service``: look at the services that run on this machine or on another host, stop them, remove everything there."""
import argparse
import contextlib
import os
import sys
import time
import typing as _t

from . import hosts, launch, program
from .clusters import Definitions, is_this_machine
from .errors import ConfigurationError, ServiceError, UsageError
from .settings import home_of, seamless_home

PROGRAM = "seamless-service"
DESCRIPTION = """\
Services are started by themselves when they are needed, and end when they are idle. This program looks at those of
yours, and ends them.

  ps [HOST]                      list the services that run
  stop KEY|NAME|--all [HOST]     stop the services with this key or name, or all of them
  logs KEY|NAME [HOST]           print the end of the newest log, also of a service that is dead
  uninstall HOST                 stop all services there and remove what was put there; stored results are
                                 kept, and named with their size, unless --data

HOST is a hostname or ssh_hostname of your cluster files, or any name as ssh is given it; without one, this machine."""
EPILOG = """\
examples:
  seamless-service ps
  seamless-service logs jobserver-my-project login.example.org
  seamless-service stop --all login.example.org
  seamless-service uninstall login.example.org

exit codes:
  0 done; 1 there is no such service or log, the host cannot be reached, or something could not be done;
  2 wrong usage; 3 a bug in this program; 130 interrupted"""
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def main(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, formatter_class=argparse.RawDescriptionHelpFormatter, description=DESCRIPTION,
                                     epilog=EPILOG, usage="%(prog)s [-h] [-v] COMMAND ...")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: tracebacks)")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND", help="ps, stop, logs or uninstall")
    parser.add_argument("words", nargs="*", metavar="KEY|NAME|HOST", help="which service, and on which host")
    parser.add_argument("--all", action="store_true", help="stop: all services of yours")
    parser.add_argument("--data", action="store_true", help="uninstall: the stored results, too")
    arguments = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    return program.guarded(PROGRAM, lambda: COMMANDS[arguments.command](arguments), arguments.verbose > 1)


def _ps(arguments) -> int:
    (host,) = _words(arguments, "HOST")
    records = launch.far(_place(host), "services")
    rows = [("KEY", "PID", "STATUS", "STARTED", "PYTHON", "ADDRESS")]
    rows += [(str(record.get("key")), str(record.get("pid")), str(record.get("status")), _when(record.get("started_at")),
              str(record.get("python") or (record.get("command") or ["?"])[0]), _where(record)) for record in records]
    if not records:
        return _none_runs(host)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())
    return 0


def _stop(arguments) -> int:
    if arguments.all:
        (host,) = _words(arguments, "HOST")
        which = [record["name"] for record in launch.far(_place(host), "services")]
    else:
        key, host = _words(arguments, "KEY|NAME", "HOST")
        which = [key]
    stopped, errors = [], []
    for name in which:
        try:
            stopped += launch.far(_place(host), "stop", which=name)
        except ServiceError as exc:         # the others can be stopped all the same
            errors.append(exc)
    for name in stopped:
        print("stopped %s" % name)
    for error in errors:
        program.say(PROGRAM, str(error))
    if stopped or errors:
        return 1 if errors else 0
    if arguments.all:
        return _none_runs(host)
    program.say(PROGRAM, "no service with the key or name %s runs on %s; 'seamless-service ps%s' lists those that run" % (
        which[0], host or "this machine", " " + host if host else ""))
    return 1


def _none_runs(host: _t.Optional[str]) -> int:
    program.say(PROGRAM, "no service of yours runs on %s" % (host or "this machine"))
    return 0


def _logs(arguments) -> int:
    key, host = _words(arguments, "KEY|NAME", "HOST")
    text = launch.far(_place(host), "logs", which=key)
    if text is None:
        program.say(PROGRAM, "there is no log of a service with the key or name %s on %s" % (key, host or "this machine"))
        return 1
    program.write_output(text.encode("utf-8"))
    return 0


def _uninstall(arguments) -> int:
    (host,) = _words(arguments, "HOST", required=True)
    place = _place(host)
    done = launch.far(place, "uninstall", data=arguments.data)
    for name in done["stopped"]:
        print("stopped %s" % name)
    for path, size in done["kept"]:
        print("kept %s on %s: %s of stored results" % (path, done["node"], _bytes(size)))
    if done["left"]:
        print("%s on %s still holds %s" % (done["home"], done["node"], ", ".join(done["left"])))
    else:
        print("removed %s on %s" % (done["home"], done["node"]))
    if place.ssh is not None:
        hosts.host(place.ssh, place.python).log_out()
    return 0


COMMANDS = {"ps": _ps, "stop": _stop, "logs": _logs, "uninstall": _uninstall}


def _words(arguments, *names: str, required: bool = False) -> list:
    """The words after the command, one for each of ``names``; HOST may be missing (None) if it is not ``required``."""
    words = list(arguments.words)
    least = len(names) - (0 if required else 1)
    if not least <= len(words) <= len(names):
        raise UsageError("'%s' takes %s: see %s --help" % (
            arguments.command, " ".join("[%s]" % name if n >= least else name for n, name in enumerate(names)), PROGRAM))
    for option, command in (("all", "stop"), ("data", "uninstall")):
        if getattr(arguments, option) and arguments.command != command:
            raise UsageError("--%s belongs to '%s'" % (option, command))
    return words + [None] * (len(names) - len(words))


def _place(host: _t.Optional[str]) -> launch.Place:
    """Where HOST is, and which Python is to be used there, if the user's cluster files know it."""
    if is_this_machine(host):
        return launch.HERE
    definitions = Definitions(home_of(os.environ), seamless_home(os.environ))
    definitions.read_files()
    frontends = []
    for name in definitions.nodes:
        with contextlib.suppress(ConfigurationError):       # a definition that is wrong is another one
            frontends += definitions.build(name).frontends
    known = [frontend for frontend in frontends if host in (frontend.hostname, frontend.ssh_hostname)]
    # what ssh knows by this name comes before what only URLs call so
    known.sort(key=lambda frontend: host != (frontend.ssh_hostname or frontend.hostname))
    blocks = [block for frontend in known[:1] for block in (frontend.hashserver, frontend.database, frontend.jobserver, frontend.daskserver)]
    return launch.Place(ssh=known[0].ssh_hostname or known[0].hostname if known else host,
                        python=next((block.python for block in blocks if block and block.python), None))


def _where(record: dict) -> str:
    if record.get("socket"):
        return "unix://%s" % record["socket"]
    return "http://%s:%s" % (record.get("network_interface") or "127.0.0.1", record.get("port", "?"))


def _when(seconds) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if isinstance(seconds, (int, float)) else "?"


def _bytes(number: float) -> str:
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            break
        number /= 1000.0
    return "%.3g %s" % (number, unit) if unit != "bytes" else "%d bytes" % number


if __name__ == "__main__":
    sys.exit(main())
