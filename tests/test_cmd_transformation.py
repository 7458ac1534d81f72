"""``seamless-run-transformation`` and ``seamless-cancel`` as a user meets them."""
import contextlib
import json
import os
import re
import subprocess
import sys
import time

import pytest

from seamless_lite import cmd_run, cmd_transformation, config, direct
from seamless_lite.celltypes import plain_dumps
from seamless_lite.checksum import Checksum
from seamless_lite.httpbase import Listen, Service, start
from seamless_lite.session import Session
from seamless_lite.settings import load_settings

from test_cmd_resolve import shell             # noqa: F401 (fixture)
from test_end_to_end import REMOTE, lab        # noqa: F401 (fixture)

A, B = Checksum.of(b"some job"), Checksum.of(b"another job")
run, cancel = cmd_transformation.run_transformation, cmd_transformation.cancel


def upload(shell, *words):                     # noqa: F811
    """Have ``seamless-run`` upload a command without running it; returns the folder of the job."""
    shell(cmd_run.main, "--dry", "--upload", "-j", "job", *words)
    return shell.folder / "job"


def test_an_uploaded_transformation_runs_once_and_its_result_is_printed(shell):    # noqa: F811
    job = upload(shell, "-c", "tr a-z A-Z < a.txt; echo ran | tee -a %s/runs >/dev/null" % shell.folder)
    transformation = Checksum((job / "transformation.json.CHECKSUM").read_text())
    result = Checksum.of(b"ALPHA\n")
    assert shell(run, "job/transformation.json.CHECKSUM") == (result.encode() + b"\n", "")
    assert shell.store.get(result) == b"ALPHA\n" and shell.results.get(transformation) == result
    out, err = shell(run, transformation, "--output", "out", "-v")
    assert out == b"" and (shell.folder / "out").read_text() == result + "\n" and "cached" in err
    assert (shell.folder / "runs").read_text() == "ran\n"


def test_a_scratch_result_is_not_kept_until_it_is_wanted(shell):                   # noqa: F811
    job = upload(shell, "-c", "tr a-z A-Z < a.txt")
    result = Checksum.of(b"ALPHA\n")
    for _ in range(2):
        assert shell(run, "--scratch", job / "transformation.json.CHECKSUM")[0] == result.encode() + b"\n"
        assert not shell.store.has([result])[0]
    shell(run, job / "transformation.json.CHECKSUM")
    assert shell.store.has([result])[0]


def test_variables_come_from_the_dunder_file(shell, caplog):                       # noqa: F811
    job = upload(shell, "--metavar", "WORD=first", "-c", "echo $WORD")
    assert (job / "dunder.json").exists()
    pin = ["str", None, shell.store.put(plain_dumps("second"))]
    (shell.folder / "other.json").write_text(json.dumps({"META__WORD": pin, "__meta__": {"local": False}}))
    first = shell(run, "--scratch", "job/transformation.json.CHECKSUM")[0]
    assert first == Checksum.of(b"first\n").encode() + b"\n"
    (shell.folder / "bare.CHECKSUM").write_bytes((job / "transformation.json.CHECKSUM").read_bytes())
    shell(run, "bare.CHECKSUM", "--dunder", "other.json")
    assert "irreproducible" in caplog.text              # variables are no part of the identity
    assert shell(run, "--scratch", "bare.CHECKSUM", "--dunder", "other.json")[0] == Checksum.of(b"second\n").encode() + b"\n"


def test_an_irreproducible_transformation_runs_each_time(shell, caplog):           # noqa: F811
    (shell.folder / "now").write_text("one")
    job = upload(shell, "-c", "sh -c 'cat %s/now; echo ran >> %s/runs'" % (shell.folder, shell.folder))
    name = "job/transformation.json.CHECKSUM"
    shell(run, "--scratch", name)
    (shell.folder / "now").write_text("two")
    out, _ = shell(run, name)
    transformation, one, two = Checksum((job / "transformation.json.CHECKSUM").read_text()), Checksum.of(b"one"), Checksum.of(b"two")
    assert out == two.encode() + b"\n" and "transformation %s is irreproducible: its result was %s, and is %s now" % (
        transformation, one, two) in caplog.text
    assert shell(run, name)[0] == out and (shell.folder / "runs").read_text() == 3 * "ran\n"
    assert shell.results.irreproducible(transformation) == [one, two]


def test_what_a_transformation_calls_is_recorded_too_and_the_default_session_is_as_before(shell):      # noqa: F811
    @direct
    def inner(a):
        return a * 2

    @direct
    def outer(n):
        return inner(n) + 1
    outer.globals.inner = inner
    with contextlib.closing(Session(load_settings(str(shell.folder), environ=os.environ))) as session, config.using(session):
        assert outer(4) == 9
    rows = 'SELECT "checksum", "result" FROM "transformation"'
    found, before = dict(shell.results.query(rows)), config.session()
    assert len(found) == 2 and all(map(shell.results.forget, found))
    [name] = [name for name in found if b"inner(n)" in shell.store.get(json.loads(shell.store.get(name))["code"][2])]
    shell(run, name)
    assert dict(shell.results.query(rows)) == found and config.session() is before


def test_a_failure_is_shown_with_what_the_job_printed(shell):                      # noqa: F811
    name = upload(shell, "-c", "sh -c 'echo words >&2; exit 3'") / "transformation.json.CHECKSUM"
    for words in ((), ("--direct-print",)):
        out, err = shell(run, name, *words, code=1)
        assert out == b"" and "words" in err and "exit" in err


