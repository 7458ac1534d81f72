"""The hosts of the services: conversations with ``hostagent`` there, and patience with connections that are lost.

There is one ``ssh.Host`` for each name and process.  What a lost connection needs is done by ``Mending``, which the
client of a service calls when its requests do not get through any more: log in again, forward again, and start the
service again if it died with its host.
"""
import contextlib
import functools
import os
import sys
import threading
import time
import typing as _t

from .errors import SeamlessError, ServiceError
from .processes import MARK       # a service must outlive the job whose command started it

PATIENCE_S = 600.0          # a host that cannot be reached for so long is given up
PAUSES_S = (0.5, 15.0)      # between two attempts, growing
TELL_S = (5.0, 60.0)        # when to say that we wait, and how often then
ASK_S = 240.0               # for one action on the host: longer than a start under a contended lock takes
#: Not needed, but good to have in the Python that is chosen there.
WISHES = ("numpy",)


class _Locks:
    """``hosts``: the table below; ``login``: one log-in at a time, for it may ask a person something."""

    def __init__(self):
        self.hosts, self.login = threading.Lock(), threading.Lock()


_locks = _Locks()
_hosts: _t.Dict[str, _t.Any] = {}
os.register_at_fork(after_in_child=_locks.__init__)     # another thread of the parent may have held them


def host(name: str, python: _t.Optional[str] = None):
    """The ``ssh.Host`` called ``name``, which is the same at each call."""
    from .ssh import Host               # most programs never talk to another host
    with _locks.hosts:
        if name not in _hosts:
            _hosts[name] = Host(name, python)
        return _hosts[name]


def ask(name: _t.Optional[str], python: _t.Optional[str], *requests: dict) -> list:
    """What these actions bring on the host ``name`` (None: this one), all in one conversation.  Raises ``ServiceError``."""
    def once(request: _t.Callable) -> list:
        return [request(action) for action in requests]
    return once(_here) if name is None else _conversation(name, python, once)


def ensure(name: _t.Optional[str], python: _t.Optional[str], requests: _t.Sequence[dict]) -> dict:
    """The answer of ``hostagent.ensure``, to which the source of this package is sent if need be (``sent``: so many bytes).

    A host that cannot be reached is an error at once, one that is lost on the way is waited for.  Raises ``ServiceError``.
    """
    from . import shipping
    bundle = shipping.bundle()
    action = {"action": "ensure", "dist": bundle.sha256, "package": __package__, "requests": list(requests), "wishes": WISHES,
              "unset": [MARK]}

    def once(request: _t.Callable) -> dict:
        answer = request(action)
        if "missing" in answer:
            request({"action": "receive", "dist": bundle.sha256}, bundle.data)
            answer = dict(request(action), sent=len(bundle.data))
        return answer
    return once(_here) if name is None else _conversation(name, python, once)


def _conversation(name: str, python: _t.Optional[str], once: _t.Callable):
    """``once`` of the function that asks; all over again if the connection was lost in between."""
    begun = []

    def attempt():
        if begun:
            host(name, python).mend()
        with _locks.login:
            talk = host(name, python).converse(_agent())
        try:
            def request(action: dict, data: bytes = b""):
                value = talk.ask(action, data, timeout_s=ASK_S)
                begun.append(True)
                return value
            with _told(name, [""]):         # the connection may be lost without anybody knowing yet, or a start take long
                return once(request)
        finally:
            talk.close()
    try:
        return attempt()
    except (ServiceError, TimeoutError) as exc:
        if getattr(exc, "final", False) or not begun:
            raise
        return patiently(name, attempt, exc)


@functools.lru_cache(maxsize=1)
def _agent() -> str:
    from . import shipping
    return shipping.agent()


def _here(request: dict, data: bytes = b""):
    from . import hostagent
    from .signing import seamless_home
    try:
        return hostagent.act(seamless_home(), request, data)
    except hostagent.HostError as exc:
        raise final(ServiceError(str(exc))) from None


def final(error: SeamlessError) -> SeamlessError:
    """Mark the error as one that will not go away by waiting."""
    error.final = True              # type: ignore[attr-defined]
    return error


def patiently(what: str, attempt: _t.Callable[[], _t.Any], error: _t.Optional[SeamlessError] = None):
    """What ``attempt`` returns; it is called again and again until it raises no ``ServiceError``, or that is final, or ``PATIENCE_S`` are over.

    ``what`` we wait for is told on stderr after some seconds.  ``error``: an attempt failed already.
    """
    import random                   # rarely needed
    import subprocess
    begin, pause, words = time.monotonic(), PAUSES_S[0], [str(error or "it does not answer")]
    with _told(what, words):
        while True:
            try:
                if error is None:
                    return attempt()
            except (ServiceError, TimeoutError) as exc:
                error = exc
            except (OSError, subprocess.SubprocessError) as exc:    # this machine's: no descriptors, no space, a program that hangs
                error = ServiceError("%s: %s" % (type(exc).__name__, exc))
            waited = time.monotonic() - begin
            if getattr(error, "final", False):
                raise error
            if waited + pause > PATIENCE_S:
                raise final(ServiceError("%s (tried for %d s)" % (error, waited)))
            words[0] = str(error)
            time.sleep(pause * random.uniform(0.8, 1.0))
            pause, error = min(pause * 1.7, PAUSES_S[1]), None


@contextlib.contextmanager
def _told(what: str, words: _t.List[str]):
    """Meanwhile say now and then that we wait, also while an attempt hangs; ``words`` holds what is known about the reason."""
    over = threading.Event()

    def tell():
        pause = TELL_S[0]
        while not over.wait(pause):
            print("seamless_lite: waiting for %s" % ": ".join(filter(None, [what, words[0]])), file=sys.stderr, flush=True)
            pause = TELL_S[1]
    thread = threading.Thread(target=tell, name="seamless-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Mending:
    """Brings a service back to where its clients look for it.  ``attempt`` does that once.

    Called by many threads at once, one does it, and the others wait and get what it got.
    """

    def __init__(self, what: str, attempt: _t.Callable[[], _t.Any]):
        self._what, self._attempt = what, attempt
        self._lock = threading.Lock()
        self._n_ended = 0
        self._error: _t.Optional[BaseException] = None
        self._pid = os.getpid()

    def __call__(self) -> None:
        """Raises ``ServiceError`` when it is given up."""
        if self._pid != os.getpid():            # forked, perhaps while another thread was at it
            self.__init__(self._what, self._attempt)        # type: ignore[misc]
        before = self._n_ended
        with self._lock:
            if before == self._n_ended:
                self._error = None
                try:
                    patiently(self._what, self._attempt)
                except SeamlessError as exc:
                    self._error = exc
                self._n_ended += 1
            if self._error is not None:
                raise self._error
