"""``seamless-run --dry --write-remote-job DIR``: the executing side writes the job instead of running it."""
import json
import os
import subprocess

import pytest

from seamless_lite.checksum import Checksum
from seamless_lite.errors import JobWritten
from seamless_lite.session import Session
from seamless_lite.transformation import Meta

from test_cmd_run import run                                                    # noqa: F401 (fixture)
from test_end_to_end import REMOTE, lab                                         # noqa: F401 (fixture)
from test_jobserver import client, make_job, make_server, old, request_of, spec  # noqa: F401 (fixtures)

SUBMITTED = b"Transformation submitted to remote server\n"


def by_hand(folder):
    """Run the job as a user would; what is in RESULT."""
    done = subprocess.run(["./transform.sh"], cwd=folder, capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return (folder / "RESULT").read_bytes() if (folder / "RESULT").is_file() else None


def shell_job(folder):
    return make_job("cat n > RESULT; echo $META__WORD >> RESULT", Meta(metavars={"WORD": "a b"}, job_folder=str(folder)),
                    ("result", "bytes", None), "bash", n=5)


def test_the_job_is_written_with_all_it_needs_and_can_be_run_by_hand(run):
    out, err = run("--dry", "--write-remote-job", "job", "--metavar", "N=3  'x'", "--var", "V=5", "-c", 'sort a.txt b.txt; echo "$N" $V')
    assert out == SUBMITTED and str(run.cwd / "job") in err
    folder = run.cwd / "job"
    assert sorted(os.listdir(folder)) == ["V", "a.txt", "b.txt", "transform.sh"]
    script = (folder / "transform.sh").read_text()
    assert script.startswith("#!/bin/bash\nexport META__N=") and "export V=5\n" in script
    assert by_hand(folder) == b"alpha\nbeta\ngamma\n3  'x' 5\n"


def test_nothing_runs_nothing_is_recorded_and_everything_is_uploaded(run):
    command = "touch %s/ran; cat a.txt > d/b.txt" % run.cwd
    run("--dry", "--write-remote-job", "job", "-i", "a.txt", "-c", command)
    assert not (run.cwd / "ran").exists() and not (run.cwd / "d").exists()
    transformation = Checksum(run("--dry", "--upload", "-i", "a.txt", "-c", command)[0].decode().strip())
    assert all(run.store.has([transformation, Checksum.of(b"alpha\nbeta\n")]))
    by_hand(run.cwd / "job")
    assert (run.cwd / "job/RESULT/d/b.txt").read_bytes() == b"alpha\nbeta\n"
    (run.cwd / "ran").unlink()
    run("-i", "a.txt", "-c", command)                   # and it can still be run
    assert (run.cwd / "ran").exists()


def test_a_known_result_is_an_error_and_writes_nothing(run):
    run("sort", "a.txt")
    out, err = run("--dry", "--write-remote-job", "job", "sort", "a.txt", code=1)
    assert out == b"" and "known" in err and "--undo" in err and not (run.cwd / "job").exists()


@pytest.mark.parametrize("folder, sentence", [("here", "exists already"), ("a.txt", "exists already"), ("a.txt/sub", "Not a directory"),
                                              ("/proc/nowhere/job", "No such file")])
def test_a_folder_that_cannot_be_new_is_one_sentence(run, folder, sentence):
    (run.cwd / "here").mkdir()
    before = sorted(os.listdir(run.cwd))
    assert sentence in run("--dry", "--write-remote-job", folder, "sort", "a.txt", code=1)[1]
    assert sorted(os.listdir(run.cwd)) == before


def test_a_missing_input_leaves_no_half_folder(run):
    (run.cwd / "x.CHECKSUM").write_text("1" * 64 + "\n")
    run("--dry", "--write-remote-job", "job", "cat", "x", code=1)
    assert not [name for name in os.listdir(run.cwd) if name.startswith("job")]


def test_the_home_folder_is_that_of_the_executing_side(run):
    run("--dry", "--write-remote-job", "~/jobs/one", "sort", "a.txt")
    assert by_hand(run.home / "jobs" / "one") == b"alpha\nbeta\n"


def test_it_needs_dry(run):
    assert "needs --dry" in run("--write-remote-job", "job", "sort", "a.txt", code=2)[1]


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
def test_one_program_has_a_job_written_and_the_same_run(tmp_path, options):
    session, job = Session(**options), shell_job(tmp_path / "job")
    try:
        for data in job.buffers.values():
            session.store.put(data)
        futures = [session.submit(job.recipe, meta) for meta in (job.meta, job.meta._replace(job_folder=""))]
        written, run = [future.result(20) for future in futures]
        assert isinstance(written.exception(), JobWritten) and run.buffer == b"5\na b\n" and not session._in_flight
    finally:
        session.close()


def test_a_jobserver_writes_the_job(client, spec, tmp_path):
    job = shell_job(tmp_path / "job")
    error = client.run(job).exception()
    assert isinstance(error, JobWritten) and error.folder == str(tmp_path / "job")
    assert by_hand(tmp_path / "job") == b"5\na b\n"
    assert client.run(job._replace(meta=job.meta._replace(job_folder=""))).buffer == b"5\na b\n"      # nothing was recorded


def test_seamless_1_is_told_in_its_own_words(old, tmp_path):
    job = shell_job(tmp_path / "job")
    body = request_of(job, store=job.buffers)
    body["tf_dunder"]["__meta__"] = body["transformation_dict"]["__meta__"] = {"write_remote_job": str(tmp_path / "job")}
    status, text = old("/run-transformation", body)
    assert (status, json.loads(text)) == (200, {"remote_job_written": "__SEAMLESS_REMOTE_JOB_WRITTEN__:%s" % (tmp_path / "job")})
    assert (tmp_path / "job" / "transform.sh").exists()


@pytest.mark.slow
def test_a_command_of_the_user_reaches_the_jobserver(lab):
    lab.configure(REMOTE)
    (lab.work / "a.txt").write_text("b\na\n")
    assert lab.run("--dry", "--write-remote-job", "job", "sort", "a.txt") == SUBMITTED
    assert by_hand(lab.work / "job") == b"a\nb\n"
    assert lab.run("sort", "a.txt") == b"a\nb\n"


@pytest.mark.slow
def test_a_daskserver_writes_the_job(tmp_path):
    test_dask = pytest.importorskip("test_dask")
    server = test_dask.Server(tmp_path)
    try:
        error = server.client.run(shell_job(tmp_path / "job")).exception()
        assert isinstance(error, JobWritten) and by_hand(tmp_path / "job") == b"5\na b\n"
    finally:
        server.stop()