def test_mistakes_are_one_sentence(shell):                                         # noqa: F811
    code, text = shell.store.put(b"print(1)"), shell.store.put(b'{"a": 1}\n')
    for name, words, number in ((code, "is not a transformation", 1), (text, "is not a transformation", 1),
                                (Checksum.of(b"nowhere"), "in none of the stores", 1), ("missing", "neither a checksum", 2)):
        for main, expected in ((run, number),) if number == 1 else ((run, number), (cancel, 1)):     # 2 of cancel: not running
            out, err = shell(main, name, code=expected)
            assert out == b"" and words in err and len(err.splitlines()) == 1
    upload(shell, "-c", "echo 1")
    name = "job/transformation.json.CHECKSUM"
    (shell.folder / "bad.json").write_text("[1]")
    assert "no JSON object" in shell(run, name, "--dunder", "bad.json", code=2)[1]
    assert "cannot be read" in shell(run, name, "--dunder", "none.json", code=2)[1]
    for dunders in ({"__meta__": 5}, {"__env__": 5}, {"META__X": 3}):
        (shell.folder / "bad.json").write_text(json.dumps(dunders))
        err = shell(run, name, "--dunder", "bad.json", code=2)[1]
        assert "cannot be understood: %s is not" % next(iter(dunders)) in err and len(err.splitlines()) == 1
    (shell.folder / "bad.json").write_text('{"META__X": ["str", null, "%s"]}' % Checksum.of(b"nowhere"))
    assert "a value in the dunder file is not stored" in shell(run, name, "--dunder", "bad.json", code=1)[1]


@pytest.mark.parametrize("key, value", [("__output__", ["result"]), ("__output__", 5), ("__output__", ["result", []]), ("__format__", 5),
                                        ("__format__", {"x": 5}), ("__format__", {"x": {"filesystem": 5}}), ("__as__", {"x": []}),
                                        ("x", [["mixed"], None, A])])
def test_a_transformation_of_a_wrong_shape_is_one_sentence(shell, key, value):     # noqa: F811
    name = shell.store.put(plain_dumps({"__language__": "bash", "__output__": ["result", "bytes", None], key: value}))
    out, err = shell(run, name, code=1)
    assert out == b"" and re.search("is not a transformation: .*%s.* (is|does) not " % key, err) and len(err.splitlines()) == 1


def test_nothing_can_be_cancelled_where_no_server_is_asked(shell):                 # noqa: F811
    assert shell(cancel, Checksum.of(b"some job"), code=2) == (b"process: not-running\n", "")


def test_the_jobserver_of_the_environment_is_asked(shell, monkeypatch):             # noqa: F811
    class Cancelling(Service):
        name = "jobserver"
        routes = [("POST", re.compile("/cancel-transformation/(.*)"), lambda request, checksum: {
            "canceled": checksum == A, "status": "canceled" if checksum == A else "done"})]
    server = start(Cancelling(), Listen(None, "127.0.0.1", 0))
    try:
        monkeypatch.delenv("SEAMLESS_CACHE")
        monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({
            "buffer": [{"remote_directory": str(shell.store.directory)}], "jobserver": [{"remote_url": server.address, "readonly": False}]}))
        assert shell(cancel, A) == (b"jobserver: canceled\n", "")
        assert shell(cancel, B, code=2) == (b"jobserver: done\n", "")
    finally:
        server.stop()


# --- with a jobserver ---------------------------------------------------------------------------------

def family(lab, command, *words):              # noqa: F811
    return subprocess.Popen([sys.executable, "-m", "seamless_lite", command, *map(str, words)], cwd=lab.work, env=lab.env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answer(process):
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
def test_a_job_of_a_jobserver_is_run_refused_and_cancelled(lab):            # noqa: F811
    lab.configure(REMOTE)
    transformation = lab.run("--dry", "--upload", "-j", "job", "--metavar", "V=1", "-c",
                             "sh -c 'echo $V began > %s/began; sleep 100'" % lab.work).decode().strip()
    assert answer(family(lab, "cancel", transformation)) == (2, "jobserver: not-running\n", "")
    assert lab.records() == []                  # none was started
    first = family(lab, "run-transformation", "job/transformation.json.CHECKSUM", "--direct-print")
    deadline = time.monotonic() + 30
    while not (lab.work / "began").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    code, _, err = answer(family(lab, "run-transformation", transformation, "--strict"))
    assert code == 1 and "--strict" in err
    assert answer(family(lab, "cancel", "job/transformation.json.CHECKSUM")) == (0, "jobserver: canceled\n", "")
    assert answer(first)[:2] == (130, "")
    assert answer(family(lab, "cancel", transformation)) == (2, "jobserver: not-running\n", "")


def test_a_chain_of_scratch_results_is_made_again_on_the_jobserver(lab):           # noqa: F811
    lab.configure(REMOTE)
    code = """
        import os
        import seamless_lite.config as config
        from seamless_lite import delayed
        config.init()
        @delayed
        def word(n, log):
            open(log, "a").write("w")
            return "x" * n
        @delayed
        def twice(text, log):
            open(log, "a").write("t")
            return text + text
        word.scratch = twice.scratch = True
        tf = twice(word(%d, os.path.abspath("log")), os.path.abspath("log"))
        print(tf.compute())
        """
    for size in (10, 300_000):
        twice = lab.python(code % size)
        (lab.work / "result.txt.CHECKSUM").write_text(twice)
        for path in (lab.home / "buffers").rglob("??/*"):
            if path.is_file() and path.read_bytes().startswith(b'"xx'):
                path.unlink()                   # as the input of a job it was stored
        assert (lab.work / "log").read_text() == "wt"
        assert lab.run("-c", "wc -c result.txt").split()[0] == b"%d" % (2 * size + 3)
        assert (lab.work / "log").read_text() == "wtwt"
        (lab.work / "log").unlink()
