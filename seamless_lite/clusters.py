"""Cluster definitions: which hosts there are, what they offer, and where they keep things.

``Definitions`` gathers them from ``clusters.yaml``, ``clusters/*.yaml`` and ``clusters`` commands, later ones replacing
earlier ones of the same name, and ``build(name)`` makes a frozen ``Cluster`` of one.  A broken definition raises
``ConfigurationError`` only when it is built, so that it does not stand in the way of the others.
The format is that of compat/config.md section 3; everything but ``frontends`` is optional.
"""
import collections
import os
import typing as _t

from .errors import ConfigurationError
from . import yamlfile
from .yamlfile import Node, boolean, host, lines, mapping, member, raw, read, text, text_or_number, whole

Text = _t.Optional[str]
Number = _t.Optional[int]


class Service(_t.NamedTuple):
    """How one service is started.  No ports: a Unix socket.  ``auth`` "none" lets everybody in who can connect.

    ``directory`` (in the file ``bufferdir`` or ``database_dir``) is where a hashserver or a database keeps the folders
    of all projects: absolute, or on another host perhaps with a leading ``~``.  ``extra_dirs`` are more folders, of
    one project each (of a database: with a ``seamless.db``), which are only read.
    """
    directory: Text = None
    network_interface: Text = None
    port_start: Number = None
    port_end: Number = None
    conda: Text = None
    python: Text = None
    auth: str = "hmac"
    extra_dirs: _t.Tuple[str, ...] = ()

    @property
    def port_range(self) -> _t.Optional[_t.Tuple[int, int]]:
        """(first, last) port, or None."""
        return None if self.port_start is None else (self.port_start, self.port_end)


class Frontend(_t.NamedTuple):
    """A host.  ``hostname`` is its name in URLs, ``ssh_hostname`` the one for ssh; no name is this machine."""
    hostname: Text = None
    ssh_hostname: Text = None
    hashserver: _t.Optional[Service] = None
    database: _t.Optional[Service] = None
    jobserver: _t.Optional[Service] = None
    daskserver: _t.Optional[Service] = None

    @property
    def is_local(self) -> bool:
        """True if this machine is meant, which is never reached through ssh."""
        return is_this_machine(self.hostname) and is_this_machine(self.ssh_hostname)


def _plain(key, node):
    mapping(key, node)
    return node.plain()


def _resources(key, node):
    for name, child in mapping(key, node).items():
        if isinstance(child.value, bool) or not isinstance(child.value, (int, float)):
            raise child.must(name, "be a number")
    return node.plain()


_QUEUE_FIELDS = {
    "interactive": boolean, "exclusive": boolean,
    "extra_dask_config": _plain, "dask_resources": _resources,
    "job_extra_directives": lines, "job_script_prologue": lines,
    **dict.fromkeys(("conda", "project", "partition", "tmpdir"), text),
    **dict.fromkeys(("walltime", "memory", "unknown_task_duration", "target_duration", "lifetime_stagger",
                     "lifetime"), text_or_number),
    **dict.fromkeys(("maximum_jobs", "worker_threads", "processes", "cores", "job_cores"), whole)}
_DEFAULTS = {boolean: False, lines: (), _plain: {}, _resources: {}}         # and None, which is "not said"

#: What a Dask cluster asks its scheduler for: the keys above, with ``TEMPLATE`` resolved, and the queue's own
#: ``name`` and ``where``.
Queue = collections.namedtuple("Queue", ["name", "where", *_QUEUE_FIELDS],
                               defaults=[_DEFAULTS.get(check) for check in _QUEUE_FIELDS.values()])


class Cluster(_t.NamedTuple):
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
    queues: _t.Mapping[str, Queue] = {}
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

_SERVICE_KEYS = {"network_interface": host, "port_start": yamlfile.port, "port_end": yamlfile.port,
                 "conda": text, "python": text, "auth": yamlfile.choice("hmac", "none")}
