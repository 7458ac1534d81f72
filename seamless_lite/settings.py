"""``Settings``: all that the configuration says for one stage, as one frozen value.

``load_settings`` is a pure function of files, environment variables and arguments:

1. ``SEAMLESS_CACHE`` or ``SEAMLESS_REMOTE_CLIENTS``, if set, stand for everything, and no file is read;
2. ``seamless.yaml`` and then ``seamless.profile.yaml`` of the folder give a list of commands, after those of the
   parent folder if one says ``inherit_from_parent``; the block of the stage is spliced in, others are only checked;
3. the clusters are gathered (``clusters.py``), and the commands are taken in order: later ones win, arguments win
   over all;
4. what is left unsaid is decided in ``_resolve``: the cluster, where jobs run, where buffers and results are kept.
"""
import os
import re
import typing as _t

from .clusters import Cluster, Definitions, Text, check_queue, check_queue_name
from .errors import ConfigurationError
from . import yamlfile
from .yamlfile import Node, boolean, choice, listed, mapping, member, name, nearest, null_or, path_name, raw, read, text
from .yamlfile import whole

PROJECT_FILE = "seamless.yaml"
PROFILE_FILE = "seamless.profile.yaml"
#: The project and the cluster that Seamless 1.x writes where there is none.
TOPLEVEL = "__TOPLEVEL__"
EMBEDDED = "__SEAMLESS_CACHE__"
BACKENDS = ("jobserver", "daskserver")


def _subproject(key, node) -> str:
    """As ``path_name``, without what the store above it calls files and folders of its own (``ab``, ``.pins``)."""
    word = path_name(key, node)
    for part in word.split("/"):
        if re.fullmatch(r"[0-9a-f]{2}|\..*|[0-9a-fA-F]{64}(\..*)?", part):
            raise node.error("%r is %r, but %r is what a folder or file of the store above it is called; choose another name" % (key, word, part))
    return word


_COMMANDS = {
    "cluster": null_or(name), "project": name, "subproject": _subproject,
    "execution": choice("process", "spawn", "remote"), "remote": null_or(choice(*BACKENDS)), "persistent": boolean,
    "queue": text, "record": boolean, "node": null_or(text), "nparallel": whole, "clusters": mapping}
_UNSAID = Node(None)        # the value of a command that is not given
_WORDS = tuple(_COMMANDS) + ("inherit_from_parent", "stage")


class RemoteClient(_t.NamedTuple):
    """What somebody else started.  ``service`` is "hashserver" (it may be only a directory), "database" or "jobserver"."""
    service: str
    readonly: bool
    url: Text = None
    directory: Text = None


