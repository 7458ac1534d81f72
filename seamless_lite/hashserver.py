"""The hashserver: buffers over HTTP, from and into a ``Folder``; its client; the program.

Every request is that of Seamless 1.x (compat/http.md section 1), except two of our own for many small buffers:

    POST /put  frames                                          -> {"stored": n}, all durable
    POST /get  {"checksums": [...], "largest": n, "total": n}  -> frames of those that are there

A frame is ``<checksum> <length>`` and a newline, then the content; in an answer also ``<checksum> -`` for a buffer
that is there, but has more than ``largest`` bytes, or does not fit into ``total``.

Nothing larger than such a batch is held in memory.  An upload is hashed while it is written to a temporary
file.  A download is verified before its first byte, by reading the file once more, when this process serves
that file for the first time; so a damaged buffer is an error, and never a download that breaks off.
"""
import argparse
import os
import re
import sys
import threading
import time
import typing as _t

from .checksum import Checksum
from .compressed import ENCODINGS, expand, hash_pieces, identify
from .errors import CacheMissError, ConfigurationError, CorruptBufferError, SeamlessError, ServiceError
from .folder import Folder, MemoryBuffers, log
from .httpbase import Service, run_service, service_arguments
from .httpclient import Answer, HttpClient
from .httpmessage import HttpError, Reply, Request

PROMISE_S = 600.0
POLL_S = 0.5                # somebody else may write to the folder too, and says nothing
BATCH_BYTES = 8 << 20       # content of one batch; with its copies and the interpreter that stays below 64 MB
BATCH_BUFFERS = 4000
SINGLE_BYTES = 1 << 20      # larger buffers travel alone
LIST_CHECKSUMS = 10000      # asked for in one request
EMPTY = Checksum.of(b"")
_SUFFIXES = {coding: suffix for suffix, coding in ENCODINGS.items()}
_FRAME = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,9}|-)\n")


