"""``seamless-service-ps``, ``-resolve``, ``-inspect``, ``-logs``, ``-stop``, ``-rm`` and ``-clear``: services by what they serve.

``seamless-service`` names services by key and host; these commands of Seamless 1.x (compat/cli.md section 7) name them by
service, cluster, project and stage.  What is not said comes from the configuration of the folder.
"""
import json
import os
import re
import shutil
import typing as _t

from . import commandline, launch, program, services
from .clusters import Definitions
from .confirm import ask
from .errors import ConfigurationError, SeamlessError, ServiceError, UsageError
from .settings import TOPLEVEL, Settings, home_of, load_settings, seamless_home

SERVICES = ("hashserver", "database", "jobserver", "daskserver", "pure-daskserver")
_SELECTORS = (("cluster", "its cluster"), ("project", "its project (SEAMLESS_CACHE: the one without a name)"), ("subproject", "its subproject"),
              ("stage", "its stage"), ("substage", "its substage (jobserver, daskserver)"), ("queue", "its queue (pure-daskserver)"),
              ("frontend-name", "the hostname of the frontend that has it"))
#: What a folder of buffers, and one of results, may have that is ours.
_STORED = {"hashserver": re.compile(r"[0-9a-f]{2}|[0-9a-f]{64}(\..+|-[0-9a-f]{8})?|\.HASHSERVER_PREFIX(-[0-9a-f]{8})?|\.pins|\.COLLECTING|\.IGNORED|\.LOCK"),
           "database": re.compile(r"seamless\.db(-journal|-wal|-shm)?")}


# --- selecting ----------------------------------------------------------------------------------------------

def _command(action: _t.Callable, description: str, exit_codes: str, required: bool = False,
             options: _t.Mapping[str, dict] = {}) -> _t.Callable[..., int]:
    """The program ``seamless-service-X``, where ``action`` is ``_X``; ``required``: whether it is about one kind of service."""
    def program_of(argv: _t.Optional[_t.Sequence[str]] = None) -> int:
        parser = commandline.make_parser("seamless-service-" + action.__name__[1:], description, exit_codes)
        group = parser.add_argument_group("which service")
        group.add_argument("--service", choices=SERVICES, required=required, help="its kind")
        for option, text in _SELECTORS:
            group.add_argument("--" + option, metavar=option.upper(), help=text)
        group.add_argument("--mode", choices=("ro", "rw"), default="rw", help="default: rw")
        for option, keywords in options.items():
            parser.add_argument(*option.split(), **keywords)
        return commandline.run(parser, argv, action)
    return program_of


def _settings(arguments, **changes: _t.Optional[str]) -> Settings:
    """What the selectors mean, with the configuration of the folder for what they leave open.  Raises ``ConfigurationError``."""
    chosen = {"cluster": arguments.cluster, "project": arguments.project, **changes}
    project = TOPLEVEL if chosen["project"] == "SEAMLESS_CACHE" else chosen["project"]
    settings = load_settings(getattr(arguments, "workdir", None) or os.getcwd(), cluster=chosen["cluster"], project=project,
                             subproject=arguments.subproject, stage=arguments.stage, substage=arguments.substage,
                             execution="process", environ=os.environ)
    cluster = settings.cluster
    if cluster is not None and arguments.frontend_name is not None:
        frontends = tuple(frontend for frontend in cluster.frontends if frontend.hostname == arguments.frontend_name)
        if not frontends:
            raise ConfigurationError("%s: the cluster '%s' has no frontend with the hostname '%s'"
                                     % (cluster.where, cluster.name, arguments.frontend_name))
        settings = settings._replace(cluster=cluster._replace(frontends=frontends))
    return settings


def _key(settings: Settings, arguments) -> str:
    if arguments.service != "pure-daskserver":
        return settings.service_key(arguments.service, arguments.mode)
    return settings._replace(persistent=False, queue=_queue(settings, arguments)).service_key("daskserver")