class Settings(_t.NamedTuple):
    """What the configuration says for one stage.

    ``remote`` is None unless ``execution`` is "remote", and then one of ``BACKENDS``.  ``cluster`` is None for the
    embedded store, for ``SEAMLESS_CACHE`` and for ``SEAMLESS_REMOTE_CLIENTS``.  The directories are complete, with
    project and stage, and None if nothing is kept there; they belong to the host of the cluster's frontend.
    ``workers`` is the number of local processes for "spawn" (None: usable CPUs), ``stages`` the names in the files,
    ``remote_clients`` what ``SEAMLESS_REMOTE_CLIENTS`` lists (None if it is not set).
    """
    workdir: str
    project: Text = None
    subproject: Text = None
    stage: Text = None
    substage: Text = None
    execution: str = "process"
    persistent: bool = True
    remote: Text = None
    queue: Text = None
    node: Text = None
    record: bool = False
    nparallel: _t.Optional[int] = None
    workers: _t.Optional[int] = None
    cluster: _t.Optional[Cluster] = None
    buffer_directory: Text = None
    database_directory: Text = None
    remote_clients: _t.Optional[_t.Tuple[RemoteClient, ...]] = None
    warnings: _t.Tuple[str, ...] = ()
    files: _t.Tuple[str, ...] = ()
    stages: _t.Tuple[str, ...] = ()

    @property
    def database_file(self) -> Text:
        """The SQLite file of the results, or None."""
        return None if self.database_directory is None else self.database_directory + "/seamless.db"

    def extra(self, service: str) -> _t.List[str]:
        """Folders of a hashserver, or ``seamless.db`` files of a database, that are read besides."""
        frontend = self.cluster.frontend_of(service) if self.cluster is not None else None
        folders = getattr(frontend, service).extra_dirs if frontend is not None else ()
        return [path + "/seamless.db" if service == "database" else path for path in folders]

    def service_key(self, service: str, mode: str = "rw") -> str:
        """The readable name of a service of this stage, as in compat/http.md section 6."""
        cluster = self.cluster.name if self.cluster is not None else EMBEDDED
        if not self.persistent and service == "daskserver":
            words = ["pure-daskserver", cluster] + ([self.queue] if self.queue else [])
        else:
            words = [service, cluster, mode, "--".join(self.storage_parts(service in BACKENDS))]
        return "".join(letter if letter.isascii() and letter.isalnum() or letter in "._-" else "_"
                       for letter in "-".join(words))

    def storage_parts(self, of_backend: bool = False) -> _t.List[str]:
        """Project, subproject and stage, as keys and paths name them."""
        parts = [self.project or TOPLEVEL] + (self.subproject.split("/") if self.subproject else [])
        if self.stage and of_backend:
            parts.append("STAGE-" + self.stage + ("SUBSTAGE-" + self.substage if self.substage else ""))
        elif self.stage and not (self.cluster is not None and self.cluster.share_stages):
            parts.append("STAGE-" + self.stage)
        return parts


def home_of(environ: _t.Mapping[str, str]) -> str:
    """The home directory, as ``environ`` says it."""
    return environ.get("HOME") or os.path.expanduser("~")


def seamless_home(environ: _t.Mapping[str, str]) -> str:
    """The user's folder: ``$SEAMLESS_HOME``, or ``~/.seamless``."""
    return yamlfile.expand(environ.get("SEAMLESS_HOME", "").strip() or "~/.seamless", home_of(environ))


def load_settings(workdir: str, *, project: Text = None, subproject: Text = None, stage: Text = None,
                  substage: Text = None, execution: Text = None, cluster: Text = None, node: Text = None, queue: Text = None,
                  environ: _t.Optional[_t.Mapping[str, str]] = None) -> Settings:
    """The settings of the folder ``workdir``; an argument wins over the files.

    A ``project`` without ``subproject`` has none, whatever the files say; a ``substage`` without ``stage`` is ignored;
    with a ``cluster`` the stage need not be one of the files.
    Raises ``ConfigurationError``.
    """
    environ = os.environ if environ is None else environ
    workdir = os.path.abspath(workdir)
    if not os.path.isdir(workdir):
        raise ConfigurationError("%s: there is no such folder to look for %s in" % (workdir, PROJECT_FILE))
    arguments = {"project": project, "subproject": subproject, "execution": execution, "cluster": cluster, "node": node,
                 "queue": queue}
    asked = {word: Node(_COMMANDS[word](word, Node(value))) for word, value in arguments.items() if value is not None}
    stage = name("stage", Node(stage)) if stage else None
    substage = name("substage", Node(substage)) if stage and substage else None
    fixed = Settings(workdir, stage=stage, substage=substage)
    cache = environ.get("SEAMLESS_CACHE", "").strip()
    clients = environ.get("SEAMLESS_REMOTE_CLIENTS", "").strip()
    if cache or clients:
        return _from_environment(fixed, asked, cache, clients, home_of(environ))

    commands = _Commands(stage)
    commands.read_folder(workdir)
    if stage is not None and cluster is None and stage not in commands.stages:
        raise ConfigurationError("there is no stage %r in %s; the stages are %s%s" % (
            stage, " or ".join(commands.files), listed(commands.stages), nearest(stage, commands.stages))
            if commands.stages else
            "there is no stage %r, as no file mentions a stage; write '- stage %s:' in %s, and indented below it what "
            "differs there" % (stage, stage, os.path.join(workdir, PROJECT_FILE)))
    definitions = Definitions(home_of(environ), seamless_home(environ))
    definitions.read_files()
    values = _evaluate(commands.entries, definitions)
    if project is not None:
        values["subproject"] = _UNSAID
    if cluster is not None and cluster != values["cluster"].value:
        values["queue"] = _UNSAID           # which was one of the other cluster
    values.update(asked)
    fixed = fixed._replace(files=tuple(commands.files + definitions.files), stages=tuple(commands.stages),
                           warnings=tuple(commands.warnings))
    return _resolve(fixed, values, definitions)


