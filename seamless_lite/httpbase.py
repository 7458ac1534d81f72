"""The server that every service is: routing, bodies, JSON errors, signatures, status file, idle exit, signals.

A ``Service`` knows nothing about sockets: its handlers take a ``Request`` and return bytes, a dict, a
list, a str or a ``Reply``, or raise ``HttpError``.  This module knows nothing about buffers or jobs.

``serve`` runs one service until a signal, the end of its idle time or (private services) the end of
its standard input; ``start`` does the same in a thread; ``run_service`` is the ``main`` of a program.
One thread per connection; a request is read whole, up to a stated bound, before it is answered,
because an unread body turns a clear error into the client's broken pipe.
"""
import contextlib
import errno
import logging
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
import typing as _t

from .errors import ConfigurationError, CorruptBufferError, SeamlessError, ServiceError
from .httpmessage import JSON_BYTES, HttpError, Reply, Request
from .httpwire import PIECE, Body, Malformed, Wire, WireError
from .signing import PROTOCOL, NonceCache, Signed, SignatureError, check_request, load_secret, parse_secret
from .statusfile import await_status, read_status, update_status

KEEP_ALIVE_S = 300.0        # an idle connection is closed after this
PAUSE_S = 60.0              # a client may be silent for so long in the middle of a message
SOCKET_PATH_BYTES = 100     # the system's limit is 104 to 108, and binding needs one more character
BACKLOG = 256
LOOPBACK = (None, "127.0.0.1", "::1", "localhost")
_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (\S{1,8000}) HTTP/1\.([01])")
log = logging.getLogger(__name__)


class Service:
    """What a service provides.  ``routes``: (METHOD, compiled pattern for the whole path, handler); a handler
    is called with the request and the groups of the pattern.  ``stopping`` is set when the server begins to
    stop, for handlers that wait."""
    name = "service"
    routes: _t.Sequence[_t.Tuple[str, "re.Pattern", _t.Callable]] = ()

    def __init__(self):
        self.stopping = threading.Event()

    def busy(self) -> bool:
        """True while there is work that no request waits for; it keeps the service from its idle exit."""
        return False

    def info(self) -> dict:
        """More fields for ``GET /info``; JSON-able."""
        return {}

    def close(self):
        """Let go of everything; called once, when no request is being handled any more (or they take too long)."""

    def reply_to(self, request: Request) -> Reply:
        """Find the handler and call it.  Raises ``HttpError`` and whatever the handler raises."""
        if request.path == "/healthcheck" and request.method == "GET":
            return Reply("OK")
        if request.path == "/info" and request.method == "GET":
            version = getattr(sys.modules.get(__package__), "__version__", "unknown")
            return Reply({"service": self.name, "protocol": PROTOCOL, "version": version, "pid": os.getpid(), **self.info()})
        allowed = ["GET"] if request.path in ("/healthcheck", "/info") else []
        for method, pattern, handler in self.routes:
            match = pattern.fullmatch(request.path)
            if match and method == request.method:
                return Reply.of(handler(request, *match.groups()))
            if match:
                allowed.append(method)
        if allowed:
            raise HttpError(405, "", {"detail": "Method Not Allowed"}, {"Allow": ", ".join(sorted(set(allowed)))})
        raise HttpError(404, "", {"detail": "Not Found"})


class Listen(_t.NamedTuple):
    """Where to listen: on ``socket_path``, or on ``host`` with ``port`` (0: any), or with a free port of ``port_range`` (inclusive)."""
    socket_path: _t.Optional[str] = None
    host: _t.Optional[str] = None
    port: _t.Optional[int] = None
    port_range: _t.Optional[_t.Tuple[int, int]] = None