#: What the directory of a service is called in the file, and the name of its default.
_DIRECTORIES = {"hashserver": ("bufferdir", "buffers"), "database": ("database_dir", "database")}
_FRONTEND_KEYS = {"hostname": host, "ssh_hostname": host,
                  "hashserver": raw, "database": raw, "jobserver": raw, "daskserver": raw}
_CLUSTER_KEYS = {"type": yamlfile.choice("local", "slurm", "oar"), "tunnel": boolean, "workers": whole,
                 "share_stages": boolean, "memory_per_core_property_name": text, "default_queue": text,
                 "queues": mapping, "frontends": raw}

def _said(values) -> dict:
    return {key: value for key, value in values.items() if value is not None}


class Definitions:
    """All cluster definitions.  ``home`` is what ``~`` stands for, ``seamless_home`` the user's ``~/.seamless``.

    ``unreadable`` holds the errors of files whose clusters nobody knows.
    """

    def __init__(self, home: str, seamless_home: str):
        self.home = home
        self.seamless_home = seamless_home
        self.file = os.path.join(seamless_home, "clusters.yaml")
        self.nodes: _t.Dict[str, Node] = {}
        self.local_cluster = Node(None)
        self.files: _t.List[str] = []
        self.unreadable: _t.List[ConfigurationError] = []

    def read_files(self):
        """Take in the user's cluster files.  Raises nothing: what is wrong is kept in ``unreadable``."""
        folder, names = os.path.join(self.seamless_home, "clusters"), []
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".yaml") and not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as exc:
            self.unreadable.append(ConfigurationError("%s: cannot be read: %s" % (folder, exc.strerror)))
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
        local_cluster = items.pop("local_cluster", Node(None))
        for name, child in items.items():
            if name in _CLUSTER_KEYS or name in _FRONTEND_KEYS:
                raise child.error("%r is a key of a cluster and not the name of one; indent it below the cluster's "
                                  "name" % name)
            if name == "clusters":
                raise child.error("the clusters stand here without 'clusters:' above them; remove that line")
            yamlfile.name("cluster", Node(name, child.file, child.line))
        if local_cluster.value is not None:
            text("local_cluster", local_cluster)
            self.local_cluster = local_cluster
        self.nodes.update(items)

    def build(self, name: str) -> Cluster:
        """The cluster ``name``, which must be one of ``nodes``.  Raises ``ConfigurationError``."""
        node = self.nodes[name]
        if node.value is None:
            raise node.error("the cluster %r holds nothing; indent its lines below its name" % name)
        items = mapping(name, node)
        for key in items:
            if key in _FRONTEND_KEYS:
                raise items[key].error("%r belongs to a frontend of the cluster %r; indent it below the '- ' of one in "
                                       "'frontends'" % (key, name))
        values = _said(read(name, node, _CLUSTER_KEYS))
        frontends = values.pop("frontends", None)
        if frontends is None:
            raise node.error("the cluster %r has no 'frontends'; add 'frontends:' with '- hostname: NAME' below it"
                             % name)
        if frontends.value == []:
            raise frontends.error("'frontends' is an empty list, and must be a list, whose entries start with '- '")
        if not isinstance(frontends.value, list):
            raise frontends.must("frontends", "be a list, whose entries start with '- '")
        hosts = tuple(self._frontend(item, name, self.local_cluster.value == name) for item in frontends.value)
        values["queues"] = _queues(values.get("queues", {}))
        if "default_queue" in values:
            check_queue_name("default_queue", items["default_queue"], values["queues"], name)
        return Cluster(name, node.where, hosts, all(frontend.is_local for frontend in hosts), **values)

    def _frontend(self, node, name, is_local) -> Frontend:
        if not isinstance(node.value, dict):
            raise node.error("a frontend is %s, and must hold lines like 'hostname: NAME'" % node.shown())
        values = read("frontends", node, _FRONTEND_KEYS)
        if is_local:        # as in Seamless 1.x: the user says that this is the machine, whatever it is called
            values.update(hostname=None, ssh_hostname=None)
        bare = Frontend(values.pop("hostname", None), values.pop("ssh_hostname", None))
        return bare._replace(**{service: self._service(service, child, name, bare.is_local)
                                for service, child in values.items()})

    def _service(self, service, node, name, is_local) -> Service:
        key, folder = _DIRECTORIES.get(service, (None, None))
        checks = dict(_SERVICE_KEYS)
        if key:
            checks[key] = lambda key, node: self._directory(key, node, is_local)
            checks["extra_dirs"] = lambda key, node: self._directories(key, node, is_local)
        values = _said(read(service, node, checks))
        for port, other in (("port_start", "port_end"), ("port_end", "port_start")):
            if port in values and other not in values:
                raise node.error("%r has a %r but no %r; add the other one, or remove it" % (service, port, other))
        if "port_end" in values and values["port_end"] < values["port_start"]:
            raise node.value["port_end"].error("'port_end' is %(port_end)d, which is less than 'port_start' "
                                               "%(port_start)d" % values)
        if key:
            base = self.seamless_home if is_local else "~/.seamless"
            values["directory"] = values.pop(key, "/".join((base, "clusters-data", name, folder)))
        return Service(**values)

    def _directory(self, key, node, is_local) -> str:
        path = text(key, node)
        if is_local:
            return yamlfile.expand(path, self.home, os.path.dirname(node.file))
        if not path.startswith(("/", "~")):
            raise node.error("%r is %r, and must start with '/' or '~/', as it is on another host" % (key, path))
        return path.rstrip("/")

    def _directories(self, key, node, is_local) -> _t.Tuple[str, ...]:
        paths = tuple(self._directory(key, item, is_local) for item in (node.value if isinstance(node.value, list) else [node]))
        for path in paths:
            if ";" in path:
                raise node.error("%r names the folder %r: a ';' cannot be in such a name" % (key, path))
        return paths

    def seems_local(self, name: str) -> bool:
        """Like ``Cluster.local``, but also for a broken definition: true unless it names another host."""
        value = self.nodes[name].value
        frontends = value["frontends"].value if isinstance(value, dict) and "frontends" in value else None
        words = [item.value[key].value for item in frontends if isinstance(item.value, dict)
                 for key in ("hostname", "ssh_hostname") if key in item.value] if isinstance(frontends, list) else []
        return name == self.local_cluster.value or all(is_this_machine(word) for word in words if isinstance(word, str))


