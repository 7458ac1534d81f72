"""The same requests to their servers and to ours: the answers agree, but for what is listed as different on purpose."""
import concurrent.futures
import gzip
import hashlib
import json
import time

import pytest
from wire import Ledger, Servers, clients

pytestmark = pytest.mark.interop
HELLO, OTHER, EMPTY = b"Hello world!\n", b"something else", b""
TF, RESULT, RECORD_TF = "1" * 64, "2" * 64, "4" * 64


def name(data):
    return hashlib.sha256(data).hexdigest()


def record(transformation=TF, result=RESULT, **more):
    return {"schema_version": 1, "tf_checksum": transformation, "result_checksum": result, **more}


@pytest.fixture(scope="module")
def both(real, tmp_path_factory):
    """{"theirs": (hashserver, database), "ours": ...}, all of them writable and empty."""
    with Servers(real, tmp_path_factory.mktemp("wire") / "servers") as servers:
        yield {who: servers.stores(who)[:2] for who in ("theirs", "ours")}


def ask_both(both, index, *request, **headers):
    """What either answers: (status, JSON or bytes) each."""
    found = []
    for who in ("theirs", "ours"):
        status, body, _ = both[who][index].ask(*request, **headers)
        try:
            body = json.loads(body)
        except ValueError:
            pass
        if isinstance(body, dict) and isinstance(body.get("exception"), dict):
            body["exception"].pop("url", None)
            body["exception"].pop("ctx", None)
        found.append((status, body))
    return found


HASHSERVER = [
    ("GET", "/healthcheck"),
    ("GET", "/" + name(HELLO)),
    ("GET", "/has", [name(HELLO)]),
    ("PUT", "/promise/" + name(HELLO)),
    ("GET", "/has", [name(HELLO), name(OTHER)]),
    ("GET", "/has-now", [name(HELLO)]),
    ("GET", "/buffer-length", [name(HELLO), name(OTHER)]),
    ("PUT", "/" + name(HELLO), OTHER),
    ("PUT", "/" + name(HELLO), HELLO),
    ("PUT", "/" + name(HELLO), OTHER),
    ("GET", "/" + name(HELLO)),
    ("GET", "/" + name(HELLO).upper()),
    ("PUT", "/" + name(EMPTY), EMPTY),
    ("GET", "/" + name(EMPTY)),
    ("GET", "/has", [name(HELLO), name(OTHER), name(EMPTY)]),
    ("GET", "/has-now", [name(HELLO), name(OTHER), name(EMPTY)]),
    ("GET", "/buffer-length", [name(HELLO), name(OTHER), name(EMPTY)]),
    ("GET", "/has", []),
    ("GET", "/" + name(HELLO)[:10]),
    ("GET", "/x" + name(HELLO)[1:]),
    ("PUT", "/" + name(HELLO)[:10], HELLO),
    ("PUT", "/promise/" + name(HELLO)[:10]),
    ("GET", "/has", [name(HELLO), name(HELLO)[:10]]),
    ("GET", "/has", [name(HELLO), "x" + name(HELLO)[1:]]),
    ("GET", "/"),
    ("POST", "/" + name(HELLO), HELLO),
    ("DELETE", "/" + name(HELLO)),
]


@pytest.mark.parametrize("number", range(len(HASHSERVER)), ids=lambda n: "%d %s %.20s" % (n, *HASHSERVER[n][:2]))
def test_hashservers_answer_the_same(both, number):
    theirs, ours = ask_both(both, 0, *HASHSERVER[number])
    assert ours == theirs


def test_hashservers_agree_on_invalid_bodies(both):
    for body in ({"a": 1}, 5, b"no JSON"):
        theirs, ours = ask_both(both, 0, "GET", "/has", body)
        assert ours[0] == theirs[0] == 400, (body, theirs, ours)
    for body in ([5], [None]):              # theirs has an internal error here
        assert ask_both(both, 0, "GET", "/has", body)[1][0] == 400


