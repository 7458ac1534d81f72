"""The status file of a service: a JSON object that its starter makes and to which the service adds.

Each change is atomic, and unknown fields stay as they are (compat/http.md section 4).
"""
import contextlib
import json
import os
import time
import typing as _t

from .errors import ServiceError

WAIT_S = 20.0


def read_status(path: str) -> dict:
    """What the file says.  Raises ``ServiceError`` if it is missing or does not hold a JSON object."""
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError) as exc:
        raise ServiceError("the status file %s cannot be read: %s" % (path, exc)) from None
    if not isinstance(value, dict):
        raise ServiceError("the status file %s does not hold a JSON object" % path)
    return value


def await_status(path: _t.Optional[str]) -> dict:
    """What the file says, as soon as it exists; {} for no ``path``.  Raises ``ServiceError``."""
    end = time.monotonic() + WAIT_S
    while path and not os.path.exists(path):
        if time.monotonic() > end:
            raise ServiceError("the status file %s did not appear within %g s" % (path, WAIT_S))
        time.sleep(0.05)
    return read_status(path) if path else {}


def update_status(path: _t.Optional[str], changes: dict):
    """Change fields of the file, if there is a ``path``.  Raises ``ServiceError``."""
    if not path:
        return
    value = {**read_status(path), **changes}
    aside = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise ServiceError("the status file %s cannot be written: %s" % (path, exc.strerror)) from None
