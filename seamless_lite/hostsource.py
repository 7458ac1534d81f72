"""The folders of a host to which programs are sent: where our files go, and the sources of this package in ``dist``.

A source arrives as a zip, compressed with zlib, and is unpacked to ``dist/<sha256 of the zip>``, so that Python keeps what it compiles
beside it.  It is unpacked in a folder of another name and renamed when it is complete; a manifest in it tells the
sizes of its files, so that one that lost files since (a crash, a clean-up of old files) is noticed, and sent again.

Sent to other hosts as a part of ``hostagent``: it runs on Python 3.6.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time

from . import hostside
from .hostside import HostError

KEEP_S = 30 * 86400.0       # a source that was not used for so long is removed
LEFTOVER_S = 3600.0         # nobody unpacks for so long
SOURCE_BYTES = 64 << 20     # no source is so big
MANIFEST = "MANIFEST.json"
_SOURCE = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r"\.[0-9a-f]{64}\..*")


# --- where our files go -------------------------------------------------------------------------------------

def choose_home():
    """(folder for our files on this host, a sentence if it is not the usual one).  Raises ``HostError``.

    The usual one is ``$SEAMLESS_HOME`` or ``~/.seamless``.  If that cannot be written at all, as on hosts with a
    read-only home, it is a private folder in /tmp or the like.  A full disk is not a reason: it may be full for
    one client and not for the next, and then there would be two of each service.
    """
    usual = os.path.abspath(os.path.expanduser(os.environ.get("SEAMLESS_HOME") or "~/.seamless"))
    if _writable(usual):
        return usual, None
    tried = [usual]
    for parent in ("/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):
        path = os.path.join(parent, "seamless-%d" % os.geteuid())
        if parent.startswith("/") and (os.path.isdir(path) or _writable(parent)):
            with contextlib.suppress(OSError, HostError):           # somebody else's: the next one
                path = hostside.private_folder(path)
                if _writable(path):
                    return path, "%s cannot be written on %s: programs and their logs are kept in %s" % (
                        usual, os.uname().nodename, path)
        tried.append(path)
    raise HostError("there is no place for our files on %s, none of these can be written: %s; set SEAMLESS_HOME in your shell's "
                    "start-up file there to a folder of yours" % (os.uname().nodename, ", ".join(tried)))


def _writable(path):
    """Whether ``path`` can be written, or made if it is missing."""
    while not os.path.lexists(path) and path != "/":
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def dist_folder(home):
    """The folder with the sources, made if it is missing.  Raises ``HostError``."""
    path = os.path.join(home, "dist")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        return hostside.private_folder(path)
    except OSError as exc:
        raise HostError(hostside.disk_trouble(exc, path))


# --- sources ------------------------------------------------------------------------------------------------

def source_folder(home, dist):
    """Where the source with this SHA-256 is unpacked; None if it is not there, or not complete.  Marks it as used."""
    if not _SOURCE.fullmatch(dist):
        raise HostError("%.80r does not name a source: it should be 64 hexadecimal digits" % (dist,))
    path = os.path.join(dist_folder(home), dist)
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
            sizes = json.load(file)
        if any(os.stat(os.path.join(path, name)).st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError, AttributeError):
        return None
    with contextlib.suppress(OSError):      # full disks allow this, others will tell by themselves
        os.utime(path)
    return path


def forget_compiled(source):
    """Remove what Python compiled beside the source."""
    for folder, _, _ in os.walk(source):
        if os.path.basename(folder) == "__pycache__":
            shutil.rmtree(folder, ignore_errors=True)


def unpack(home, dist, data):
    """Unpack the compressed zip ``data``, whose SHA-256 must be ``dist``; returns the folder.  Several may do so at once.

    Raises ``HostError``; then nothing is left.
    """
    import zipfile                          # only where something arrives
    import zlib
    try:
        data = zlib.decompressobj().decompress(data, SOURCE_BYTES)
    except zlib.error:
        data = b""
    if hashlib.sha256(data).hexdigest() != dist:
        raise HostError("the source that arrived on %s is not the one that was sent: try again" % os.uname().nodename)
    folder = dist_folder(home)
    final, aside = os.path.join(folder, dist), os.path.join(folder, ".%s.%d-%s" % (dist, os.getpid(), os.urandom(4).hex()))
    try:
        os.mkdir(aside, 0o700)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(aside)
            sizes = {item.filename: item.file_size for item in archive.infolist()}
        with open(os.path.join(aside, MANIFEST), "w", encoding="utf-8") as file:
            json.dump(sizes, file)
        _publish(home, dist, aside, final)
    except OSError as exc:
        raise HostError(hostside.disk_trouble(exc, folder))
    except (zipfile.BadZipFile, ValueError, RuntimeError) as exc:
        raise HostError("the source that arrived on %s cannot be unpacked: %s" % (os.uname().nodename, exc))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _publish(home, dist, aside, final):
    """Give the folder ``aside`` its final name, unless another client was faster."""
    for attempt in range(3):
        try:
            return os.rename(aside, final)
        except OSError:
            if source_folder(home, dist) is not None:
                return None
            if attempt == 2:
                raise
        with contextlib.suppress(FileNotFoundError):        # it is damaged, and two of us may see that
            os.rename(final, aside + ".old")
            shutil.rmtree(aside + ".old", ignore_errors=True)
    return None


def sweep(home, run):
    """Remove sources that were not used for a month, but for those of services that live, and what interrupted clients left."""
    folder = dist_folder(home)
    records = (hostside.read_record(run, name[:-len(".json")]) for name in os.listdir(run) if name.endswith(".json"))
    used = {record.get("dist") for record in records if record and hostside.alive(record)}
    for name in os.listdir(folder):
        keep_s = KEEP_S if _SOURCE.fullmatch(name) else LEFTOVER_S if _LEFTOVER.fullmatch(name) else None
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):                          # gone meanwhile
            if keep_s is not None and name not in used and time.time() - os.stat(path).st_mtime > keep_s:
                shutil.rmtree(path, ignore_errors=True)