class _Server:
    """Accepts connections on ``sock``, a daemon thread for each, and knows how many there are."""

    def __init__(self, service: Service, sock: socket.socket, secret: _t.Optional[bytes]):
        self.service, self.secret, self.nonces = service, secret, NonceCache()
        self.stopping = False
        self._sock = sock
        self._lock = threading.Lock()
        self._n_active, self._last_end = 0, time.monotonic()
        self._connections: _t.Set[socket.socket] = set()
        self._most = _connection_limit()

    # --- one connection: requests one after the other

    def run(self, sock: socket.socket):
        """Answer until the other side is gone or silent for too long, or something makes it unsafe to go on."""
        wire = Wire(sock)
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # or each answer waits 40 ms
            keep = len(self._connections) <= self._most and not self.stopping
            if not keep:
                Reply.of_error(HttpError(503, "this service has too many connections")).send(wire, False)
            while keep:
                keep = self._one(wire)
        except (WireError, OSError) as exc:
            log.debug("connection closed: %s", exc)
        except CorruptBufferError as exc:   # the head is sent, so that the client sees only an end that comes too early
            log.warning("an answer was broken off: %s", exc)
        except Exception:                   # a defect of ours: it ends this connection only
            log.exception("a connection failed")
        finally:
            self.forget(sock)

    def _one(self, wire: Wire) -> bool:
        """Read one request and answer it; True if another one may follow."""
        wire.pause_s = KEEP_ALIVE_S
        try:
            head = wire.head()
        except Malformed as exc:
            Reply.of_error(HttpError(400, str(exc))).send(wire, False)
            _linger(wire)
            return False
        if head is None:
            return False
        wire.pause_s = PAUSE_S
        with self._lock:
            self._n_active += 1
        try:
            return self._answer(wire, *head)
        finally:
            with self._lock:
                self._n_active -= 1
                self._last_end = time.monotonic()       # idle time starts when the last request ends

    def _answer(self, wire: Wire, first: str, headers: _t.Dict[str, str]) -> bool:
        signed, body = None, None
        try:
            match = _REQUEST_LINE.fullmatch(first)
            if not match:
                raise Malformed("%.60r is not an HTTP request" % first)
            body = Body(wire, headers)
            header = headers.get("authorization")
            if self.secret is not None and (header is not None or match[2] != "/healthcheck"):
                signed = check_request(self.secret, match[1], match[2], header, self.nonces)
            reply = self.service.reply_to(Request(match[1], match[2], headers, body, signed and signed.digest))
        except Malformed as exc:
            reply, body = Reply.of_error(HttpError(400, str(exc))), None
        except SignatureError as exc:
            signed = Signed(exc.nonce, "") if exc.nonce else None
            reply = Reply({"error": {"kind": "ServiceError", "message": str(exc)}, "time": self.nonces.now()}, 401)
        except SeamlessError as exc:
            reply = Reply.of_error(exc)
        except WireError:
            raise
        except Exception as exc:            # a defect of ours: the server lives on, and the log has the traceback
            log.exception("%s failed", first)
            message = "the %s failed: %s: %s (its log says more)" % (self.service.name, type(exc).__name__, exc)
            reply = Reply({"error": {"kind": "ServiceError", "message": message}}, 500)
        try:
            whole = body is not None and body.drain(JSON_BYTES)
            wish = headers.get("connection", "").lower()
            keep = (whole and not self.stopping and "close" not in wish
                    and (first.endswith("1.1") or "keep-alive" in wish))
            if self.secret and signed:
                reply.sign(self.secret, signed.nonce)
            reply.send(wire, keep, without_body=first.startswith("HEAD "))
        finally:
            reply.close()
        if not whole:
            _linger(wire)
        return keep

    # --- all of them

    def accept_until(self, stop_fd: int):
        """Accept until something can be read from ``stop_fd``."""
        self._sock.setblocking(False)
        while stop_fd not in _readable((self._sock.fileno(), stop_fd)):
            connection = None
            try:
                connection, _ = self._sock.accept()
                connection.settimeout(KEEP_ALIVE_S)
                with self._lock:
                    self._connections.add(connection)
                threading.Thread(target=self.run, args=(connection,), daemon=True,
                                 name=self.service.name + " connection").start()
            except (OSError, RuntimeError) as exc:      # no descriptors or threads left: without a pause the loop would spin
                log.warning("a connection was not accepted: %s", exc)
                if connection is not None:
                    self.forget(connection)
                time.sleep(0.05)

    def forget(self, connection: socket.socket):
        """The connection ended."""
        with self._lock:
            self._connections.discard(connection)
            connection.close()

    def idle_s(self) -> float:
        """Seconds since the end of the last request or job."""
        if self._n_active or self.service.busy():
            self._last_end = time.monotonic()
        return time.monotonic() - self._last_end

    def stop(self):
        """Give requests a second to end, close the service, cut the connections."""
        self.stopping = True
        self._sock.close()
        self.service.stopping.set()
        self._await_requests(1.0)
        try:
            self.service.close()
        except Exception:                   # a defect of ours; stopping goes on
            log.exception("closing the %s failed", self.service.name)
        self._await_requests(1.0)
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _await_requests(self, seconds: float):
        end = time.monotonic() + seconds
        while self._n_active and time.monotonic() < end:
            time.sleep(0.01)


def _linger(wire: Wire):
    """Let the other side read our answer before the rest of what it sends is refused."""
    wire.deadline = time.monotonic() + 2
    with contextlib.suppress(WireError, OSError):
        wire.sock.shutdown(socket.SHUT_WR)
        while wire.receive(PIECE):
            pass