# --- the environment instead of files

def _from_environment(fixed, asked, cache, clients, home) -> Settings:
    named = () if cache else _remote_clients(clients, home)
    remote = "jobserver" if any(client.service == "jobserver" for client in named) else None
    chosen = {word: node.value or None for word, node in asked.items() if word not in ("queue", "cluster")}
    settings = fixed._replace(**{"project": TOPLEVEL, "execution": "remote" if remote else "process", **chosen})
    if settings.execution == "remote" and remote is None:
        raise ConfigurationError("execution is 'remote', but %s" % (
            "SEAMLESS_CACHE is set and leaves no cluster; unset it" if cache else
            "SEAMLESS_REMOTE_CLIENTS is set and names no jobserver; add a 'jobserver' client to it, or unset it"))
    if cache:
        return _with_storage(settings, yamlfile.expand(cache, home))
    return settings._replace(remote_clients=named, remote=remote if settings.execution == "remote" else None)


def _remote_clients(content, home) -> _t.Tuple[RemoteClient, ...]:
    import json
    where = "SEAMLESS_REMOTE_CLIENTS"
    try:
        root = Node.of(json.loads(content), where)
    except ValueError as exc:
        raise ConfigurationError("%s: this is not JSON: %s" % (where, exc)) from None
    found = []
    for group, node in read(where, root, {"database": raw, "buffer": raw, "jobserver": raw}).items():
        if not isinstance(node.value, list):
            raise node.must(group, "be a list of clients")
        found += [_remote_client(group, item, home) for item in node.value]
    if not found:
        raise root.error("there is no client in it; add one under 'database', 'buffer' or 'jobserver', or unset the variable")
    return tuple(found)


def _remote_client(group, node, home):
    checks = {"readonly": boolean, "url": raw, "remote_url": _url}
    if group == "buffer":
        checks.update(directory=raw, remote_directory=text)
    values = read(group, node, checks)
    url, directory = values.get("remote_url"), values.get("remote_directory")
    if url is None and directory is None:
        raise node.error("a client under %r has no 'remote_url'; add it" % group)
    return RemoteClient("hashserver" if group == "buffer" else group, values.get("readonly") is not False, url,
                        None if directory is None else yamlfile.expand(directory, home))


def _url(key, node):
    word = text(key, node)
    if not word.startswith(("http://", "https://", "unix://")):
        raise node.error("%r is %r, and must start with http://" % (key, word))
    return word.rstrip("/")


# --- the command files

