"""Signed requests and answers, and the secret they are signed with.

A request carries ``Authorization: Seamless TIME NONCE DIGEST SIGNATURE``: milliseconds since 1970, 16
random bytes, the SHA-256 of the body and the HMAC-SHA-256 over method, target and these three.  The
answer carries ``Seamless-Signature: DIGEST SIGNATURE`` over the nonce, the status and the digest of its
body.  The secret itself never travels, a request is good only once and only for half a minute, and an
answer belongs to one request.  The digests are declared before the bodies, so that bodies can stream;
who reads a body compares.
"""
import contextlib
import hashlib
import hmac
import os
import re
import threading
import time
import typing as _t

from .errors import ConfigurationError, SeamlessError

#: Changed when programs on both sides of this number would misunderstand each other.
PROTOCOL = 1
WINDOW_S = 30.0
EMPTY = hashlib.sha256(b"").hexdigest()
_REQUEST = re.compile(r"Seamless ([0-9]{1,15}) ([0-9a-f]{32}) ([0-9a-f]{64}) ([0-9a-f]{64})")
_ANSWER = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})")


class SignatureError(SeamlessError):
    """A request or an answer is not signed as it should be.

    ``nonce`` is set if the sender does know the secret (its request was late, or came twice), so that
    it can be given a signed answer.
    """

    def __init__(self, message: str, nonce: _t.Optional[str] = None):
        super().__init__(message)
        self.nonce = nonce


class Signed(_t.NamedTuple):
    """What a good signature says: the ``nonce`` to answer with, and the ``digest`` that the body must have."""
    nonce: str
    digest: str


class NonceCache:
    """Remembers which requests were seen, for as long as one could be sent again.  Thread-safe.

    Its clock is the wall clock at its start plus the time that really passed: setting the machine's
    clock back cannot open the window again, nor lock everybody out.  Requests signed before its start
    are refused, because an earlier process may have seen them.
    """

    def __init__(self, window_s: float = WINDOW_S):
        self.window_s = window_s
        self._wall, self._start = time.time(), time.monotonic()
        self._lock = threading.Lock()
        self._young: _t.Set[str] = set()
        self._old: _t.Set[str] = set()
        self._turned = self._start

    def now(self) -> float:
        """Seconds since 1970."""
        return self._wall + time.monotonic() - self._start

    def in_window(self, signed_s: float) -> bool:
        """Whether a request signed at ``signed_s`` (seconds since 1970) is of now."""
        return signed_s >= int(self._wall * 1000) / 1000 and abs(signed_s - self.now()) <= self.window_s

    def add(self, nonce: str) -> bool:
        """Remember ``nonce``; False if it was there."""
        with self._lock:
            elapsed = time.monotonic() - self._turned
            if elapsed > 2 * self.window_s:             # what is older than two windows is too late anyway
                self._old = self._young if elapsed <= 4 * self.window_s else set()
                self._young, self._turned = set(), time.monotonic()
            if nonce in self._young or nonce in self._old:
                return False
            self._young.add(nonce)
            return True


def _mac(secret: bytes, *parts) -> str:
    return hmac.new(secret, "\n".join(map(str, parts)).encode("latin-1"), "sha256").hexdigest()


def sign_request(secret: bytes, method: str, target: str, digest: str = EMPTY,
                 offset_s: float = 0.0) -> _t.Tuple[str, str]:
    """(value of the ``Authorization`` header, nonce).

    ``digest``: SHA-256 of the body, hex; ``offset_s``: how far the server's clock is ahead of ours.
    """
    nonce, milliseconds = os.urandom(16).hex(), int((time.time() + offset_s) * 1000)
    mac = _mac(secret, "seamless request", method, target, milliseconds, nonce, digest)
    return "Seamless %d %s %s %s" % (milliseconds, nonce, digest, mac), nonce


def check_request(secret: bytes, method: str, target: str, header: _t.Optional[str], nonces: NonceCache) -> Signed:
    """What the ``Authorization`` header proves.  Raises ``SignatureError``."""
    if header is None:
        raise SignatureError("this service answers only requests signed with its owner's secret")
    match = _REQUEST.fullmatch(header)
    if not match:
        raise SignatureError("the Authorization header is not a signature of this service's kind")
    milliseconds, nonce, digest, mac = match.groups()
    if not hmac.compare_digest(mac, _mac(secret, "seamless request", method, target, milliseconds, nonce, digest)):
        raise SignatureError("the request is not signed with the secret of this service")
    if not nonces.in_window(int(milliseconds) / 1000):
        raise SignatureError("the request was signed at another time than now: the clocks differ", nonce)
    if not nonces.add(nonce):
        raise SignatureError("the request was sent twice", nonce)
    return Signed(nonce, digest)


def sign_answer(secret: bytes, nonce: str, status: int, digest: str) -> str:
    """The value of the ``Seamless-Signature`` header of an answer."""
    return "%s %s" % (digest, _mac(secret, "seamless answer", nonce, status, digest))


def check_answer(secret: bytes, nonce: str, status: int, header: _t.Optional[str]) -> str:
    """The digest that the body of the answer must have.  Raises ``SignatureError``."""
    match = _ANSWER.fullmatch(header or "")
    if not match or not hmac.compare_digest(match[2], _mac(secret, "seamless answer", nonce, status, match[1])):
        raise SignatureError("the answer is not signed with our secret")
    return match[1]


def seamless_home() -> str:
    """The user's folder: ``$SEAMLESS_HOME``, or ``~/.seamless``."""
    return os.path.abspath(os.path.expanduser(os.environ.get("SEAMLESS_HOME") or "~/.seamless"))


def load_secret(path: _t.Optional[str] = None) -> bytes:
    """The secret in the file ``path`` (default: the user's own), which is made if it is missing.

    Raises ``ConfigurationError`` if others can read it, somebody else owns it, or it holds no secret.
    """
    path = os.fspath(path or os.path.join(seamless_home(), "secret"))
    temporary = "%s.%d-%s" % (path, os.getpid(), os.urandom(4).hex())
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(os.urandom(32).hex().encode("ascii") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)        # unlike a rename, it lets the first of two processes win
            finally:
                if os.path.lexists(temporary):
                    os.unlink(temporary)
    except OSError as exc:
        raise ConfigurationError("the secret file %s cannot be made: %s" % (path, exc.strerror)) from None
    return _read_secret(path)


def _read_secret(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            status, text = os.fstat(file.fileno()), file.read(4096).strip()
    except OSError as exc:
        raise ConfigurationError("the secret file %s cannot be read: %s" % (path, exc.strerror)) from None
    if status.st_uid != os.geteuid():
        raise ConfigurationError("the secret file %s belongs to another user: remove it, and a new one will be made" % path)
    if status.st_mode & 0o077:
        raise ConfigurationError("the secret file %s can be read by other users: remove it (a new one will be made),"
                                 " or run 'chmod 600 %s' if you are sure that nobody did" % (path, path))
    return parse_secret(text, path)


def parse_secret(text: bytes, where: str) -> bytes:
    """The secret written as the hexadecimal digits ``text``.  Raises ``ConfigurationError``, which names ``where``."""
    if not re.fullmatch(rb"(?:[0-9a-fA-F]{2}){16,}", text):
        raise ConfigurationError("%s holds no secret: it should be at least 32 hexadecimal digits" % where)
    return bytes.fromhex(text.decode("ascii"))
