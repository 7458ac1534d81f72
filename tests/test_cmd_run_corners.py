"""``seamless-run`` where it meets the shell: words it cannot see, closed or full outputs, signals, earlier results."""
import io
import os
import shutil
import signal
import subprocess
import sys

import pytest

from labs import servers
from seamless_lite import cmd_download, cmd_upload
from seamless_lite.errors import SeamlessError

from test_cmd_run import count_runs, ledger, prepared, run, runs, wait_for      # noqa: F401 (fixtures)


# --- words ------------------------------------------------------------------------------------------------

def test_a_file_that_the_job_will_not_see_is_always_told(run):
    command = "cat a.txt; cat b.txt | wc -l"
    for _ in range(2):                      # the second time from the cache
        out, err = run("-c", command)
        line = err.splitlines()[0]
        assert out == b"alpha\nbeta\n0\n" and line.startswith("seamless-run: 'b.txt' is here, but not where the command")
        assert line.endswith("add -i b.txt")
    assert "-i b.txt" not in run("-q", "-c", command)[1]
    assert run("-i", "b.txt", "-c", command) == (b"alpha\nbeta\n1\n", "")
    assert "add -i a.txt -i b.txt" in run("-c", "diff <(sort a.txt) <(sort b.txt)")[1]


def test_an_empty_word_and_a_dot(run):
    assert run("-c", "printf '[%s]' '' a.txt")[0] == b"[]a.txt".replace(b"a.txt", b"[a.txt]")
    assert b"a.txt\nb.txt\n" in run("-c", "ls .")[0]
    assert run("-i", ".", "-c", "cat b.txt")[0] == b"gamma\n"
    (run.cwd / "d").mkdir()
    shutil.copy(run.cwd / "a.txt", run.cwd / "d")
    assert run("-c", "find d/. -type f")[0] == b"d/a.txt\n"


def test_the_folder_itself_may_be_an_input_of_a_command_with_a_result(run):
    out, err = run("-c", "ls . > o.txt")
    assert err == "" and "a.txt\nb.txt" in (run.cwd / "o.txt").read_text()


def test_a_dot_that_means_a_large_folder_is_told(run):
    assert run("-c", "grep -c . a.txt") == (b"2\n", "")
    for number in range(120):
        (run.cwd / ("f%d" % number)).write_text(str(number))
    out, err = run("-c", "grep -c . a.txt")
    assert out == b"2\n" and "makes this whole folder an input (122 files, 0 MB)" in err and err.count("\n") == 1
    assert run("-c", "grep -c -e. a.txt") == (b"2\n", "")


def test_links_to_directories_that_are_left_out_are_told(run):
    (run.cwd / "d").mkdir()
    (run.cwd / "d" / "x").write_text("1")
    (run.cwd / "d" / "link").symlink_to(run.cwd)
    out, err = run("-c", "ls d")
    assert out == b"x\n" and "'d/link' is a link to a directory and is left out of the input 'd'" in err


def test_a_script_behind_a_wrapper_runs(run):
    (run.cwd / "s.sh").write_text("#!/bin/sh\ncat \"$@\"\n")
    (run.cwd / "s.sh").chmod(0o755)
    assert run("-c", "timeout 50 ./s.sh a.txt")[0] == b"alpha\nbeta\n"
    assert run("-c", "echo a.txt | cat - | env X=1 xargs -n 1 ./s.sh", "-g1", code=2)
    assert run("-i", "a.txt", "-c", "echo a.txt | env X=1 xargs -n 1 ./s.sh")[0] == b"alpha\nbeta\n"


def test_a_file_name_that_is_not_utf8_may_be_renamed(run):
    name = os.fsdecode(b"caf\xe9.txt")
    (run.cwd / name).write_text("weird\n")
    assert run("-mx", "cat", name)[0] == b"weird\n"
    assert r"'caf\xe9.txt' is not UTF-8" in run("cat", name, code=1)[1]


# --- results ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, name", [
    (("-cp", "res", "-i", "a.txt", "-c", "mkdir res; cp a.txt res/f; echo ran | tee -a {}/runs"), "res/f"),
    (("-i", "a.txt", "-c", "mkdir q; echo ran | tee -a {}/runs; cat a.txt > q/f.txt"), "q/f.txt"),
])
def test_a_result_that_is_here_does_not_make_another_command(run, ledger, argv, name):
    argv = [word.format(ledger) for word in argv]
    for _ in range(3):
        run(*argv)
        assert (run.cwd / name).read_text() == "alpha\nbeta\n" and runs(ledger) == 1
    shutil.rmtree(run.cwd / name.split("/")[0])
    run(*argv)
    assert (run.cwd / name).exists() and runs(ledger) == 1
    run("--undo", *argv)
    assert "File exists" in run(*argv, code=1)[1]       # as it does in bash


def test_a_capture_may_give_the_redirected_file_another_name(run):
    run("-cp", "o.txt:mine.txt", "-c", "sort a.txt > o.txt")
    assert (run.cwd / "mine.txt").exists() and not (run.cwd / "o.txt").exists()


def test_a_result_behind_dots(run):
    (run.cwd / "d").mkdir()
    run("-c", "sort a.txt > d/../o.txt")
    assert (run.cwd / "o.txt").read_text() == "alpha\nbeta\n"