class HashService(Service):
    """Serves the buffers of ``folder``."""
    name = "hashserver"

    def __init__(self, folder: Folder):
        super().__init__()
        self.folder = folder
        self._changed = threading.Condition()
        self._uploads: _t.Set[Checksum] = set()
        self._promises: _t.Dict[Checksum, float] = {}       # -> when it expires
        buffer = re.compile("/([0-9a-fA-F]{64})")
        self.routes = [
            ("GET", buffer, self.get), ("PUT", buffer, self.put),
            ("GET", re.compile("/has"), self.has), ("GET", re.compile("/has-now"), self.has_now),
            ("GET", re.compile("/buffer-length"), self.buffer_length),
            ("POST", re.compile("/put"), self.put_batch), ("POST", re.compile("/get"), self.get_batch)]
        if folder.writable:
            self.routes += [("PUT", re.compile("/promise/([0-9a-fA-F]{64})"), self.promise),
                            ("PUT", re.compile("/(?:promise/)?([^/]+)"), _no_checksum)]
        self.routes.append(("GET", re.compile("/([^/]+)"), _no_checksum))

    def info(self) -> dict:
        return {"directory": self.folder.directory, "writable": self.folder.writable}

    # ---- one buffer

    def get(self, request: Request, name: str) -> Reply:
        """GET /<checksum>; waits while the buffer is being uploaded, or is promised."""
        checksum = Checksum(name)
        self._await(lambda: self.folder.has([checksum])[0] or not self._is_expected(checksum))
        there = self.folder.has([checksum])[0]
        headers = {"Access-Control-Allow-Origin": "*", "ETag": '"%s"' % checksum,
                   "Content-Disposition": 'attachment; filename="%s"' % checksum}
        wanted = _preferred(request.headers.get("accept-encoding"), self.folder.forms(checksum))
        try:
            if wanted and "range" not in request.headers:
                return self._compressed(checksum, wanted, headers)
            file = self.folder.open(checksum)
        except CacheMissError:              # zstd, and nothing here can read it: perhaps the client can
            return self._compressed(checksum, ".zst", headers)
        if file is None and there:
            raise HttpError(400, "", {"message": "File corruption: the stored bytes do not hash to %s" % checksum})
        if file is None:
            raise HttpError(404, "", "Not found")
        headers["Last-Modified"] = time.strftime(
            "%a, %d %b %Y %H:%M:%S GMT", time.gmtime(os.fstat(file.fileno()).st_mtime))
        return _ranged(file, request.headers.get("range"), headers, checksum)

    def put(self, request: Request, name: str) -> Reply:
        """PUT /<checksum>; plain, or compressed as ``Content-Encoding`` says."""
        self._check_writable()
        checksum = Checksum(name)
        suffix = _SUFFIXES.get(request.headers.get("content-encoding", "").strip().lower(), "")
        with self._changed:
            mine = checksum not in self._uploads
            if mine:
                self._uploads.add(checksum)
        if not mine:
            return _unread(request, 202)
        try:
            is_new = self.folder.put_stream(checksum, request.stream(), suffix)
            with self._changed:
                self._promises.pop(checksum, None)
        except CorruptBufferError:
            raise HttpError(400, "", "Invalid compressed payload" if suffix else "Incorrect checksum") from None
        finally:
            with self._changed:
                self._uploads.discard(checksum)
                self._changed.notify_all()
        return Reply("OK") if is_new else _unread(request, 201)

    def promise(self, request: Request, name: str) -> Reply:
        """PUT /promise/<checksum>: somebody will upload it soon."""
        checksum, now = Checksum(name), time.monotonic()
        with self._changed:
            self._promises.pop(checksum, None)
            self._promises[checksum] = now + PROMISE_S
            for expired in [name for name, end in self._promises.items() if end <= now]:
                del self._promises[expired]
        return Reply({"checksum": checksum, "expires_in": PROMISE_S}, 202)

    # ---- many buffers

    def has(self, request: Request) -> list:
        """Stored, being uploaded, or promised."""
        return self._has(request, self._is_expected)

    def has_now(self, request: Request) -> list:
        """GET /has-now: stored, or being uploaded."""
        return self._has(request, self._uploads.__contains__)

    def _has(self, request: Request, expected: _t.Callable[[Checksum], bool]) -> list:
        checksums = _checksums(request.json())
        return [there or expected(checksum) for checksum, there in zip(checksums, self.folder.has(checksums))]

    def buffer_length(self, request: Request) -> list:
        """GET /buffer-length: the length, 0 if unknown, true if promised."""
        checksums = _checksums(request.json())
        self._await(lambda: self._uploads.isdisjoint(checksums))
        lengths = map(self.folder.length, checksums)
        return [length or (length is None and self._is_expected(checksum)) or 0
                for checksum, length in zip(checksums, lengths)]

    def put_batch(self, request: Request) -> dict:
        """POST /put."""
        self._check_writable()
        buffers = dict(unframe(request.read(2 * BATCH_BYTES)))
        for checksum, data in buffers.items():
            if data is None or Checksum.of(data) != checksum:
                raise HttpError(400, "what was sent as %s does not hash to it" % checksum)
        self.folder.put_many(buffers.values())
        with self._changed:
            for checksum in buffers:
                self._promises.pop(checksum, None)
            self._changed.notify_all()
        return {"stored": len(buffers)}

    def get_batch(self, request: Request) -> bytes:
        """POST /get; says what is there now, and waits for nothing."""
        wanted = request.json()
        if not isinstance(wanted, dict):
            raise HttpError(400, "the body is not a JSON object")
        limits = [wanted.get(name) for name in ("largest", "total")]
        if any(type(limit) is not int or limit < 0 for limit in limits):
            raise HttpError(400, "'largest' and 'total' are numbers of bytes")
        found = self.folder.get_small(_checksums(wanted.get("checksums")), *(min(limit, BATCH_BYTES) for limit in limits))
        return b"".join(frame(*item) for item in found.items())

    # ---- the parts

    def _check_writable(self) -> None:
        if not self.folder.writable:
            raise HttpError(405, "", {"detail": "Method Not Allowed"})

    def _is_expected(self, checksum) -> bool:
        return checksum in self._uploads or self._promises.get(checksum, 0) > time.monotonic()

    def _await(self, ready: _t.Callable[[], bool]) -> None:
        """Return when ``ready()``; promises expire and uploads end, so that it is some time."""
        with self._changed:
            while not ready() and not self.stopping.is_set():
                self._changed.wait(POLL_S)

    def _compressed(self, checksum, suffix, headers) -> Reply:
        """The stored form as it is; the client verifies what it makes of it."""
        file = open(self.folder.forms(checksum)[suffix], "rb")
        return Reply(file, headers={**headers, "Content-Encoding": ENCODINGS[suffix]})