class _Commands:
    """The commands of a folder and, where it says so, of its parents; ``entries`` are those that hold in ``stage``."""

    def __init__(self, stage):
        self.stage = stage
        self.entries: _t.List[_t.Tuple[str, Node]] = []
        self.stages: _t.Dict[str, None] = {}        # a dict, as a set that keeps the order
        self.files: _t.List[str] = []
        self.warnings: _t.List[str] = []

    def read_folder(self, folder) -> bool:
        """Take in the two files of ``folder``, the parent's first if they say so.  False if it has neither."""
        found = []
        for base in (PROJECT_FILE, PROFILE_FILE):
            path = os.path.join(folder, base)
            node = yamlfile.load(path)
            if node is not None:
                found.append((path, _entries(node)))
        inherit = next((argument for _, entries in found for word, argument in entries
                        if word == "inherit_from_parent" and argument.value is not False), None)
        parent = os.path.dirname(folder)
        if inherit is not None and (parent == folder or not self.read_folder(parent)):
            self.warnings.append("%s: 'inherit_from_parent' finds nothing, as %s has no %s"
                                 % (inherit.where, parent, PROJECT_FILE))
        for path, entries in found:
            self.files.append(path)
            self.take(entries, os.path.basename(path) == PROFILE_FILE, True, "")
        return bool(found)

    def take(self, entries, is_profile, is_active, block):
        """Check all ``entries``, and keep those that are active; ``block`` is the stage block around them, or ""."""
        for word, argument in entries:
            if word == "stage" or word.startswith("stage "):
                stage = self.stage_name(word, argument)
                self.stages[stage] = None
                self.take(_entries(argument), is_profile, is_active and stage == self.stage, word)
            elif word == "inherit_from_parent":
                if block:
                    raise argument.error("'inherit_from_parent' cannot stand in %r; move it to the left margin"
                                         % block)
                null_or(boolean)(word, argument)
            elif word not in _COMMANDS:
                raise _unknown_command(word, argument)
            elif word == "clusters" and not is_profile:
                raise argument.error("'clusters' names hosts and programs, which a project must not choose for its "
                                     "users; move it to %s or ~/.seamless/clusters.yaml" % PROFILE_FILE)
            else:
                value = _COMMANDS[word](word, argument)
                if is_active:
                    self.entries.append((word, Node(value, argument.file, argument.line, argument.text)))

    @staticmethod
    def stage_name(word, argument):
        stage = word[len("stage"):].strip()
        if not stage:
            example = argument.value if isinstance(argument.value, str) else "NAME"
            raise argument.error("'stage' has no name before its ':'; write '- stage %s:', and indent below it the "
                                 "lines that belong to it" % example)
        name("stage", Node(stage, argument.file, argument.line))
        if argument.value is None:
            raise argument.error("%r holds nothing; write '- %s:', and indent the lines below it that belong to it"
                                 % (word, word))
        if not isinstance(argument.value, list):
            raise argument.must(word, "hold a list; indent the lines that belong to it, each with '- '")
        return stage


def _entries(node):
    """The (command, argument) pairs of a command file or a stage block."""
    if node.value is None:
        return []
    if not isinstance(node.value, list):
        raise node.error("the file is %s, and must be a list of commands; start each with '- ', as in "
                         "'- project: NAME'" % node.shown())
    return [_entry(item) for item in node.value]


def _entry(node):
    if isinstance(node.value, str):
        return node.value.strip(), Node(None, node.file, node.line)
    if not isinstance(node.value, dict) or not node.value:
        raise node.error("an entry is %s, and must be a command, as in '- project: NAME'" % node.shown())
    (word, argument), *others = node.value.items()
    if others:
        raise others[0][1].error("%r stands in the same entry as %r; start its line with '- '" % (others[0][0], word))
    return word, argument


def _unknown_command(word, argument):
    head, colon, _ = word.partition(":")
    if colon and head in _WORDS:
        return argument.error("%r needs a space after the ':'; write '- %s: %s'" % (word, head, word[len(head) + 1:]))
    stage = word[len("stage"):].lstrip("_-") if word.startswith("stage") else ""
    if len(stage) > 1:
        return argument.error("unknown command %r: did you mean 'stage %s'?" % (word, stage))
    return argument.error("unknown command %r%s" % (
        word, nearest(word, _WORDS) or "; the commands are " + listed(_WORDS)))


# --- what the commands add up to

def _evaluate(entries, definitions) -> _t.Dict[str, Node]:
    """The last value of each command; the ``clusters`` commands go to ``definitions``."""
    values = dict.fromkeys(_COMMANDS, _UNSAID)
    for word, node in entries:
        if word == "clusters":
            definitions.add(node)
        elif word == "cluster" and values["queue"] is not _UNSAID:
            if values["cluster"] is _UNSAID:
                raise values["queue"].error("'queue' must stand below the 'cluster' that it belongs to; move it")
            if values["cluster"].value != node.value:
                values["queue"] = _UNSAID
        values[word] = node
    return values


