"""Cluster definitions: which hosts there are, what they offer, and where they keep things.

``Definitions`` gathers them from ``clusters.yaml``, ``clusters/*.yaml`` and ``clusters`` commands, later ones replacing
earlier ones of the same name, and ``build(name)`` makes a frozen ``Cluster`` of one.  A broken definition raises
``ConfigurationError`` only when it is built, so that it does not stand in the way of the others.
The format is that of compat/config.md section 3; everything but ``frontends`` is optional.
"""
import dataclasses
import os
import typing as _t

from .errors import ConfigurationError
from . import yamlfile
from .yamlfile import Node, boolean, host, lines, listed, mapping, nearest, raw, read, text, text_or_number, whole

Text = _t.Optional[str]
Number = _t.Optional[int]


@dataclasses.dataclass(frozen=True)
class Service:
    """How one service is started.  No ports: a Unix socket.  ``auth`` "none" lets everybody in who can connect.

    ``directory`` is where a hashserver or a database keeps the folders of all projects: absolute, or on another
    host perhaps with a leading ``~``.  (One dataclass and small classes below it: each one more costs 0.5 ms.)
    """
    directory: Text = None
    network_interface: Text = None
    port_start: Number = None
    port_end: Number = None
    conda: Text = None
    python: Text = None
    auth: str = "hmac"

    @property
    def port_range(self) -> _t.Optional[_t.Tuple[int, int]]:
        """(first, last) port, or None."""
        return None if self.port_start is None else (self.port_start, self.port_end)


class Hashserver(Service):
    """The buffers."""
    bufferdir = property(lambda self: self.directory, doc="``directory``, as the cluster file calls it.")


class Database(Service):
    """The results."""
    database_dir = property(lambda self: self.directory, doc="``directory``, as the cluster file calls it.")


class Jobserver(Service):
    """One machine with a pool of ``Cluster.workers`` processes."""


class Daskserver(Service):
    """The owner of a Dask cluster."""


SERVICES = {"hashserver": Hashserver, "database": Database, "jobserver": Jobserver, "daskserver": Daskserver}


@dataclasses.dataclass(frozen=True)
class Frontend:
    """A host.  ``hostname`` is its name in URLs, ``ssh_hostname`` the one for ssh; no name is this machine."""
    hostname: Text = None
    ssh_hostname: Text = None
    hashserver: _t.Optional[Hashserver] = None
    database: _t.Optional[Database] = None
    jobserver: _t.Optional[Jobserver] = None
    daskserver: _t.Optional[Daskserver] = None

    @property
    def is_local(self) -> bool:
        """True if this machine is meant, which is never reached through ssh."""
        return is_this_machine(self.hostname) and is_this_machine(self.ssh_hostname)


@dataclasses.dataclass(frozen=True)
class Queue:
    """What a Dask cluster asks its scheduler for; None is "not said".  ``TEMPLATE`` is already resolved."""
    name: str
    where: str
    conda: Text = None
    walltime: Text = None
    memory: Text = None
    unknown_task_duration: Text = None
    target_duration: Text = None
    maximum_jobs: Number = None
    lifetime_stagger: Text = None
    lifetime: Text = None
    interactive: bool = False
    exclusive: bool = False
    project: Text = None
    partition: Text = None
    tmpdir: Text = None
    worker_threads: Number = None
    processes: Number = None
    cores: Number = None
    job_cores: Number = None
    extra_dask_config: _t.Mapping[str, object] = dataclasses.field(default_factory=dict)
    job_extra_directives: _t.Tuple[str, ...] = ()
    job_script_prologue: _t.Tuple[str, ...] = ()
    dask_resources: _t.Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One definition.  ``tunnel`` None means: yes for other hosts; ``workers`` None: as many as there are usable CPUs.

    ``local`` is true if all its hosts are this machine; ``where`` is the FILE:LINE of the definition.
    """
    name: str
    where: str
    frontends: _t.Tuple[Frontend, ...]
    local: bool
    type: Text = None
    tunnel: _t.Optional[bool] = None
    workers: Number = None
    share_stages: bool = False
    queues: _t.Mapping[str, Queue] = dataclasses.field(default_factory=dict)
    default_queue: Text = None
    memory_per_core_property_name: Text = None

    def frontend_of(self, service: str) -> _t.Optional[Frontend]:
        """The first frontend that offers ``service``, or None."""
        return next((frontend for frontend in self.frontends if getattr(frontend, service) is not None), None)


def is_this_machine(hostname: Text) -> bool:
    """True for no name, loopback names and addresses, and this machine's own name; DNS is not asked."""
    if hostname is None:
        return True
    word = hostname.lower().strip("[]")
    own = os.uname().nodename.lower()
    return (word in ("localhost", "localhost.localdomain", "::1", own, own.split(".")[0])
            or word.startswith("127.") and word.replace(".", "").isdigit())


# --- reading