def _queues(items) -> _t.Dict[str, Queue]:
    resolved: _t.Dict[str, dict] = {}
    queues = {}
    for name, child in items.items():
        values = read(name, child, {"TEMPLATE": raw, **_QUEUE_FIELDS}, dashes=True)
        template = values.pop("TEMPLATE", None)
        if template is not None and template.value is not None:
            word = text("TEMPLATE", template)
            if word in items and word not in resolved:
                raise template.error("'TEMPLATE' is %r, which must stand above the queue that uses it" % word)
            values = {**resolved[member("TEMPLATE", template, resolved, "the queues above")], **values}
        resolved[name] = values
        queues[name] = Queue(name, child.where, **_said(values))
    return queues


def check_queue_name(key: str, node: Node, queues: _t.Mapping[str, Queue], cluster: str) -> str:
    """The name of a queue of ``cluster``.  Raises ``ConfigurationError``."""
    if not queues:
        raise node.error("%r is %r, but the cluster %r has no queues; remove the line"
                         % (key, text(key, node), cluster))
    return member(key, node, queues, "the queues of the cluster %r" % cluster)


def check_queue(queue: Queue, cluster: Cluster):
    """Raise ``ConfigurationError`` if ``queue`` says too little, or too much, to start workers with.

    It is asked of the queue that is used, since a TEMPLATE may be incomplete.
    """
    problem = None
    if queue.exclusive and queue.job_cores is not None:
        problem = "is 'exclusive' and has 'job_cores'; remove one of them"
    elif queue.cores is None and queue.exclusive == (cluster.type in (None, "local")):
        problem = "has no 'cores'; add 'cores: NUMBER'"
    if problem:
        raise ConfigurationError("%s: the queue %r %s" % (queue.where, queue.name, problem))