def _queue(settings: Settings, arguments) -> _t.Optional[str]:
    """The queue of a pure-daskserver: as said, else as the folder's configuration or else the cluster says."""
    if arguments.service != "pure-daskserver":
        return arguments.queue
    return arguments.queue or settings.queue or (settings.cluster.default_queue if settings.cluster is not None else None)


def _find(arguments) -> _t.Tuple[Settings, str, launch.Place]:
    """The settings that count for the one service that the selectors name, its key, and where it is."""
    settings = _settings(arguments)
    return settings, _key(settings, arguments), _place(settings, arguments.service.replace("pure-", ""))


def _place(settings: Settings, service: str) -> launch.Place:
    """Where the configuration has this service; this machine if it has none."""
    if settings.cluster is None or settings.cluster.frontend_of(service) is None:
        return launch.HERE
    return services.place_of(settings, service)


def _places(settings: _t.Iterable[Settings]) -> _t.List[launch.Place]:
    """This machine, and the other hosts of the clusters."""
    found = {None: launch.HERE}
    for each in settings:
        for service in ("hashserver", "database", "jobserver", "daskserver"):
            place = _place(each, service)
            found.setdefault(place.ssh, place)
    return list(found.values())


def _selected(arguments, records: _t.Iterable[dict]) -> _t.List[_t.Tuple[dict, dict]]:
    """Those of the records that the selectors name, each with the parts of its key."""
    wanted = {option: getattr(arguments, option) for option in ("service", "cluster", "project", "subproject", "stage", "substage", "queue")}
    if wanted["project"] == "SEAMLESS_CACHE":
        wanted["project"] = TOPLEVEL
    return [(record, parts) for record, parts in ((record, _parts(str(record.get("key")))) for record in records)
            if parts is not None and all(value is None or parts.get(name) == value for name, value in wanted.items())
            and parts.get("mode") in (arguments.mode, None)]


def _parts(key: str) -> _t.Optional[_t.Dict[str, _t.Optional[str]]]:
    """The names in a service's key (``Settings.service_key``)."""
    pure = re.fullmatch(r"(?P<service>pure-daskserver)-(?P<cluster>[^-]+)(-(?P<queue>.+))?", key)
    found = pure or re.fullmatch(r"(?P<service>hashserver|database|jobserver|daskserver)-(?P<cluster>.+)-(?P<mode>rw|ro)-(?P<project>.+?)"
                                 r"(--(?P<subproject>(?!STAGE-).+?))?(--STAGE-(?P<stage>.+?)(SUBSTAGE-(?P<substage>.+))?)?", key)
    parts = found.groupdict() if found else None
    if parts and parts.get("subproject"):
        parts["subproject"] = parts["subproject"].replace("--", "/")
    return parts


# --- the commands -------------------------------------------------------------------------------------------

def _resolve(arguments) -> None:
    settings, key, place = _find(arguments)
    logs = [record.get("log") for record in launch.services() if record.get("key") == key] if place.ssh is None else []
    print(json.dumps({
        "service": arguments.service, "cluster": settings.cluster.name if settings.cluster is not None else None, "mode": arguments.mode,
        "project": settings.project, "subproject": settings.subproject, "stage": settings.stage, "substage": settings.substage,
        "queue": _queue(settings, arguments), "key": key, "log_path": logs[0] if logs else None, "ssh_hostname": place.ssh,
        "workdir": _storage(settings, arguments.service)}, sort_keys=True))


resolve = _command(_resolve, "Say as one line of JSON what a service is called, where it runs, and where its storage is.",
                   "0 done; 1 the configuration is wrong", True,
                   {"--workdir": dict(metavar="DIR", help="the folder whose configuration counts (default: this one)")})


def _storage(settings: Settings, service: str) -> _t.Optional[str]:
    return {"hashserver": settings.buffer_directory, "database": settings.database_directory}.get(service)


