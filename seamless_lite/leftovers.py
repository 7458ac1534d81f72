"""Private folders among the temporary files: each is held by a lock, and those whose holder was killed are removed.

Sent to other hosts as a part of ``hostagent``: it runs on Python 3.6.
"""
import contextlib
import fcntl
import glob
import os
import shutil

#: What the names of such folders begin with.
PREFIXES = ("seamless-jobs-", "seamless-dask-")
_LOCK = "lock"


def hold(folder):
    """Hold the new folder until the descriptor that is returned is closed, at the latest when this process ends."""
    path = os.path.join(folder, _LOCK)
    fd = os.open(path + "~", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, os.uname().nodename.encode())
    with contextlib.suppress(OSError):          # no locks on this file system: then it is never swept
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path + "~", path)             # only now is it seen by ``sweep``
    return fd


def sweep(parent=None):
    """Remove those of ours in ``parent`` (None: where temporary files go) that nobody holds any more."""
    import tempfile                         # rarely needed
    for prefix in PREFIXES:
        for folder in glob.glob(os.path.join(glob.escape(parent or tempfile.gettempdir()), prefix + "*")):
            with contextlib.suppress(OSError):          # it is in use, or just being made or removed
                if os.lstat(folder).st_uid == os.geteuid():
                    _remove_if_left(folder)


def _remove_if_left(folder):
    fd = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(fd, 300) == os.uname().nodename.encode():        # on a shared disk locks may count on one node only
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