def _resources(key, node):
    for name, child in mapping(key, node).items():
        if isinstance(child.value, bool) or not isinstance(child.value, (int, float)):
            raise child.error("%r is %s, and must be a number" % (name, child.shown()))
    return node.plain()


def _plain(key, node):
    mapping(key, node)
    return node.plain()


_SERVICE_KEYS = {"network_interface": host, "port_start": yamlfile.port, "port_end": yamlfile.port,
                 "conda": text, "python": text, "auth": yamlfile.choice("hmac", "none")}
_DIRECTORY_KEYS = {"hashserver": "bufferdir", "database": "database_dir"}
_DEFAULT_FOLDERS = {"hashserver": "buffers", "database": "database"}
_FRONTEND_KEYS = {"hostname": host, "ssh_hostname": host, **{service: raw for service in SERVICES}}
_CLUSTER_KEYS = {"type": yamlfile.choice("local", "slurm", "oar"), "tunnel": boolean, "workers": whole,
                 "share_stages": boolean, "memory_per_core_property_name": text, "default_queue": raw,
                 "queues": raw, "frontends": raw}
_QUEUE_KEYS = {
    "TEMPLATE": raw, "interactive": boolean, "exclusive": boolean,
    "extra_dask_config": _plain, "dask_resources": _resources,
    "job_extra_directives": lines, "job_script_prologue": lines,
    **dict.fromkeys(("conda", "project", "partition", "tmpdir"), text),
    **dict.fromkeys(("walltime", "memory", "unknown_task_duration", "target_duration", "lifetime_stagger",
                     "lifetime"), text_or_number),
    **dict.fromkeys(("maximum_jobs", "worker_threads", "processes", "cores", "job_cores"), whole)}


class Definitions:
    """All cluster definitions.  ``home`` is what ``~`` stands for, ``seamless_home`` the user's ``~/.seamless``.

    ``unreadable`` holds the errors of files whose clusters nobody knows.
    """

    def __init__(self, home: str, seamless_home: str):
        self.home = home
        self.seamless_home = seamless_home
        self.file = os.path.join(seamless_home, "clusters.yaml")
        self.nodes: _t.Dict[str, Node] = {}
        self.local_cluster: _t.Optional[Node] = None
        self.files: _t.List[str] = []
        self.unreadable: _t.List[ConfigurationError] = []

    def read_files(self):
        """Take in the user's cluster files.  Raises nothing: what is wrong is kept in ``unreadable``."""
        folder = os.path.join(self.seamless_home, "clusters")
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".yaml") and not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as exc:
            self.unreadable.append(ConfigurationError("%s: cannot be read: %s" % (folder, exc.strerror)))
            names = []
        for path in [self.file] + [os.path.join(folder, name) for name in names]:
            try:
                node = yamlfile.load(path)
                if node is not None:
                    self.files.append(path)
                    self.add(node)
            except ConfigurationError as exc:
                self.unreadable.append(exc)

    def add(self, node: Node):
        """Take in the mapping of names to definitions ``node``.  Raises ``ConfigurationError``."""
        items = dict(mapping("clusters", node))
        local_cluster = items.pop("local_cluster", None)
        for name, child in items.items():
            if name in _CLUSTER_KEYS or name in _FRONTEND_KEYS:
                raise child.error("%r is a key of a cluster and not the name of one; indent it below the cluster's "
                                  "name" % name)
            if name == "clusters":
                raise child.error("the clusters stand here without 'clusters:' above them; remove that line")
            yamlfile.name("cluster", Node(name, child.file, child.line))
        if local_cluster is not None and local_cluster.value is not None:
            text("local_cluster", local_cluster)
            self.local_cluster = local_cluster
        self.nodes.update(items)

    def build(self, name: str) -> Cluster:
        """The cluster ``name``, which must be one of ``nodes``.  Raises ``ConfigurationError``."""
        node = self.nodes[name]
        if node.value is None:
            raise node.error("the cluster %r holds nothing; indent its lines below its name" % name)
        for key, child in mapping(name, node).items():
            if key in _FRONTEND_KEYS:
                raise child.error("%r belongs to a frontend of the cluster %r; indent it below the '- ' of one in "
                                  "'frontends'" % (key, name))
        values = read(name, node, _CLUSTER_KEYS)
        is_local = self.local_cluster is not None and self.local_cluster.value == name
        frontends = values.pop("frontends", None)
        if frontends is None:
            raise node.error("the cluster %r has no 'frontends'; add 'frontends:' with '- hostname: NAME' below it"
                             % name)
        if not isinstance(frontends.value, list) or not frontends.value:
            raise frontends.error("'frontends' is %s, and must be a list, whose entries start with '- '" % (
                "an empty list" if frontends.value == [] else frontends.shown()))
        hosts = tuple(self._frontend(item, name, is_local) for item in frontends.value)
        queues = _queues(values.pop("queues", None))
        default = values.pop("default_queue", None)
        if default is not None and default.value is not None:
            values["default_queue"] = check_queue_name("default_queue", default, queues, name)
        return Cluster(name=name, where=node.where, frontends=hosts, queues=queues,
                       local=all(frontend.is_local for frontend in hosts),
                       **{key: value for key, value in values.items() if value is not None})

    def _frontend(self, node, name, is_local) -> Frontend:
        if not isinstance(node.value, dict):
            raise node.error("a frontend is %s, and must hold lines like 'hostname: NAME'" % node.shown())
        values = read("frontends", node, _FRONTEND_KEYS)
        if is_local:        # as in Seamless 1.x: the user says that this is the machine, whatever it is called
            values.update(hostname=None, ssh_hostname=None)
        bare = Frontend(values.pop("hostname", None), values.pop("ssh_hostname", None))
        return dataclasses.replace(bare, **{service: self._service(service, child, name, bare.is_local)
                                            for service, child in values.items()})

    def _service(self, service, node, name, is_local) -> Service:
        checks, key = _SERVICE_KEYS, _DIRECTORY_KEYS.get(service)
        if key is not None:
            checks = {**checks, key: lambda key, node: self._directory(key, node, is_local)}
        values = {word: value for word, value in read(service, node, checks).items() if value is not None}
        if key in values:
            values["directory"] = values.pop(key)
        first, last = values.get("port_start"), values.get("port_end")
        if (first is None) != (last is None):
            raise node.error("%r has a %r but no %r; add the other one, or remove it" % (
                (service,) + (("port_start", "port_end") if last is None else ("port_end", "port_start"))))
        if first is not None and last < first:
            raise node.value["port_end"].error("'port_end' is %d, which is less than 'port_start' %d" % (last, first))
        if key is not None and "directory" not in values:
            base = self.seamless_home if is_local else "~/.seamless"
            values["directory"] = "/".join((base, "clusters-data", name, _DEFAULT_FOLDERS[service]))
        return SERVICES[service](**values)

    def _directory(self, key, node, is_local) -> str:
        path = text(key, node)
        if is_local:
            return yamlfile.expand(path, self.home, os.path.dirname(node.file))
        if not path.startswith(("/", "~")):
            raise node.error("%r is %r, and must start with '/' or '~/', as it is on another host" % (key, path))
        return path.rstrip("/")

    def seems_local(self, name: str) -> bool:
        """Like ``Cluster.local``, but also for a broken definition: true unless it names another host."""
        value = self.nodes[name].value
        frontends = value.get("frontends") if isinstance(value, dict) else None
        items = frontends.value if frontends is not None and isinstance(frontends.value, list) else []
        words = [item.value[key].value for item in items if isinstance(item.value, dict)
                 for key in ("hostname", "ssh_hostname") if key in item.value]
        return (all(is_this_machine(word) for word in words if isinstance(word, str))
                or self.local_cluster is not None and self.local_cluster.value == name)


