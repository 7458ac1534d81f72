"""What is kept of a run: the execution record beside its result (compat/http.md section 2.2), and the way back
from the result to an outcome.

Minimal records say how long it took; full ones (``record: true``) also where, with which software, and on what data.
"""
import typing as _t

from .celltypes import DEEP, deep_checksums
from .checksum import Checksum
from .transformation import INLINE_BYTES, Outcome

#: The version of Seamless' transformer package whose form of record this is.
RECORD_VERSION = "0.6.1"
#: The fields of a full record that are checksums, if they are not null: we fill the first three.
CHECKSUM_FIELDS = ("node", "environment", "node_env", "queue", "queue_node", "compilation_context", "validation_snapshot")


def record_of(transformation: str, result: str, runtime: _t.Mapping[str, _t.Any], mode: str, target: _t.Optional[str]) -> dict:
    """The record of one run: a full one if the process that ran it says what is needed (``buckets.details``)."""
    minimal = minimal_record(transformation, result, runtime, mode, target)
    details = runtime.get("record")
    if not isinstance(details, dict):
        return minimal
    envelope = {"actual_remote_target": target, **details.get("execution_envelope", {})}
    return {**minimal, "checksum_fields": list(CHECKSUM_FIELDS), **dict.fromkeys(CHECKSUM_FIELDS), **details,
            "execution_envelope": envelope, "bucket_contract_violations": [], "job_contract_violations": [],
            "contract_violations": [], "compilation_time_seconds": None}


def minimal_record(transformation: str, result: str, runtime: _t.Mapping[str, float],
                   mode: str = "process", target: _t.Optional[str] = None) -> dict:
    """The minimal record of one run.  ``mode``: process, spawn or remote; ``target``: jobserver, daskserver or None."""
    return {
        "schema_version": 1,
        "tf_checksum": str(transformation),
        "result_checksum": str(result),
        "seamless_version": RECORD_VERSION,
        "execution_mode": mode,
        "remote_target": target,
        "wall_time_seconds": runtime.get("wall_time_seconds", 0.0),
        "cpu_time_user_seconds": runtime.get("cpu_time_user_seconds", 0.0),
        "cpu_time_system_seconds": runtime.get("cpu_time_system_seconds", 0.0),
        "memory_peak_bytes": runtime.get("memory_peak_bytes", 0),
        "gpu_memory_peak_bytes": None,
    }


def cached_outcome(result: Checksum, celltype: _t.Optional[str], buffers) -> _t.Optional[Outcome]:
    """The outcome for a recorded result of this celltype; None if its bytes, or leaves, are gone."""
    length = buffers.length(result)
    if length is None:
        return None
    data = buffers.get(result) if length <= INLINE_BYTES or celltype in DEEP else None
    if celltype in DEEP and (data is None or not all(buffers.has(deep_checksums(data)))):
        return None
    return Outcome(result, buffer=data if length <= INLINE_BYTES else None, cached=True)