def _unread(request: Request, status: int) -> Reply:
    """An answer that does not depend on the body, which is read nevertheless: clients get confused otherwise."""
    for _ in request.stream():
        pass
    return Reply(None, status)


def _checksums(value) -> _t.List[Checksum]:
    if not isinstance(value, list):
        raise _invalid("a list is wanted", ["body"], value)
    try:
        return [Checksum(item) for item in value]
    except SeamlessError:
        index = next(index for index, item in enumerate(value) if not _is_checksum(item))
        raise _not_a_checksum(value[index], ["body", index]) from None


def _is_checksum(value) -> bool:
    try:
        return bool(Checksum(value))
    except SeamlessError:
        return False


def _no_checksum(request: Request, name: str):
    raise _not_a_checksum(name, ["path", "checksum"])


def _not_a_checksum(value, where: _t.List) -> HttpError:
    """What Seamless 1.x answers."""
    message = "Wrong length"
    if not isinstance(value, str) or len(value) == 64:
        try:
            bytes.fromhex(value)
        except (TypeError, ValueError) as exc:
            message = str(exc)
    return _invalid("Value error, " + message, where, value)


def _invalid(message: str, where: _t.List, value) -> HttpError:
    return HttpError(400, "", {"message": "Invalid data", "exception": {
        "type": "value_error", "loc": where, "msg": message, "input": value if isinstance(value, str) else str(value)[:200]}})


def _preferred(accepted: _t.Optional[str], forms: _t.Mapping[str, str]) -> str:
    """The suffix of the stored form to send; "" for the plain content, which every client understands."""
    best, best_quality = "", 0.0
    for item in (accepted or "").lower().split(","):
        coding, _, parameter = item.partition(";")
        suffix = _SUFFIXES.get(coding.strip(), "" if coding.strip() == "identity" else None)
        try:
            quality = float(parameter.partition("=")[2]) if parameter else 1.0
        except ValueError:
            continue
        if suffix is not None and quality > best_quality and (suffix in forms or not suffix):
            best, best_quality = suffix, quality
    return best