def _connection_limit() -> int:
    """How many connections we take: three quarters of the descriptors that the system allows us."""
    try:
        import resource                     # not on every system
    except ImportError:
        return 256
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8192) * 3 // 4)


def _readable(descriptors: _t.Iterable[int], timeout_s: _t.Optional[float] = None) -> _t.Set[int]:
    """Those of ``descriptors`` that can be read, or are at their end; empty after ``timeout_s``."""
    poll = select.poll()                    # select() fails for numbers over 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}


def _listen(listen: Listen) -> socket.socket:
    """A bound socket.  Raises ``ServiceError`` with what is in the way."""
    if listen.socket_path:
        return _listen_unix(listen.socket_path)
    host = listen.host or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if listen.port_range:
        first, last = listen.port_range
        ports = random.sample(range(first, last + 1), max(0, last + 1 - first))
        what = "no port from %d to %d is free" % (first, last)
    else:
        ports, what = [listen.port or 0], "port %d is not free" % (listen.port or 0)
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(BACKLOG)            # two sockets that only bound could share a port
            return sock
        except OSError as exc:
            sock.close()
            if exc.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ServiceError("cannot listen on %s: %s" % (host, exc.strerror or exc)) from None
    raise ServiceError("%s on %s: choose other ports, or stop what uses them" % (what, host))