def test_hashservers_agree_on_compressed_buffers(both):
    for coding, data in (("gzip", gzip.compress(HELLO)), ("gzip", b"no gzip"), ("gzip", gzip.compress(OTHER)), ("gzip", b"")):
        theirs, ours = ask_both(both, 0, "PUT", "/" + name(OTHER), data, Content_Encoding=coding)
        assert ours == theirs or ours[0] == theirs[0] == 400, (coding, data)
    theirs, ours = ask_both(both, 0, "PUT", "/" + name(b"br"), b"br", Content_Encoding="br")
    assert ours == theirs == (200, b"OK")
    assert ask_both(both, 0, "GET", "/buffer-length", [name(OTHER)]) == [(200, [len(OTHER)])] * 2
    for accepted in ("gzip", "identity", "gzip;q=0.1, identity;q=0.5"):
        theirs, ours = [both[who][0].ask("GET", "/" + name(OTHER), Accept_Encoding=accepted) for who in ("theirs", "ours")]
        for status, body, headers in (theirs, ours):
            assert status == 200
            assert (gzip.decompress(body) if headers.get("Content-Encoding", headers.get("content-encoding")) else body) == OTHER


def test_hashservers_agree_on_ranges(both):
    for wanted, part in (("bytes=2-5", HELLO[2:6]), ("bytes=-4", HELLO[-4:]), ("bytes=6-", HELLO[6:])):
        theirs, ours = ask_both(both, 0, "GET", "/" + name(HELLO), Range=wanted)
        assert ours == theirs == (206, part), wanted


DATABASE = [
    ("GET", "/healthcheck"),
    ("GET", "/", {"type": "protocol"}),
    ("GET", "/", {"type": "transformation", "checksum": TF}),
    ("PUT", "/", {"type": "transformation", "checksum": TF, "value": RESULT}),
    ("GET", "/", {"type": "transformation", "checksum": TF}),
    ("GET", "/any/path", {"type": "transformation", "checksum": TF}),
    ("GET", "/", {"type": "rev_transformations", "checksum": RESULT}),
    ("GET", "/", {"type": "rev_transformations", "checksum": TF}),
    ("GET", "/", {"type": "metadata", "checksum": TF}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": record(extra=1)}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": record(extra=1)}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": record(extra=2)}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": "3" * 64, "value": record(result="3" * 64)}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": {"schema_version": 1}}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": "no JSON"}),
    ("GET", "/", {"type": "metadata", "checksum": TF}),
    ("PUT", "/", {"type": "metadata", "checksum": RECORD_TF, "result": RESULT, "value": json.dumps(record(RECORD_TF))}),
    ("GET", "/", {"type": "transformation", "checksum": RECORD_TF}),
    ("GET", "/", {"type": "irreproducible", "checksum": TF}),
    ("PUT", "/", {"type": "irreproducible", "checksum": TF, "result": "3" * 64}),
    ("PUT", "/", {"type": "irreproducible", "checksum": TF, "result": RESULT}),
    ("GET", "/", {"type": "irreproducible", "checksum": TF}),
    ("GET", "/", {"type": "irreproducible", "checksum": TF, "result": RESULT}),
    ("GET", "/", {"type": "transformation", "checksum": TF}),
    ("PUT", "/", {"type": "metadata", "checksum": TF, "result": RESULT, "value": record()}),
    ("PUT", "/", {"type": "irreproducible", "checksum": "5" * 64, "result": RESULT}),
    ("GET", "/", {"type": "irreproducible", "checksum": "5" * 64}),
    ("GET", "/", {"type": "bucket_probe", "bucket_kind": "node", "label": "here"}),
    ("PUT", "/", {"type": "bucket_probe", "bucket_kind": "node", "label": "here", "bucket_checksum": RESULT,
                  "freshness_tokens": {"a": 1}, "captured_at": "2026-01-01T00:00:00Z"}),
    ("GET", "/", {"type": "bucket_probe", "bucket_kind": "node", "label": "here"}),
    ("PUT", "/", {"type": "bucket_probe", "bucket_kind": "bucket", "label": "here", "bucket_checksum": RESULT,
                  "freshness_tokens": {"a": 1}, "captured_at": "2026-01-01T00:00:00Z"}),
    ("GET", "/", {"type": "buffer_info", "checksum": TF}),
    ("PUT", "/", {"type": "buffer_info", "checksum": TF, "value": {"length": 3}}),
    ("GET", "/", {"type": "buffer_info", "checksum": TF}),
    ("PUT", "/", {"type": "semantic_to_syntactic", "checksum": TF, "celltype": "python", "subcelltype": "transformer",
                  "value": [RESULT]}),
    ("GET", "/", {"type": "semantic_to_syntactic", "checksum": TF, "celltype": "python", "subcelltype": "transformer"}),
    ("GET", "/", {"type": "syntactic_to_semantic", "checksum": RESULT, "celltype": "python", "subcelltype": "transformer"}),
    ("PUT", "/", {"type": "expression", "checksum": TF, "celltype": "mixed", "path": "[]", "target_celltype": "mixed",
                  "value": RESULT}),
    ("GET", "/", {"type": "expression", "checksum": TF, "celltype": "mixed", "path": "[]", "target_celltype": "mixed"}),
    ("GET", "/", {"type": "rev_expression", "checksum": RESULT}),
    ("GET", "/", {"type": "nonsense", "checksum": TF}),
    ("PUT", "/", {"type": "nonsense", "checksum": TF}),
    ("GET", "/", {"type": "transformation"}),
    ("GET", "/", {"checksum": TF}),
    ("GET", "/", [1]),
    ("GET", "/", b"no JSON"),
    ("POST", "/", {"type": "transformation", "checksum": TF}),
]
#: What their database answers with an internal error, or with a text for people: only that it is an error must agree.
ERRORS_OF_THEIRS = (400, 500)