def _resolve(fixed, values, definitions) -> Settings:
    said = {word: node.value for word, node in values.items()}
    persistent, wants_remote = said["persistent"] is not False, said["execution"] == "remote"
    cluster = None
    if said["cluster"] is not None:
        cluster = _named_cluster(values["cluster"], definitions)
    elif values["cluster"] is _UNSAID and (persistent or wants_remote):
        cluster = _cluster_of_this_machine(definitions, wants_remote or said["project"] is not None)
    execution, remote = _placement(values, cluster, definitions)
    warnings = list(fixed.warnings) + _complaints(definitions, cluster) + (_missing_extras(cluster) if cluster else [])
    if remote is None and wants_remote:
        warnings.append(str(values["execution"].error(
            "'execution' is 'remote', but the cluster %r (%s) offers neither jobserver nor daskserver: jobs run in "
            "this process" % (cluster.name, cluster.where))))
    if not persistent and remote == "jobserver":
        raise values["persistent"].error(
            "'persistent' is false, but a jobserver keeps what it computes; write '- execution: process'%s" % (
                " or '- remote: daskserver'" if cluster.frontend_of("daskserver") else ""))
    if said["node"] is not None and remote == "daskserver" and cluster.type in (None, "local"):
        raise values["node"].error("'node' is %r, but the cluster %r (%s) has no nodes to choose from; remove the "
                                   "line, or give the cluster 'type: slurm' or 'type: oar'"
                                   % (said["node"], cluster.name, cluster.where))
    settings = fixed._replace(
        project=said["project"], subproject=said["subproject"] or None, execution=execution, remote=remote,
        persistent=persistent, queue=_queue(values["queue"], cluster, remote), node=said["node"],
        record=bool(said["record"]), nparallel=said["nparallel"], cluster=cluster,
        workers=_workers(cluster, definitions), warnings=tuple(warnings))
    return _with_storage(settings, os.path.join(definitions.seamless_home, "cache")) if persistent else settings


def _named_cluster(wanted, definitions) -> Cluster:
    """The cluster of the command ``wanted``."""
    if wanted.value not in definitions.nodes and definitions.unreadable:        # it may be defined there
        raise definitions.unreadable[0]
    if not definitions.nodes:
        raise wanted.error("'cluster' is %r, but no cluster is defined; define it in %s"
                           % (wanted.value, definitions.file))
    return definitions.build(member("cluster", wanted, definitions.nodes, "the clusters"))


def _cluster_of_this_machine(definitions, wanted: bool) -> _t.Optional[Cluster]:
    """Without a ``cluster`` command: ``local_cluster``, else the only local one, else the one named "local".

    None if it is not ``wanted``: where no project is named, the embedded store serves.
    """
    if definitions.unreadable:
        raise definitions.unreadable[0]
    if not wanted:
        return None
    if definitions.local_cluster.value is not None:
        return definitions.build(_local_cluster(definitions))
    local = [word for word in definitions.nodes if definitions.seems_local(word)]
    if len(local) > 1:
        local = [word for word in local if word == "local"]
    return definitions.build(local[0]) if local else None


def _local_cluster(definitions) -> str:
    return member("local_cluster", definitions.local_cluster, definitions.nodes, "the clusters")


def _complaints(definitions, selected) -> _t.List[str]:
    """What is wrong with the clusters that are not used."""
    found = list(definitions.unreadable)
    checks = [(definitions.build, word) for word in definitions.nodes if selected is None or word != selected.name]
    if definitions.local_cluster.value is not None:
        checks.append((_local_cluster, definitions))
    for check, argument in checks:
        try:
            check(argument)
        except ConfigurationError as exc:
            found.append(exc)
    return [str(error) for error in found]


def _missing_extras(cluster) -> _t.List[str]:
    paths = [path for frontend in cluster.frontends if frontend.is_local for block in (frontend.hashserver, frontend.database)
             if block is not None for path in block.extra_dirs]
    return ["%s: the cluster %r reads from %s too ('extra_dirs'), which is no folder that can be read; correct it, or remove the line"
            % (cluster.where, cluster.name, path) for path in dict.fromkeys(paths) if not os.access(path, os.R_OK | os.X_OK)]