def _ranged(file, wanted: _t.Optional[str], headers, checksum) -> Reply:
    """The whole file, or the one range of bytes that is asked for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (wanted or "").replace(" ", ""))
    headers["Accept-Ranges"] = "bytes"
    if not match or not (match[1] or match[2]):
        return Reply(file, headers=headers, digest=checksum)
    size = file.seek(0, os.SEEK_END)
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        file.close()
        raise HttpError(416, "", "Range not satisfiable", {"Content-Range": "bytes */%d" % size})
    file.seek(first)
    return Reply(file, 206, {**headers, "Content-Range": "bytes %d-%d/%d" % (first, last, size)}, length=last - first + 1)


def frame(checksum: str, data: _t.Optional[bytes]) -> bytes:
    """One buffer of a batch; None: it is there, but not sent."""
    name = checksum.encode("ascii")
    return b"%s -\n" % name if data is None else b"%s %d\n%s" % (name, len(data), data)


def unframe(body: bytes) -> _t.Iterator[_t.Tuple[Checksum, _t.Optional[bytes]]]:
    """The buffers of a batch.  Raises ``SeamlessError``."""
    position = 0
    while position < len(body):
        head = _FRAME.match(body, position)
        length = int(head[2]) if head and head[2] != b"-" else 0
        end = head.end() + length if head else 0
        if not head or end > len(body):
            raise SeamlessError("a batch of buffers is not well formed at byte %d" % position)
        yield Checksum(head[1].decode("ascii")), None if head[2] == b"-" else body[head.end():end]
        position = end


def nameless_file(fill: _t.Callable[[_t.BinaryIO], bool]) -> _t.Optional[_t.BinaryIO]:
    """A temporary file with what ``fill`` wrote into it, at its beginning; None if that says that there was nothing."""
    import tempfile         # only downloads need it
    file = tempfile.TemporaryFile()
    try:
        if fill(file):
            file.seek(0)
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


class HashserverClient(HttpClient):
    """The buffers of the hashserver at an address; the methods are those of ``folder.MemoryBuffers``.

    Works with a hashserver of Seamless 1.x too.  Raises ``ServiceError`` and its kin.
    """
    remote = True

    def get(self, checksum) -> _t.Optional[bytes]:
        checksum = Checksum(checksum)
        answer = self._download(checksum)
        return None if answer is None else self._verified(answer.body, Checksum.of(answer.body), checksum)

    peek = get

    def get_small(self, checksums: _t.Iterable, largest: int, total: int) -> _t.Dict[Checksum, _t.Optional[bytes]]:
        """As ``MemoryBuffers.get_small``; a batch, or what is sent at most, is bounded too."""
        names, found = list(dict.fromkeys(map(Checksum, checksums))), {}
        for start in range(0, len(names), LIST_CHECKSUMS):
            part = names[start:start + LIST_CHECKSUMS]
            answer = self.request("POST", "/get", json={"checksums": part, "largest": largest, "total": max(0, total)})
            if answer.status in (404, 405):     # Seamless 1.x
                found.update((name, None) for name, there in zip(part, self.has(part)) if there)
                continue
            for name, data in unframe(answer.expect(200).body):
                if data is not None:
                    self._verified(data, Checksum.of(data), name)
                found[name] = data
            total -= len(answer.body)
        return found

    def put(self, data: bytes) -> Checksum:
        checksum = Checksum.of(data)
        if len(data) <= SINGLE_BYTES or not self.length(checksum):
            self._upload(checksum, body=data)
        return checksum

    def put_many(self, datas: _t.Iterable[bytes]) -> _t.List[Checksum]:
        """As ``MemoryBuffers.put_many``: small ones together, large ones alone."""
        checksums, batch, size = [], [], 0
        for data in datas:
            if len(data) > SINGLE_BYTES:
                checksums.append(self.put(data))
                continue
            if size + len(data) > BATCH_BYTES or len(batch) == BATCH_BUFFERS:
                self._put_batch(batch)
                batch, size = [], 0
            checksums.append(Checksum.of(data))
            batch.append((checksums[-1], data))
            size += len(data)
        self._put_batch(batch)
        return checksums

    def put_file(self, path, checksum=None, move: bool = False) -> Checksum:
        """As ``MemoryBuffers.put_file``; never moves."""
        checksum, suffix = identify(path, checksum)
        if not self.length(checksum):
            file = expand(path, suffix, checksum) if suffix else open(path, "rb")
            if file is None:
                raise CorruptBufferError("the file %s changed while it was read" % path)
            with file:
                self._upload(checksum, file=file)
        return checksum

    def put_open(self, checksum, file: _t.BinaryIO) -> None:
        """As ``MemoryBuffers.put_open``; ``file`` can seek."""
        self._upload(Checksum(checksum), file=file)

    def has(self, checksums: _t.Iterable) -> _t.List[bool]:
        names = list(map(Checksum, checksums))
        parts = [names[start:start + LIST_CHECKSUMS] for start in range(0, len(names), LIST_CHECKSUMS)]
        return [there for part in parts for there in self._list("/has-now", part)]

    def open(self, checksum) -> _t.Optional[_t.BinaryIO]:
        """As ``MemoryBuffers.open``: downloaded into a nameless temporary file."""
        return nameless_file(lambda file: self.download(checksum, file))

    def download(self, checksum, file) -> bool:
        """Write the content to ``file``, which is empty and can seek, and verify it; False if it is not there."""
        checksum = Checksum(checksum)
        if self._download(checksum, into=file) is None:
            return False
        file.seek(0)
        self._verified(file, hash_pieces(iter(lambda: file.read(SINGLE_BYTES), b"")), checksum)
        return True

    path = MemoryBuffers.path

    def length(self, checksum) -> _t.Optional[int]:
        """As ``MemoryBuffers.length``; waits for an upload that is under way."""
        return self.lengths([checksum])[0]

    def lengths(self, checksums: _t.Iterable) -> _t.List[_t.Optional[int]]:
        names, found = list(map(Checksum, checksums)), []
        for start in range(0, len(names), LIST_CHECKSUMS):
            found += self._list("/buffer-length", names[start:start + LIST_CHECKSUMS])
        empty = 0 if EMPTY in names and self.has([EMPTY])[0] else None          # 0 also means that it is not there
        return [empty if name == EMPTY else None if length is True else length or None     # True: only promised
                for name, length in zip(names, found)]

    def _download(self, checksum, **options) -> _t.Optional[Answer]:
        """The answer with the buffer; None if it is not there."""
        answer = self.request("GET", "/" + checksum, **options)
        if answer.status == 400 and b"File corruption" in answer.body:
            log().warning("%s has a damaged buffer %s; it is ignored", self.address, checksum)
            return None
        return None if answer.expect(200, 404).status == 404 else answer

    def _verified(self, content, found: Checksum, checksum: Checksum):
        if found != checksum:
            raise CorruptBufferError("%s sent something else as %s: its file or the connection is damaged"
                                     % (self.address, checksum))
        return content

    def _list(self, target: str, checksums: _t.List[Checksum]) -> list:
        found = self.request("GET", target, json=checksums).expect(200).json()
        if not isinstance(found, list) or len(found) != len(checksums):
            raise ServiceError("%s answered %s with something else than a list: it is not a hashserver" % (self.address, target))
        return found

    def _upload(self, checksum: Checksum, **body) -> None:
        for _ in range(3):
            answer = self.request("PUT", "/" + checksum, digest=checksum, **body)
            if answer.status == 405:
                raise SeamlessError("%s serves its buffers for reading only: start it with --writable" % self.address)
            if answer.status == 400 and answer.body == b"Incorrect checksum":
                raise CorruptBufferError("what was sent to %s does not hash to %s: it changed meanwhile" % (self.address, checksum))
            if answer.expect(200, 201, 202).status != 202 or self.length(checksum) is not None:
                return
        raise ServiceError("%s says again and again that somebody else is sending %s" % (self.address, checksum))

    def _put_batch(self, batch: _t.List[_t.Tuple[Checksum, bytes]]) -> None:
        if len(batch) > 1:
            answer = self.request("POST", "/put", body=b"".join(frame(*item) for item in batch))
            if answer.status not in (404, 405):
                answer.expect(200)
                return
        for checksum, data in batch:    # a single one, Seamless 1.x, or a server for reading only, which will say so
            self._upload(checksum, body=data)


def make_service(args) -> HashService:
    """The service that the command line asks for."""
    if not args.writable and not os.path.isdir(args.directory):
        raise ConfigurationError("the buffer folder %s does not exist: make it, or start with --writable" % args.directory)
    folder = Folder(args.directory, args.writable, args.layout, [extra for extra in args.extra_dirs.split(";") if extra],
                    args.lock_timeout)
    if args.writable:
        folder.prepare()
        threading.Thread(target=folder.remove_stale, daemon=True).start()
    return HashService(folder)


def main(argv: _t.Optional[_t.List[str]] = None) -> int:
    """The program ``seamless-hashserver``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="seamless-hashserver", description="Serve a folder of buffers, named by their SHA-256, over HTTP.")
    parser.add_argument("directory", metavar="DIRECTORY", help="the folder of the buffers")
    parser.add_argument("--writable", action="store_true", help="accept uploads too")
    parser.add_argument("--layout", choices=("prefix", "flat"), help="how files lie in a new folder (default: prefix)")
    parser.add_argument("--extra-dirs", metavar='"D1;D2"', default=os.environ.get("HASHSERVER_EXTRA_DIRS", ""),
                        help="more folders to read from")
    parser.add_argument("--lock-timeout", type=float, default=120.0, metavar="SECONDS", help="ignore lock files older than this (default: 120)")
    parser.add_argument("--hash-algorithm", choices=("sha-256",), default="sha-256", help="there is only one")
    service_arguments(parser)
    return run_service(make_service, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
