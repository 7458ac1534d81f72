"""What is sent to another host: the source of this package as one zip, and the program that talks with us there.

``bundle`` is the zip: what services need, and what the user's functions may import from us when they run there.
Its bytes depend on nothing but the sources (nothing in it is compressed, as compressors differ), so that its SHA-256
names a version; it travels compressed as a whole.  It is kept in ``~/.seamless/dist`` as long as the sources do
not change.  ``agent`` is the program.  Both work when the package is imported from a zip, and under another name.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import time
import typing as _t
import zlib

from .errors import ServiceError
from .processes import package_root
from .signing import seamless_home

#: Modules that only commands need, which stay here like the commands (``cmd_*``); a test compares with the imports.
STAYS = frozenset(("__main__", "archive", "bashparse", "bashwords", "command", "commandline", "confirm", "fsck", "gc", "inputs", "outputs", "pins", "placing", "program", "queuefile", "run_options",
                   "script"))
#: The modules of the program that runs on the host, each after those that it needs.
AGENT = ("errors", "signing", "hostside", "conda", "hostpython", "hostsource", "leftovers", "hostagent")
KEEP_S = 30 * 86400.0
_DATE = (1980, 1, 1, 0, 0, 0)
_LOADER = """\
import sys, types, zlib, base64, json
sources = json.loads(zlib.decompress(base64.b85decode(%r)).decode("utf-8"))
package = sys.modules["seamless_agent"] = types.ModuleType("seamless_agent")
package.__path__ = []
for name, text in sources:
    module = sys.modules["seamless_agent." + name] = types.ModuleType("seamless_agent." + name)
    module.__package__ = "seamless_agent"
    setattr(package, name, module)
    exec(compile(text, "<%%s of seamless_lite>" %% name, "exec"), module.__dict__)
if __name__ == "__main__":
    sys.exit(package.hostagent.main())
"""


class Bundle(_t.NamedTuple):
    """``sha256`` is that of the zip, ``data`` the zip compressed with zlib."""
    sha256: str
    data: bytes


def bundle() -> Bundle:
    """The source of this package.  Raises ``ServiceError`` if it cannot be read."""
    state = hashlib.sha256(repr((__package__, source_state())).encode("utf-8")).hexdigest()[:16]
    folder = os.path.join(seamless_home(), "dist")
    found = _kept(folder, state)
    if found is None:
        archive = _zip()
        found = Bundle(hashlib.sha256(archive).hexdigest(), zlib.compress(archive, 9))
        _keep(folder, state, found)
    return found


def agent() -> str:
    """The text of the program for the host: ``hostagent.main()`` with the modules that it needs."""
    import base64
    sources = json.dumps([(name, _source(name).decode("utf-8")) for name in AGENT])
    return _LOADER % base64.b85encode(zlib.compress(sources.encode("utf-8"), 9)).decode("ascii")


def source_state() -> _t.List[list]:
    """Names, sizes and times of the files of this package: enough to know a changed version without reading it."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.isdir(folder):       # in a zip
        status = os.stat(package_root())
        return [[status.st_size, status.st_mtime_ns]]
    return sorted([entry.name, entry.stat().st_size, entry.stat().st_mtime_ns]
                  for entry in os.scandir(folder) if entry.name.endswith(".py"))


def _source(name: str) -> bytes:
    """The source of one of our modules.  Raises ``ServiceError``."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    try:
        loader = globals().get("__loader__")
        if not os.path.exists(path) and hasattr(loader, "get_data"):
            return loader.get_data(path)
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        raise ServiceError("this package cannot be sent to another host, its source %s cannot be read: %s" % (path, exc)) from None


def _zip() -> bytes:
    import zipfile                      # only when the sources have changed
    folder = __package__.replace(".", "/")
    files = {"%s/%s.py" % (folder, name): _source(name) for name in _modules()}
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        files[folder + "/__init__.py"] = b""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _DATE), files[name])
    return stream.getvalue()


def _modules() -> _t.List[str]:
    """The names of the modules that travel."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if os.path.isdir(folder):
        names = os.listdir(folder)
    else:
        import zipfile
        with zipfile.ZipFile(package_root()) as archive:
            prefix = __package__.replace(".", "/") + "/"
            names = [name[len(prefix):] for name in archive.namelist() if name.startswith(prefix)]
    modules = [name[:-len(".py")] for name in names if name.endswith(".py") and "/" not in name]
    return [name for name in modules if name not in STAYS and not name.startswith("cmd_")]


# --- kept bundles -------------------------------------------------------------------------------------------

def _kept(folder: str, state: str) -> _t.Optional[Bundle]:
    """The bundle made of sources in this state, if it is there and undamaged."""
    with contextlib.suppress(OSError, zlib.error):
        for name in os.listdir(folder):
            match = re.fullmatch(state + r"-([0-9a-f]{64})-([0-9a-f]{8})\.zlib", name)
            if match:
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
                if "%08x" % zlib.crc32(data) == match[2]:       # the other side checks the SHA-256
                    return Bundle(match[1], data)
    return None


def _keep(folder: str, state: str, found: Bundle) -> None:
    """Keep it for the next process, and remove those of old versions; a folder that cannot be written does not matter."""
    path = os.path.join(folder, "%s-%s-%08x.zlib" % (state, found.sha256, zlib.crc32(found.data)))
    aside = "%s.%d.tmp" % (path, os.getpid())
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(found.data)
            os.replace(aside, path)
        finally:
            if os.path.exists(aside):
                os.unlink(aside)
        for name in os.listdir(folder):
            old = os.path.join(folder, name)
            if re.fullmatch(r"[0-9a-f]{16}-.*", name) and time.time() - os.stat(old).st_mtime > KEEP_S:
                os.unlink(old)