def test_a_protected_file_is_not_replaced(run, ledger, monkeypatch):
    (run.cwd / "o.txt").write_text("precious\n")
    access = os.access                      # root may write everywhere, so ask for what others would hear
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (
        mode == os.W_OK and str(path).endswith("o.txt") and not os.stat(path).st_mode & 0o200))
    (run.cwd / "o.txt").chmod(0o444)
    command = ("-g1", "-c", "true; echo ran | tee -a %s/runs; sort a.txt > o.txt" % ledger)
    assert "write-protected" in run("-i", "a.txt", *command, code=1)[1] and runs(ledger) == 0
    (run.cwd / "o.txt").chmod(0o644)
    run("-i", "a.txt", *command)
    (run.cwd / "o.txt").chmod(0o444)
    run("-i", "a.txt", *command)            # it is the result already
    (run.cwd / "o.txt").chmod(0o644)
    (run.cwd / "o.txt").write_text("precious\n")
    (run.cwd / "o.txt").chmod(0o444)
    assert "write-protected" in run("-i", "a.txt", *command, code=1)[1]
    assert (run.cwd / "o.txt").read_text() == "precious\n"


# --- the surroundings -------------------------------------------------------------------------------------

def shell(run, text):
    """(exit code, stdout, stderr) of bash that knows the program as $run."""
    program = "'%s' '%s'" % (sys.executable, os.path.join(os.path.dirname(os.path.dirname(__file__)), "bin",
                                                          "seamless-run"))
    done = subprocess.run(["bash", "-c", "run() { %s \"$@\"; }; %s" % (program, text)], cwd=run.cwd,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_full_disk_is_one_sentence(run):
    sentence = "seamless-run: standard output cannot be written: No space left on device\n"
    for text in ("run -c 'seq 1000' > /dev/full", "run -c 'seq 100000' > /dev/full",
                 "run --dry -j job ls > /dev/full"):
        assert shell(run, text) == (1, "", sentence)


def test_a_closed_output_matters_only_if_something_is_printed(run):
    assert shell(run, "run true >&-") == (0, "", "")
    code, _, err = shell(run, "run echo x >&-")
    assert code == 1 and err.count("\n") == 1 and "no standard output" in err


def test_lines_of_a_callers_loop_are_never_taken_for_an_answer(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\nthe second line\n"))
    with pytest.raises(SeamlessError, match="refused; answer yes at a terminal, add -y"):
        prepared("ls").confirm("Download", 2, 6 * 10**8)
    assert sys.stdin.readline() == "y\n"


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_ends_the_job_and_what_has_left_its_session(run, ledger, number):
    process = run.start("-g1", "-c", "setsid sleep 300 & echo $! > {0}/p; mv {0}/p {0}/pid; sleep 300".format(ledger))
    wait_for((ledger / "pid").exists)
    pid = int((ledger / "pid").read_text())
    assert alive(pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in err
    wait_for(lambda: not alive(pid))


def test_a_command_that_interrupts_its_own_shell_is_no_success(run, ledger):
    for _ in range(2):
        assert run("-i", "a.txt", "-c", count_runs(ledger, "kill -INT $$; cat a.txt"), code=130)
    assert runs(ledger) == 2


def test_local_needs_no_cluster_whatever_the_file_says(run, tmp_path):
    (tmp_path / "seamless.yaml").write_text("- project: p\n- execution: remote\n")
    assert run("--local", "cat", "a.txt") == (b"alpha\nbeta\n", "")


# --- large results

def test_a_result_that_is_too_large_to_be_brought_is_named_and_can_be_brought_later(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SEAMLESS_MAX_DOWNLOAD_SIZE", "3")
    with servers(tmp_path / "far") as clients:
        monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", clients)
        out, err = run("-n", "-c", "cat a.txt > big.txt")
        assert "not downloaded: big.txt; seamless-download brings it" in err and not (run.cwd / "big.txt").exists()
        named = (run.cwd / "big.txt.CHECKSUM").read_text()
        (run.cwd / "big.txt.CHECKSUM").unlink()
        with monkeypatch.context() as wrong:
            wrong.setenv("SEAMLESS_MAX_DOWNLOAD_SIZE", "nonsense")
            assert "it takes a number and a unit" in run("-n", "-c", "cat a.txt > big.txt", code=2)[1]
        assert "refused; answer yes at a terminal" in run("-c", "cat a.txt > big.txt", code=1)[1]
        assert (run.cwd / "big.txt.CHECKSUM").read_text() == named
        assert cmd_download.main(["big.txt"]) == 1 and not (run.cwd / "big.txt").exists()
        assert cmd_download.main(["-y", "big.txt"]) == 0 and (run.cwd / "big.txt").read_text() == (run.cwd / "a.txt").read_text()


def test_no_is_an_answer_for_a_folder_on_this_machine_too(run, monkeypatch):
    monkeypatch.setenv("SEAMLESS_MAX_UPLOAD_FILES", "0")
    assert cmd_upload.main(["-n", "a.txt"]) == 1 and not (run.cwd / "a.txt.CHECKSUM").exists()
    assert cmd_upload.main(["a.txt"]) == 0
    monkeypatch.setenv("SEAMLESS_MAX_DOWNLOAD_FILES", "0")
    assert cmd_download.main(["-n", "-o", "new.txt", "a.txt"]) == 1 and not (run.cwd / "new.txt").exists()


def test_letters_in_one_word(run):
    assert run("-vi", "a.txt", "-c", "cat a.txt")[0] == run("-qia.txt", "-c", "cat a.txt")[0] == b"alpha\nbeta\n"
    assert run("-qc", "cat a.txt")[0] == b"alpha\nbeta\n"