def _workers(cluster, definitions):
    """Local processes for "spawn": what the cluster says if it is this machine, else what ``local_cluster`` says."""
    if cluster is None or cluster.local:
        return None if cluster is None else cluster.workers
    if definitions.local_cluster.value is None:
        return None
    try:
        return definitions.build(_local_cluster(definitions)).workers
    except ConfigurationError:      # it is not the cluster in use; a warning says so
        return None


def _placement(values, cluster, definitions) -> _t.Tuple[str, Text]:
    """(execution, back end): remote if a cluster offers a back end, unless something else is asked for."""
    execution, wanted = values["execution"], values["remote"]
    if cluster is None and execution.value == "remote":
        raise execution.error("'execution' is 'remote', but no cluster is selected; %s" % (
            "write '- cluster: NAME', where NAME is one of %s" % listed(definitions.nodes) if definitions.nodes
            else "define one in %s" % definitions.file))
    if cluster is None or execution.value in ("process", "spawn"):
        return execution.value or "process", None
    offered = [service for service in BACKENDS if cluster.frontend_of(service) is not None]
    if wanted.value is not None:
        if wanted.value not in offered:
            raise wanted.error("'remote' is %r, but the cluster %r (%s) offers no %s; add '%s:' to one of its "
                               "frontends%s" % (wanted.value, cluster.name, cluster.where, wanted.value, wanted.value,
                                                ", or write '- remote: %s'" % offered[0] if offered else ""))
        return "remote", wanted.value
    if len(offered) == 2:
        raise ConfigurationError(
            "%s: the cluster %r offers both a jobserver and a daskserver; add the line '- remote: jobserver' or "
            "'- remote: daskserver' to %s" % (cluster.where, cluster.name, PROJECT_FILE))
    return ("remote", offered[0]) if offered else ("process", None)


def _queue(node, cluster, remote) -> Text:
    word = None
    if node.value is not None:
        if cluster is None:
            raise node.error("'queue' is %r, but no cluster is selected; write '- cluster: NAME' above it" % node.value)
        word = check_queue_name("queue", node, cluster.queues, cluster.name)
    if remote != "daskserver":
        return word
    word = word or cluster.default_queue or (next(iter(cluster.queues)) if len(cluster.queues) == 1 else None)
    if word is not None:
        check_queue(cluster.queues[word], cluster)
    elif cluster.queues:
        raise ConfigurationError("%s: the cluster %r has the queues %s, but no 'default_queue'; add it, or write "
                                 "'- queue: NAME' below the 'cluster' command"
                                 % (cluster.where, cluster.name, listed(cluster.queues)))
    return word


def _with_storage(settings, cache) -> Settings:
    """``settings`` with the directories of buffers and results: the cluster's, or else the folder ``cache``."""
    cluster = settings.cluster
    if cluster is None:
        settings = settings._replace(project=settings.project or TOPLEVEL)
        bases = [cache, cache]
    else:
        bases = [_storage_of(cluster, service) for service in ("hashserver", "database")]
        if settings.project is None:
            raise ConfigurationError(
                "No project defined, and the cluster %r (%s) needs one; write '- project: NAME' in %s, or give "
                "--project" % (cluster.name, cluster.where, os.path.join(settings.workdir, PROJECT_FILE)))
    buffers, database = ("/".join([base.rstrip("/")] + settings.storage_parts()) for base in bases)
    return settings._replace(buffer_directory=buffers, database_directory=database)


def _storage_of(cluster, service) -> str:
    frontend = cluster.frontend_of(service)
    if frontend is None:
        raise ConfigurationError("%s: the cluster %r offers no %s; add '%s:' to one of its frontends, or write "
                                 "'- persistent: false'" % (cluster.where, cluster.name, service, service))
    return getattr(frontend, service).directory