@pytest.mark.parametrize("number", range(len(DATABASE)),
                         ids=lambda n: "%d %s %.40s" % (n, DATABASE[n][0], DATABASE[n][2:]))
def test_databases_answer_the_same(both, number):
    theirs, ours = ask_both(both, 1, *DATABASE[number])
    if theirs[0] in ERRORS_OF_THEIRS:
        assert ours[0] == 400
    else:
        assert ours == theirs or ours[0] == theirs[0] == 405


# ---- waiting

@pytest.mark.parametrize("who", ("theirs", "ours"))
def test_whoever_asks_for_a_promised_buffer_gets_it_when_it_comes(both, who):
    hashserver, data = both[who][0], b"promised to be here soon"
    assert hashserver.ask("PUT", "/promise/" + name(data))[0] == 202
    with concurrent.futures.ThreadPoolExecutor() as threads:
        asked = threads.submit(hashserver.ask, "GET", "/" + name(data))
        time.sleep(0.5)
        assert not asked.done()
        assert hashserver.ask("GET", "/buffer-length", [name(data)])[1] == b"[true]"
        assert hashserver.ask("PUT", "/" + name(data), data)[:2] == (200, b"OK")
        assert asked.result(30)[:2] == (200, data)


# ---- the jobserver

def job(hashserver, code, **inputs):
    """The body of a request for a bash transformation whose buffers are stored."""
    def put(data):
        assert hashserver.ask("PUT", "/" + name(data), data)[0] in (200, 201)
        return name(data)
    pins = {"code": ["text", None, put(code.encode())], **{key: ["text", None, put(value)] for key, value in inputs.items()}}
    transformation = {"__language__": "bash", "__output__": ["result", "bytes", None], **pins}
    buffer = (json.dumps(transformation, sort_keys=True, indent=2) + "\n").encode()
    return {"transformation_dict": {**transformation, "__meta__": {}}, "tf_checksum": put(buffer), "tf_dunder": {}, "scratch": False,
            "strict_dunder": False, "record": False}