def _listen_unix(path: str) -> socket.socket:
    """Bound aside and renamed, so that the socket is private and listening from its first moment."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise ServiceError("the socket path %s is longer than %d bytes: use a shorter folder" % (path, SOCKET_PATH_BYTES))
    if os.path.lexists(path) and _answers(path):
        raise ServiceError("another service listens on %s: stop it first" % path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    aside = path + "~"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        sock.bind(aside)
        os.chmod(aside, 0o600)
        sock.listen(BACKLOG)
        os.rename(aside, path)
        return sock
    except OSError as exc:
        sock.close()
        raise ServiceError("cannot listen on %s: %s" % (path, exc.strerror or exc)) from None


def _answers(path: str) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True                     # its backlog is full, or it is not ours: somebody is there
        return True


class Running:
    """A service that listens.  ``address``: what clients connect to.  Raises ``ServiceError`` if it cannot listen."""

    def __init__(self, service: Service, listen: Listen, secret: _t.Optional[bytes] = None,
                 status_file: _t.Optional[str] = None):
        self.service, self.status_file, self._path = service, status_file, listen.socket_path
        sock = _listen(listen)
        host = listen.host or "127.0.0.1"
        self.port = None if self._path else sock.getsockname()[1]
        self.address = "unix://" + self._path if self._path else "http://%s:%d" % ("[%s]" % host if ":" in host else host, self.port)
        self._inode = os.stat(self._path).st_ino if self._path else None
        try:
            here = {"socket": self._path} if self._path else {"port": self.port}
            update_status(status_file, {**here, "status": "running", "pid": os.getpid()})
        except BaseException:
            sock.close()
            self._remove_socket()
            raise
        self._wake, self._waker = os.pipe()
        self._server = _Server(service, sock, secret)
        self._thread: _t.Optional[threading.Thread] = threading.Thread(
            target=self._server.accept_until, args=(self._wake,), name=service.name, daemon=True)
        self._thread.start()

    def _remove_socket(self):
        """Unless another service has put its own in that place."""
        with contextlib.suppress(FileNotFoundError):
            if self._path and os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def ask_to_stop(self, *_signal):
        """Make ``wait`` return; safe in a signal handler and from any thread."""
        os.write(self._waker, b"x")

    def wait(self, idle_timeout_s: _t.Optional[float] = None, exit_with_stdin: bool = False):
        """Return when asked to stop, after the idle time, or at the end of the standard input."""
        watched = [self._wake] + ([0] if exit_with_stdin else [])
        while True:
            ready = _readable(watched, min(1.0, idle_timeout_s / 4) if idle_timeout_s else None)
            if self._wake in ready or (0 in ready and not os.read(0, 4096)):
                return
            if idle_timeout_s and self._server.idle_s() > idle_timeout_s:
                log.info("idle for %g s", idle_timeout_s)
                return

    def stop(self):
        """Stop listening, close the service, remove the socket, write ``stopped`` to the status file.  Once."""
        if self._thread is None:
            return
        self._remove_socket()
        self.ask_to_stop()
        self._thread.join()
        self._thread = None
        self._server.stop()
        os.close(self._wake)
        os.close(self._waker)
        with contextlib.suppress(ServiceError):         # the file is gone: whoever removed it knows
            if self.status_file and read_status(self.status_file).get("pid") == os.getpid():
                update_status(self.status_file, {"status": "stopped"})

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.stop()


start = Running         # serves in a thread; the caller owns the ``stop()``


def serve(service: Service, listen: Listen, *, secret: _t.Optional[bytes] = None, status_file: _t.Optional[str] = None,
          idle_timeout_s: _t.Optional[float] = None, exit_with_stdin: bool = False):
    """Serve until SIGTERM, SIGINT, the idle time or the end of the standard input; for the main thread.

    Raises ``ServiceError`` if it cannot listen; the service is closed in any case.
    """
    running: _t.Optional[Running] = None
    asked = []

    def on_signal(*_):
        asked.append(True)
        if running is not None:
            running.ask_to_stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        running = Running(service, listen, secret, status_file)
        if secret is None and not (listen.socket_path or listen.host in LOOPBACK):
            log.warning("the %s on %s asks for no signatures (auth: none): everybody who can reach it can use it",
                        service.name, running.address)
        log.info("the %s listens on %s", service.name, running.address)
        if not asked:
            running.wait(idle_timeout_s, exit_with_stdin)
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)       # stopping is not interrupted
        if running is None:
            service.close()
        else:
            running.stop()
        log.info("the %s stopped", service.name)
        for number, handler in before.items():
            signal.signal(number, handler)


def service_arguments(parser):
    """Add the options that every service has to an ``argparse`` parser, and what the exit codes mean."""
    parser.epilog = ("exit codes: 0 it was idle for the time of --timeout, or was ended by SIGTERM or SIGINT; 1 it cannot start, "
                     "for example because the port is in use; 2 wrong usage; 130 interrupted before it served")
    add = parser.add_argument
    add("--status-file", metavar="FILE", help="a JSON file to which port and status are added; it must exist, or appear within 20 s")
    add("--socket", metavar="PATH", help="listen on this Unix socket")
    add("--host", default="127.0.0.1", help="listen on this interface (default: %(default)s)")
    ports = parser.add_mutually_exclusive_group()
    ports.add_argument("--port", type=port, metavar="N", help="listen on this port (0: any that is free)")
    ports.add_argument("--port-range", type=port, nargs=2, metavar=("A", "B"), default=[49152, 65535],
                       help="listen on a free port in this range (default: 49152 65535)")
    add("--timeout", type=seconds, metavar="SECONDS", help="stop after this time without requests and work (default: never)")
    add("--auth", choices=("hmac", "none"), default="hmac", help="ask for signed requests (hmac), or for none")
    add("--secret-stdin", action="store_true", help="read the secret from the first line of the standard input")
    add("--secret-file", metavar="FILE", help="read the secret from this file (default: ~/.seamless/secret)")
    add("--exit-with-stdin", action="store_true", help="stop at the end of the standard input")


def port(text: str) -> int:
    """For ``argparse``, which says "invalid port value"."""
    if not 0 <= int(text) < 1 << 16:
        raise ValueError
    return int(text)


def seconds(text: str) -> float:
    """For ``argparse``, which says "invalid seconds value"."""
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def run_service(make_service: _t.Callable[[_t.Any], Service], args) -> int:
    """The rest of a service program: secret, status file, ``make_service(args)``, serve.  Returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    known = False
    try:
        secret = _secret(args)
        await_status(args.status_file)
        known = bool(args.status_file)
        listen = (Listen(args.socket) if args.socket else Listen(None, args.host, args.port) if args.port is not None
                  else Listen(None, args.host, None, tuple(args.port_range)))
        serve(make_service(args), listen, secret=secret, status_file=args.status_file,
              idle_timeout_s=args.timeout, exit_with_stdin=args.exit_with_stdin)
        return 0
    except (SeamlessError, OSError) as exc:             # an OSError is about a file or folder, and names it
        if known:
            with contextlib.suppress(ServiceError):     # the message below says what matters
                update_status(args.status_file, {"status": "failed", "error": str(exc)})
        print("%s: %s" % (os.path.basename(sys.argv[0]), exc), file=sys.stderr)
        return getattr(exc, "exit_code", 1)


def _secret(args) -> _t.Optional[bytes]:
    line = b""
    if args.secret_stdin:           # whoever started us gives the word to go on with this line, with auth none too
        while not line.endswith(b"\n"):
            byte = os.read(0, 1)    # unbuffered: the rest is not ours
            if not byte or len(line) > 4096:
                raise ConfigurationError("the standard input ended before the secret")
            line += byte
    if args.auth == "none":
        return None
    return parse_secret(line.strip(), "the standard input") if args.secret_stdin else load_secret(args.secret_file)