def _ps(arguments) -> int:
    if arguments.client + arguments.server + arguments.all_clusters > 1:
        raise UsageError("--client, --server and --all-clusters exclude each other; choose one")
    clusters = _cluster_names() if arguments.all_clusters else [arguments.cluster] * (
        arguments.server or arguments.cluster is not None and not arguments.client)
    found = [_settings(arguments, cluster=name, project=arguments.project or TOPLEVEL) for name in clusters]
    rows, unreachable = [], []
    for place in _places(found):
        try:
            selected = _selected(arguments, launch.far(place, "services"))
        except ServiceError as exc:
            unreachable.append(exc)
            continue
        rows += [{"key": record["key"], "process": record.get("status"), "host": place.ssh, "port": record.get("port"),
                  "socket": record.get("socket"), **{name: parts.get(name) for name in ("service", "cluster", "project", "subproject", "stage")}}
                 for record, parts in selected if arguments.status in (None, record.get("status"))]
    if arguments.persistent:
        rows = _add_storage(arguments, rows)
    rows.sort(key=lambda row: (row["key"], row["host"] or ""))
    if arguments.json:
        for row in rows:
            print(json.dumps(row, sort_keys=True))
    elif rows:
        _print_table(rows, arguments.persistent)
    for error in unreachable:
        program.say("seamless-service-ps", str(error))
    return 1 if unreachable else 0


ps = _command(_ps, "List services that run.", "0 done, also if there are none; 1 a host cannot be reached, or the configuration is wrong", options={
    "--client": dict(action="store_true", help="those on this machine (default without --cluster)"),
    "--server": dict(action="store_true", help="also those on the other hosts of the cluster (default with --cluster)"),
    "--all-clusters": dict(action="store_true", help="also those on the other hosts of all clusters"),
    "--status": dict(metavar="STATUS", help="only those with this status (running, starting)"),
    "--persistent": dict(action="store_true", help="also the storage on this machine, whether or not a service runs for it"),
    "--json": dict(action="store_true", help="a line of JSON for each")})


def _cluster_names() -> _t.List[str]:
    definitions = Definitions(home_of(os.environ), seamless_home(os.environ))
    definitions.read_files()
    return sorted(definitions.nodes)


def _add_storage(arguments, rows: _t.List[dict]) -> _t.List[dict]:
    """``rows`` with the storage that the selectors name, as far as it is on this machine."""
    settings = _settings(arguments)
    for service in ("hashserver", "database"):
        path = _storage(settings, service)
        if path is None or arguments.service not in (None, service) or _place(settings, service).ssh is not None:
            continue
        key = settings.service_key(service, arguments.mode)
        row = next((row for row in rows if row["key"] == key and row["host"] is None), None)
        if row is None:
            row = {"key": key, "process": None, "host": None, "port": None, "socket": None, "service": service,
                   "cluster": settings.cluster.name if settings.cluster is not None else None, "project": settings.project,
                   "subproject": settings.subproject, "stage": settings.stage}
            rows = rows + [row]
        mine = _entries(path, service)
        row.update(path=path, persistent="absent" if mine is None else "populated" if mine else "empty",
                   size=sum(map(_size, mine)) if mine else None)
    return rows


def _entries(folder: str, service: str) -> _t.Optional[_t.List[str]]:
    """The paths in a storage folder that this service put there; None if there is no such folder."""
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if _STORED[service].fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise SeamlessError("the folder %s cannot be read: %s" % (folder, exc.strerror)) from exc


def _size(path: str) -> int:
    if not os.path.isdir(path):
        return os.lstat(path).st_size
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(path) for name in names)


