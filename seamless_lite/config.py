"""The default session: ``init()``, ``set_stage()``, ``set_substage()``, ``set_workdir()``, ``set_nparallel()``, ``spawn()``.

Until ``init()`` (or ``set_stage()``) is called, everything stays in the memory of this process.  Then the
configuration files of the working directory decide; with none at all, results are kept in the embedded
store, ``~/.seamless/cache``.  Each stage has a session of its own, kept until the program ends: going back
to a stage finds everything as it was left.
"""
import atexit
import contextlib
import os
import sys
import threading
import typing as _t

from .cpus import usable_cpus
from .errors import ConfigurationError
from .session import Session


class _State:
    """What is chosen now, and a session for each thing that was chosen before."""

    def __init__(self):
        self.lock = threading.RLock()
        self.workdir: _t.Optional[str] = None
        self.stage: _t.Optional[str] = None
        self.substage: _t.Optional[str] = None
        self.workers: _t.Optional[int] = None           # spawn() was called with this
        self.nparallel: _t.Optional[int] = None
        self.session = Session()
        self.configured = False
        self.sessions: _t.List[Session] = []            # all that were made, to find again and to close

    def use(self, stage, substage) -> None:
        """Load the configuration for ``stage`` and make its session the current one."""
        from .settings import load_settings
        settings = load_settings(self.workdir or os.getcwd(), stage=stage, substage=substage, environ=os.environ)
        if self.workers is not None:
            settings = settings._replace(execution="spawn")
        session = next((s for s in self.sessions if s.settings == settings and s.workers == self.workers), None)
        if session is None:
            for warning in settings.warnings:
                print("seamless_lite: " + warning, file=sys.stderr)
            session = Session(settings, workers=self.workers, others=lambda: self.sessions)
            session.connect()
            if self.session not in self.sessions:           # what was computed before the first init()
                self.sessions.append(self.session)
            self.sessions.append(session)
        self.session, self.stage, self.substage, self.configured = session, stage, substage, True

    def after_fork(self) -> None:
        self.lock = threading.RLock()
        for session in {id(s): s for s in self.sessions + [self.session]}.values():
            session.after_fork()

    def close(self) -> None:
        for session in self.sessions + [self.session]:
            session.close()


_state = _State()
atexit.register(_state.close)
os.register_at_fork(after_in_child=lambda: _state.after_fork())


def init(*, workdir=None) -> None:
    """Read the configuration and start the services that it asks for, or find them running.

    ``workdir``: the folder whose ``seamless.yaml`` counts; by default that of the calling script.  A second
    call, and a call inside a worker, do nothing.  Raises ``ConfigurationError`` or ``ServiceError``.
    """
    with _state.lock:
        if _state.configured or in_worker():
            return
        _choose_workdir(workdir)
        _state.use(None, None)


def set_stage(stage: _t.Optional[str] = None, substage: _t.Optional[str] = None, *, workdir=None) -> None:
    """Switch to the named stage (None: the default one), with a fresh reading of the configuration.

    Running services are left running, and found again.  Raises ``ConfigurationError`` if no configuration
    file mentions the stage; then the current stage stays.
    """
    with _state.lock:
        if in_worker():
            return
        if workdir is not None or _state.workdir is None:
            _choose_workdir(workdir)
        _state.use(stage or None, substage or None)


def set_substage(substage: _t.Optional[str] = None) -> None:
    """Switch to another substage of the current stage: the same storage, a job server of its own."""
    with _state.lock:
        set_stage(_state.stage, substage, workdir=_state.workdir)


def set_workdir(workdir=None) -> None:
    """The folder whose configuration counts from now on; by default that of the calling script.

    After ``init()`` the configuration of the new folder is read at once.
    """
    with _state.lock:
        _choose_workdir(workdir)
        if _state.configured:
            _state.use(_state.stage, _state.substage)


def set_nparallel(nparallel: int) -> None:
    """So many transformations at most are in flight in ``parallel`` (an integer of 1 or more)."""
    if isinstance(nparallel, bool) or not isinstance(nparallel, int) or nparallel < 1:
        raise ConfigurationError("set_nparallel takes a whole number of 1 or more, not %r" % (nparallel,))
    _state.nparallel = nparallel


def get_nparallel() -> int:
    """What ``set_nparallel`` or the configuration's ``nparallel`` says; 1000 if neither does."""
    settings = session().settings
    return _state.nparallel or (settings.nparallel if settings is not None else None) or 1000


def spawn(num_workers: _t.Optional[int] = None) -> None:
    """From now on run transformations in ``num_workers`` worker processes of this program (default: the usable CPUs).

    They end with the program.  Raises ``ConfigurationError`` if they were spawned before.
    """
    if num_workers is not None and (isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1):
        raise ConfigurationError("spawn takes a number of workers of 1 or more, not %r" % (num_workers,))
    with _state.lock:
        if in_worker():
            return
        if _state.workers is not None:
            raise ConfigurationError("workers have already been spawned in this program; spawn() works once")
        _state.workers = num_workers or usable_cpus()
        if _state.configured:
            _state.use(_state.stage, _state.substage)
        else:
            _state.sessions.append(_state.session)
            _state.session = Session(workers=_state.workers)


def has_spawned() -> bool:
    """True if transformations run in worker processes of this program."""
    current = session()
    return current.workers is not None or current.settings is not None and current.settings.execution == "spawn"


def close() -> None:
    """End workers and connections of this program now rather than at its end; what was configured is forgotten."""
    with _state.lock:
        _state.close()
        atexit.unregister(_state.close)
        _state.__init__()
        atexit.register(_state.close)


def dask_client(**options):
    """A plain ``distributed.Client`` of the Dask cluster that the daskserver of the configuration manages.

    ``options`` are passed on to it.  Needs dask here too; close it when done.  Raises ``ConfigurationError`` or ``ServiceError``.
    """
    from .daskclient import client          # like all that is about Dask
    return client(session(), **options)


def dashboard_link() -> str:
    """Where a browser on this machine finds the dashboard of that Dask cluster.  Raises as ``dask_client``."""
    from .daskclient import dashboard_link
    return dashboard_link(session())


def in_worker() -> bool:
    """True in a process that runs jobs for a jobserver."""
    return _worker_context() is not None


def session() -> Session:
    """The session in use: inside a worker that of the job that is running, else the default one."""
    context = _worker_context()
    if context is None:
        return _state.session
    with _state.lock:
        if _state.session.nested is not context:
            _state.session.close()              # that of the job which this process ran before
            _state.session = Session(nested=context)
        return _state.session


@contextlib.contextmanager
def using(session: Session):
    """Meanwhile ``session`` is the default one: functions that run in this process call others there."""
    before, _state.session = _state.session, session
    try:
        yield
    finally:
        _state.session = before


def _worker_context():
    # A process in which no job ever ran has not imported the module that runs jobs; another thread may be at it.
    current = getattr(sys.modules.get(__package__ + ".worker"), "current", None)
    return current() if current is not None else None


def _choose_workdir(workdir) -> None:
    if workdir is None:
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__package__") == __package__:
            frame = frame.f_back
        file = frame.f_globals.get("__file__") if frame is not None else None
        workdir = os.path.dirname(os.path.abspath(file)) if file and os.path.exists(file) else os.getcwd()
    workdir = os.path.abspath(os.path.expanduser(os.fspath(workdir)))
    if not os.path.isdir(workdir):
        raise ConfigurationError("the working directory %s does not exist" % workdir)
    _state.workdir = workdir