def _queues(node) -> _t.Dict[str, Queue]:
    resolved: _t.Dict[str, dict] = {}
    queues = {}
    items = mapping("queues", node) if node is not None else {}
    for name, child in items.items():
        values = read(name, child, _QUEUE_KEYS, dashes=True)
        template = values.pop("TEMPLATE", None)
        if template is not None and template.value is not None:
            word = text("TEMPLATE", template)
            if word not in resolved:
                raise template.error("'TEMPLATE' is %r, %s" % (word, (
                    "which must stand above the queue that uses it" if word in items else
                    "and the queues above are %s%s" % (listed(resolved), nearest(word, resolved)))))
            values = {**resolved[word], **values}
        resolved[name] = values
        queues[name] = Queue(name, child.where, **{key: value for key, value in values.items() if value is not None})
    return queues


def check_queue_name(key: str, node: Node, queues: _t.Mapping[str, Queue], cluster: str) -> str:
    """The name of a queue of ``cluster``.  Raises ``ConfigurationError``."""
    word = text(key, node)
    if not queues:
        raise node.error("%r is %r, but the cluster %r has no queues; remove the line" % (key, word, cluster))
    if word not in queues:
        raise node.error("%r is %r, and the queues of the cluster %r are %s%s" % (
            key, word, cluster, listed(queues), nearest(word, queues)))
    return word


def check_queue(queue: Queue, cluster: Cluster):
    """Raise ``ConfigurationError`` if ``queue`` says too little, or too much, to start workers with.

    It is asked of the queue that is used, since a TEMPLATE may be incomplete.
    """
    def error(message):
        return ConfigurationError("%s: the queue %r %s" % (queue.where, queue.name, message))
    is_local = cluster.type in (None, "local")
    if queue.exclusive and queue.job_cores is not None:
        raise error("is 'exclusive' and has 'job_cores'; remove one of them")
    if queue.cores is None and queue.exclusive == is_local:
        raise error("has no 'cores'; add 'cores: NUMBER'")