def _print_table(rows: _t.Sequence[dict], persistent: bool) -> None:
    columns = ["service", "cluster", "project", "stage", "process", "host", "port"] + (["persistent", "size"] if persistent else [])
    table = [[name.upper() for name in columns]]
    table += [["-" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())


def _inspect(arguments) -> None:
    _, key, place = _find(arguments)
    records = [record for record in launch.far(place, "services") if record.get("key") == key]
    if not records:
        raise SeamlessError("no service with the key %s runs on %s" % (key, place.ssh or "this machine"))
    print(json.dumps(max(records, key=lambda record: record.get("started_at") or 0), indent=2, sort_keys=True))


inspect = _command(_inspect, "Print the record of a service that runs, as JSON.", "0 done; 1 it does not run, or its host cannot be reached", True)


def _logs(arguments) -> None:
    if arguments.tail is not None and arguments.tail < 1:
        raise UsageError("--tail is %d: it takes a number of lines, from 1" % arguments.tail)
    _, key, place = _find(arguments)
    text = launch.far(place, "logs", which=key)
    if text is None:
        raise SeamlessError("there is no log of a service with the key %s on %s" % (key, place.ssh or "this machine"))
    program.write_output("".join(text.splitlines(True)[-(arguments.tail or 0):]).encode("utf-8"))


logs = _command(_logs, "Print the end of the log of a service, also of one that is dead.", "0 done; 1 there is no log, or its host cannot be reached", True,
                {"--tail": dict(type=int, metavar="N", help="only the last N lines (default: the last megabyte)")})


def _stop(arguments) -> None:
    if arguments.service is None and arguments.cluster is None:
        raise UsageError("say which: --service KIND, or --cluster NAME for all services of that cluster")
    if arguments.service is not None:
        _, key, *places = _find(arguments)
    else:
        key, places = None, _places([_settings(arguments, project=arguments.project or TOPLEVEL)])
    stopped = []
    for place in places:
        records = launch.far(place, "services")
        for record in [record for record in records if record.get("key") == key] if key else [
                record for record, _ in _selected(arguments, records)]:
            launch.far(place, "stop", which=record["name"])
            stopped.append("%s: stopped" % record["key"])
    print("\n".join(stopped) or "%s: not running" % (key or "cluster " + arguments.cluster))


stop = _command(_stop, "Stop services: the one of this kind, or (with --cluster and without --service) all of the cluster.",
                "0 done, also if none ran; 1 one cannot be stopped, or its host cannot be reached")


def _rm(arguments) -> None:
    _, key, there = _find(arguments)
    both = arguments.client == arguments.server
    places = [launch.HERE] * (both or arguments.client) + [there] * (both or arguments.server)
    for place in {place.ssh: place for place in places}.values():
        for path in launch.far(place, "remove", which=key):
            print("removed %s%s" % (path, " on %s" % place.ssh if place.ssh else ""))


rm = _command(_rm, "Remove the record and the logs that a service which does not run any more left behind.",
              "0 done, also if there was nothing; 1 the service runs, or its host cannot be reached", True, {
                  "--client": dict(action="store_true", help="what is on this machine"),
                  "--server": dict(action="store_true", help="what is on the host of the service (default: both)")})


def _clear(arguments) -> None:
    service = arguments.service
    if service not in _STORED:
        raise UsageError("a %s stores nothing that could be cleared; --service is hashserver or database" % service)
    settings, _, place = _find(arguments)
    folder = _storage(settings, service)
    if place.ssh is not None:
        raise SeamlessError("the storage %s is on %s: run seamless-service-clear there" % (folder, place.ssh))
    if folder is None:
        raise SeamlessError("nothing is stored: the configuration says 'persistent: false'")
    users = [record["key"] for record, parts in ((record, _parts(str(record.get("key")))) for record in launch.services())
             if parts and parts.get("project") == settings.project and parts.get("cluster") == (settings.cluster and settings.cluster.name)]
    if users:
        raise SeamlessError("%s is in use by %s; stop that first" % (folder, ", ".join(users)))
    mine = _entries(folder, service) or []
    question = "delete all that is stored in %s (%d entries)" % (folder, len(mine))
    if mine and not arguments.yes and not ask(question):
        raise SeamlessError("%s: refused; answer yes at a terminal, or add -y" % question)
    try:
        for path in mine:
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    except OSError as exc:
        raise SeamlessError("%s cannot be deleted: %s" % (exc.filename or folder, exc.strerror)) from exc
    print("removed %d entries from %s" % (len(mine), folder))


clear = _command(_clear, "Delete what a hashserver (all buffers) or a database (all results) of this project and stage has stored "
                         "on this machine.\nOther files in the folder are kept.", "0 done; 1 refused, or a service uses the storage, or it is on another host", True,
                 {"-y --yes": dict(action="store_true", help="do not ask")})
