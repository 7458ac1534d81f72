"""``Meta`` as Seamless 1.x writes it into a transformation dict: the keys that are dropped before hashing.

The values of variables and the environment are buffers of their own.
"""
import json
import typing as _t

from .celltypes import plain_dumps, plain_loads
from .checksum import Checksum
from .errors import SeamlessError
from .transformation import Meta


def execution_dunders(meta: Meta, put: _t.Callable[[bytes], Checksum]) -> _t.Dict[str, object]:
    """The keys for ``meta``; ``put`` stores a buffer."""
    dunders: _t.Dict[str, object] = {"META__" + name: ["str", None, put(plain_dumps(value))] for name, value in meta.metavars.items()}
    if meta.environment:
        dunders["__env__"] = put(plain_dumps(dict(meta.environment)))
    if meta.job_folder:
        dunders["__meta__"] = {"write_remote_job": meta.job_folder}
    return dunders


def execution_meta(dunders: _t.Mapping, get: _t.Callable[[Checksum], bytes], scratch: bool) -> Meta:
    """The reverse; other keys are passed over.  Raises what ``get`` raises, ``SeamlessError``, ``ValueError``."""
    for key, pin in dunders.items():
        if key.startswith("META__") and not (isinstance(pin, (list, tuple)) and len(pin) == 3):
            raise SeamlessError("%s is not [celltype, subcelltype, checksum]" % key)
    metavars = {key[len("META__"):]: plain_loads(get(Checksum(pin[2]))) for key, pin in dunders.items() if key.startswith("META__")}
    environment = dunders.get("__env__") or {}
    if isinstance(environment, str):
        environment = plain_loads(get(Checksum(environment)))
    details = dunders.get("__meta__") or {}
    for key, value in (("__env__", environment), ("__meta__", details)):
        if not isinstance(value, dict):
            raise SeamlessError("%s is not a JSON object" % key)
    return Meta(metavars={name: value if isinstance(value, str) else json.dumps(value) for name, value in metavars.items()},
                environment=environment, scratch=scratch, job_folder=str(details.get("write_remote_job") or ""))