@pytest.fixture(scope="module")
def jobservers(real, both, tmp_path_factory):
    """{"theirs": (jobserver, hashserver), "ours": ...}"""
    with Servers(real, tmp_path_factory.mktemp("jobs") / "servers") as servers:
        yield {who: (servers.start(who, "jobserver", "--workers", "1", parameters=json.loads(clients(*both[who]))), both[who][0])
               for who in ("theirs", "ours")}


JOBSERVER = [
    ("GET", "/healthcheck"),
    ("GET", "/"),
    ("GET", "/transformation-status/" + TF),
    ("POST", "/cancel-transformation/" + TF),
    ("GET", "/transformation-status/nothing"),
    ("POST", "/cancel-transformation/nothing"),
    ("GET", "/run-transformation", b"no JSON"),
    ("GET", "/run-transformation", {"tf_checksum": TF}),
    ("GET", "/run-transformation", {"transformation_dict": {}, "tf_checksum": "nothing"}),
]


@pytest.mark.parametrize("number", range(len(JOBSERVER)), ids=lambda n: "%d %s %.30s" % (n, *JOBSERVER[n][:2]))
def test_jobservers_answer_the_same(jobservers, number):
    theirs, ours = ask_both(jobservers, 0, *JOBSERVER[number])
    assert ours == theirs or ours[0] == theirs[0] == 400


def test_jobservers_answer_a_job_the_same(jobservers):
    found = {}
    for who, (jobserver, hashserver) in jobservers.items():
        body = job(hashserver, "cat a b > RESULT", a=b"one\n", b=b"two\n")
        status, answer, headers = jobserver.ask("GET", "/run-transformation", body)
        answer = json.loads(answer)
        found[who] = (status, answer["result_checksum"], set(answer), set(answer["record_runtime"]), headers["Content-Type"])
        assert hashserver.ask("GET", "/" + answer["result_checksum"])[:2] == (200, b"one\ntwo\n")
        assert jobserver.ask("GET", "/run-transformation", {**body, "record": True})[0] == 409
    assert found["ours"] == found["theirs"]


def test_a_job_that_fails_is_run_once_by_ours_though_it_is_asked_for_five_times(jobservers, tmp_path):
    """As their client does.  Theirs runs it five times."""
    runs = {}
    for who, (jobserver, hashserver) in jobservers.items():
        ledger = Ledger(tmp_path / who)
        body = job(hashserver, "printf x >> %s; echo trouble >&2; exit 3" % ledger)
        answers = [jobserver.ask("GET", "/run-transformation", body)[:2] for _ in range(5)]
        assert {status for status, _ in answers} == {500} and all(b"trouble" in text for _, text in answers)
        runs[who] = ledger.ran()
    assert runs == {"theirs": 5, "ours": 1}


def test_a_job_that_runs_is_cancelled(jobservers, tmp_path):
    """Theirs lets it run to its end; ours kills it.  The one that waits gets the same words."""
    for who, (jobserver, hashserver) in jobservers.items():
        ledger, late = Ledger(tmp_path / who), tmp_path / (who + "-late")
        body = job(hashserver, "printf x >> %s; sleep 3; touch %s; echo x > RESULT" % (ledger, late))
        with concurrent.futures.ThreadPoolExecutor() as threads:
            asked = threads.submit(jobserver.ask, "GET", "/run-transformation", body)
            ledger.await_one()
            assert json.loads(jobserver.ask("GET", "/transformation-status/" + body["tf_checksum"])[1]) == {"status": "running"}
            status, answer, _ = jobserver.ask("POST", "/cancel-transformation/" + body["tf_checksum"])
            assert (status, json.loads(answer)) == (200, {"canceled": True, "status": "canceled"})
            status, answer, _ = jobserver.ask("POST", "/cancel-transformation/" + body["tf_checksum"])
            assert (status, json.loads(answer)["canceled"]) == (200, False)
            assert asked.result(60)[:2] == (200, b"Transformation was canceled")
            assert late.exists() == (who == "theirs")
