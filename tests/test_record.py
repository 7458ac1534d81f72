"""What is recorded of a run: minimal by default, full with ``record: true``."""
import json
import os
import subprocess
import sys
import time

import pytest

from seamless_lite import buckets
from seamless_lite.celltypes import plain_loads
from seamless_lite.checksum import Checksum
from seamless_lite.record import minimal_record, record_of
from seamless_lite.resulttable import ResultTable
from seamless_lite.folder import Folder

from test_end_to_end import REMOTE, lab        # noqa: F401 (fixture)

MINIMAL = ["schema_version", "tf_checksum", "result_checksum", "seamless_version", "execution_mode", "remote_target", "wall_time_seconds",
           "cpu_time_user_seconds", "cpu_time_system_seconds", "memory_peak_bytes", "gpu_memory_peak_bytes"]
#: The other fields that Seamless 1.4.3 writes with ``record: true``, as seen in a run of it; all but retry_count, which we do not know.
FULL = {"checksum_fields", "node", "environment", "node_env", "queue", "queue_node", "execution_envelope", "compilation_context", "freshness",
        "bucket_contract_violations", "job_contract_violations", "contract_violations", "validation_snapshot", "started_at", "finished_at",
        "input_total_bytes", "output_total_bytes", "compilation_time_seconds", "hostname", "pid", "process_started_at",
        "process_create_time_epoch", "worker_execution_index"}
CODE = """
    import seamless_lite.config as config
    from seamless_lite import direct
    config.init()
    @direct
    def inner(a):
        return a + 1
    @direct
    def outer(word):
        return inner(len(word)) * "x"
    outer.globals.inner = inner
    print(outer("four"))
    """


def records(lab):                              # noqa: F811
    table = ResultTable(lab.home / "results" / "my-project" / "seamless.db", writable=False)
    rows = table.query("SELECT checksum, result, metadata FROM meta_data")
    return [(name, result, json.loads(text)) for name, result, text in rows]


def test_without_the_option_records_are_minimal(lab):                              # noqa: F811
    lab.configure("- project: my-project\n- execution: process\n")
    lab.python(CODE)
    assert [list(record) for _, _, record in records(lab)] == [MINIMAL, MINIMAL]


@pytest.mark.parametrize("mode", ["process", pytest.param("spawn", marks=pytest.mark.slow), "remote"])
def test_a_full_record_says_where_with_what_and_on_what_it_ran(lab, mode):         # noqa: F811
    lab.configure("- project: my-project\n- execution: %s\n- record: true\n" % mode)
    assert lab.python(CODE) == "xxxxx"
    lab.run("--metavar", "WORD=123", "-c", "echo $WORD")
    found = records(lab)
    assert len(found) == 3
    store = Folder(lab.home / "buffers" / "my-project")
    for name, result, record in found:
        assert set(record) == set(MINIMAL) | FULL
        assert (record["tf_checksum"], record["result_checksum"], record["execution_mode"]) == (name, result, mode)
        assert record["remote_target"] == record["execution_envelope"]["actual_remote_target"] == ("jobserver" if mode == "remote" else None)
        assert record["output_total_bytes"] == store.length(Checksum(result)) and record["started_at"] <= record["finished_at"]
        for kind in ("node", "environment", "node_env"):
            assert plain_loads(store.get(Checksum(record[kind])))["bucket_kind"] == kind
        assert record["freshness"]["required_bucket_checksums"] == {kind: record[kind] for kind in ("node", "environment", "node_env")}
    sizes = sorted(record["input_total_bytes"] for _, _, record in found)
    assert sizes[:2] == [0, 2] and sizes[2] > 7         # "four", and the module of globals
    assert {record["environment"] for _, _, record in found} == {found[0][2]["environment"]} or mode != "process"
    by_words = {record["execution_envelope"]["language_kind"]: record["execution_envelope"] for _, _, record in found}
    assert by_words["bash"]["active_tf_dunder_keys"] == ["META__WORD"] and by_words["python"]["active_tf_dunder_keys"] == []


def test_the_environment_lists_python_and_its_packages():
    names, labels, contents, tokens = buckets._probe()
    node, environment, node_env = map(plain_loads, contents)
    assert environment["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert {"name": "pytest", "version": pytest.__version__} in environment["python_packages"]
    assert node["hostname"] == os.uname().nodename and node["cpu"]["affinity_cores"] <= node["cpu"]["logical_cores"]
    assert (node_env["node_checksum"], node_env["environment_checksum"]) == (names["node"], names["environment"])
    code = "from seamless_lite import buckets; print(buckets._probe()[0]['node'])"
    again = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert again.stdout.decode().strip() == names["node"]       # the same machine is the same buffer


def test_a_record_is_full_only_if_the_process_that_ran_it_told_more():
    runtime = {"wall_time_seconds": 1.5}
    assert record_of("t", "r", runtime, "spawn", None) == minimal_record("t", "r", runtime, "spawn", None)
    assert record_of("t", "r", {**runtime, "record": "nonsense"}, "spawn", None) == minimal_record("t", "r", runtime, "spawn", None)
    full = record_of("t", "r", {**runtime, "record": {"pid": 3}}, "remote", "jobserver")
    assert full["pid"] == 3 and full["wall_time_seconds"] == 1.5 and full["queue"] is None


def test_a_machine_without_proc_has_a_record_too(monkeypatch):
    monkeypatch.setattr(buckets, "_text", lambda path: "")
    node = buckets._node()
    assert node["memory_total_bytes"] is None and node["cpu"]["model_name"] is None and node["distribution"] == {}
    assert time.strptime(buckets._iso(0), "%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize("trouble", ["variable", "disk"])
def test_a_record_that_cannot_be_made_costs_no_result(tmp_path, monkeypatch, caplog, trouble):
    from seamless_lite import worker
    from seamless_lite.errors import SeamlessError
    from seamless_lite.stores import Stores
    from seamless_lite.transformation import Job, Meta, Recipe

    class Full(Folder):
        def put_many(self, datas):
            datas = list(datas)
            if any(b"bucket_kind" in data for data in datas):
                raise SeamlessError("the disk is full")
            return super().put_many(datas)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/f\udcffoo")
    buckets._probe.cache_clear()
    stores = Stores((Full if trouble == "disk" else Folder)(tmp_path / "buffers"), ResultTable(tmp_path / "seamless.db"))
    recipe = Recipe("bash", {"code": ("text", None, stores.buffers.put(b"echo hi > RESULT"))}, ("result", "bytes", None))
    try:
        outcome = worker.run_job(Job(recipe, Meta(record=True)), stores)
    finally:
        buckets._probe.cache_clear()
    assert outcome.result == stores.results.get(recipe.checksum) is not None, outcome
    assert ("minimal" in caplog.text) == (trouble == "disk") == ("record" not in outcome.runtime or outcome.runtime["record"] is None)
