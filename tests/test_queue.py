"""``seamless-run --qsubmit``, ``seamless-queue`` and ``seamless-queue-finish``: real processes, real files."""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from labs import servers
from seamless_lite import cmd_gc, cmd_queue, cmd_run, hostside, queuefile
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError
from seamless_lite.folder import Folder
from seamless_lite.queuefile import QueueFile

from test_end_to_end import REMOTE, lab as services                             # noqa: F401 (fixture)

BIN = pathlib.Path(__file__).resolve().parent.parent / "bin"


class Lab:
    """A folder with a queue file, in which commands are submitted in this process and queues are processes."""

    def __init__(self, cwd, captured):
        self.cwd, self.captured, self.started = cwd, captured, []

    def submit(self, *argv, code=0):
        self.captured.readouterr()
        found = cmd_run.main(["--qsubmit", *argv])
        err = self.captured.readouterr().err
        assert found == code and "Traceback" not in err, err
        return err

    def start(self, *argv, command="seamless-queue"):
        self.started.append(subprocess.Popen([sys.executable, str(BIN / command), *argv], cwd=self.cwd, stdin=subprocess.DEVNULL,
                                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.started[-1]

    def run(self, code=0):
        """Run all that is queued; what the queue said."""
        process = self.start()
        assert cmd_queue.queue_finish([]) == (1 if code else 0), process.communicate(timeout=30)
        out = process.communicate(timeout=30)[0]
        assert process.returncode == code, out
        assert [path.name for path in self.cwd.glob(".seamless-queue*") if path.suffix != ".LEFT-OUT"] == []
        return out

    def read(self, name):
        return (self.cwd / name).read_text()

    def file(self):
        file = QueueFile({}, str(self.cwd))
        file.update()
        return file


@pytest.fixture
def lab(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("b\na\nb\n")
    monkeypatch.setenv("SEAMLESS_CACHE", str(tmp_path / "cache"))
    lab = Lab(tmp_path, capfd)
    yield lab
    for process in lab.started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# --- the file -----------------------------------------------------------------------------------------------

def test_an_entry_is_what_seamless_1_writes(lab, monkeypatch):
    lab.submit("--metavar", "N=3", "-cp", "q:b", "-cp", ":out.txt", "-y", "-c", "cp a.txt q; sort a.txt > x.txt")
    data = (lab.cwd / ".seamless-queue").read_bytes()
    assert data.endswith(b"}\0") and data.startswith(b'{\n  "queue_command": "SUBMIT",\n  "original_command": "seamless-run --qsubmit ')
    entry = json.loads(data[:-1])
    assert entry["result_targets"] == {"q": "b", "STDOUT": "out.txt", "x.txt": None}
    assert entry["params"] == {"undo": False, "scratch": False, "workdir": str(lab.cwd), "download": True, "auto_confirm": "yes",
                               "capture_stdout": True, "max_download_size": 500_000_000, "max_download_files": 2000}
    store = Folder(lab.cwd / "cache" / "__TOPLEVEL__")
    pins = {name: pin[2] for name, pin in entry["transformation_dict"].items() if isinstance(pin, list) and name != "__output__"}
    assert set(pins) == {"a.txt", "code", "META__N"} and all(store.has([*pins.values(), entry["transformation_checksum"]]))
    assert not list(lab.cwd.glob("*.FUTURE")) and not list(lab.cwd.glob("*.LOCK"))


def test_the_queue_file_may_be_elsewhere(lab, monkeypatch, tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "q"
    monkeypatch.setenv("SEAMLESS_QUEUE_FILE", str(path))
    lab.submit("-c", "sort a.txt > x.txt")
    assert path.exists()
    lab.run()
    assert lab.read("x.txt") == "a\nb\nb\n" and not path.exists()


@pytest.mark.parametrize("argv, sentence", [
    (["ls"], "no result file"), (["--dry", "-c", "ls > x"], "exclude each other"), (["--undo", "-c", "ls > x"], "exclude each other")])
def test_what_cannot_be_queued_is_refused_in_one_sentence(lab, argv, sentence):
    assert sentence in lab.submit(*argv, code=2)
    assert not (lab.cwd / ".seamless-queue").exists()


def test_without_a_place_to_keep_inputs_nothing_is_queued(lab, monkeypatch):
    monkeypatch.delenv("SEAMLESS_CACHE")
    (lab.cwd / "seamless.profile.yaml").write_text("- persistent: false\n- project: p\n")
    assert "nowhere to upload" in lab.submit("-c", "sort a.txt > x", code=2)
    assert not (lab.cwd / ".seamless-queue").exists()


def test_a_half_written_entry_is_told_and_left_out_and_what_follows_it_is_run(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    whole = (lab.cwd / ".seamless-queue").read_bytes()
    (lab.cwd / ".seamless-queue").write_bytes(whole[:300])         # its writer was killed
    lab.submit("-c", "sort -r a.txt > y.txt")
    assert (lab.cwd / ".seamless-queue").read_bytes()[300:302] == b"\0{"     # so that Seamless 1.x can read it too
    with open(lab.cwd / ".seamless-queue", "ab") as file:          # and another, behind which Seamless 1.x has written
        file.write(whole[:200] + whole)
    assert "cannot be read" in lab.run()
    assert lab.read("x.txt") == "a\nb\nb\n" and lab.read("y.txt") == "b\nb\na\n"


def test_an_entry_that_is_being_written_waits_for_its_rest(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    data = (lab.cwd / ".seamless-queue").read_bytes()
    (lab.cwd / ".seamless-queue").write_bytes(data[:300])
    file = QueueFile({}, str(lab.cwd))
    assert file.update() == [] and not file.submissions
    with open(lab.cwd / ".seamless-queue", "ab") as out:
        out.write(data[300:])
    assert file.update() == [] and len(file.submissions) == 1


GARBAGE = [b"[1]", b"{}", b'{"queue_command": "SUBMIT"}', b"\xff\xfe", b'{"queue_command": "ENDED", "at": 0}',
           b'{"queue_command": "SUBMIT", "original_command": "x", "transformation_checksum": "1", "params": 3}']


def test_garbage_in_the_file_is_told_and_harms_nothing(lab):
    (lab.cwd / ".seamless-queue").write_bytes(b"".join(entry + b"\0" for entry in GARBAGE))
    lab.submit("-c", "sort a.txt > x.txt")
    out = lab.run(code=1)
    assert lab.read("x.txt") == "a\nb\nb\n" and "Traceback" not in out and out.count(" cannot be read (") == len(GARBAGE) - 1
    [kept] = lab.cwd.glob(".seamless-queue*")           # two of these were submitted, by whatever program
    assert "1 commands are done, 2 failed" in out and "the queue file is %s\n" % kept in out and kept.read_bytes().startswith(GARBAGE[0])
    assert "2 of 3 commands failed" in lab.captured.readouterr().err


def test_a_lock_holds_others_off_until_it_is_stale(lab, monkeypatch):
    lock = lab.cwd / ".seamless-queue.LOCK"
    lock.touch()
    process = lab.start("--qsubmit", "-c", "sort a.txt > x.txt", command="seamless-run")
    time.sleep(0.5)
    assert process.poll() is None and not (lab.cwd / ".seamless-queue").exists()
    os.utime(lock, (time.time() - 31, time.time() - 31))
    assert process.wait(20) == 0
    assert len(lab.file().submissions) == 1 and not lock.exists()


@pytest.mark.slow
def test_many_submitters_at_once_lose_nothing(lab):
    processes = [lab.start("--qsubmit", "-c", "echo %d > x%d" % (n, n), command="seamless-run") for n in range(8)]
    assert [process.wait(30) for process in processes] == [0] * 8
    assert len(lab.file().submissions) == 8


# --- what depends on what -----------------------------------------------------------------------------------

def test_commands_that_use_results_of_queued_commands_run_after_them(lab):
    lab.submit("-i", "a.txt", "-c", "sleep 0.3; sort a.txt > x.txt")
    lab.submit("-c", "uniq -c x.txt > y.txt")
    lab.submit("-c", "wc -l < y.txt > z")
    lab.submit("-g2", "-c", "cat z a.txt > both.txt")
    lab.run()
    assert lab.read("x.txt") == "a\nb\nb\n" and lab.read("y.txt").split() == "1 a 2 b".split()
    assert lab.read("both.txt") == "2\nb\na\nb\n"


def test_a_queued_chain_has_the_identities_of_the_same_commands_run_one_by_one(lab, monkeypatch):
    lab.submit("-c", "sort a.txt > x.txt")
    for _ in range(2):                                  # the second time d is going to be there
        lab.submit("-i", "x.txt", "--capture", "d", "-c", "mkdir d; cp x.txt d/k")
    lab.submit("-c", "ls d > list.txt")
    lab.run()
    lab.submit("-i", "x.txt", "--capture", "d", "-c", "mkdir d; cp x.txt d/k")      # and now it is
    assert lab.run().count("was cached") == 1
    assert lab.read("list.txt") == "k\n"
    for argv in (["-v", "-c", "sort a.txt > x.txt"], ["-v", "-i", "x.txt", "--capture", "d", "-c", "mkdir d; cp x.txt d/k"],
                 ["-v", "-c", "ls d > list.txt"]):
        assert cmd_run.main(argv) == 0
        assert "the result is cached" in lab.captured.readouterr().err, argv


@pytest.mark.slow
def test_the_newest_of_two_commands_that_write_the_same_file_is_meant_and_wins(lab):
    lab.submit("-c", "sleep 0.5; echo old > x.txt")
    lab.submit("-c", "echo new > x.txt")
    lab.submit("-c", "cat x.txt > y.txt")
    lab.run()
    assert lab.read("x.txt") == lab.read("y.txt") == "new\n"


def test_an_input_is_what_it_was_when_the_command_was_submitted(lab):
    for n in range(3):
        (lab.cwd / "n.txt").write_text("%d\n" % n)
        lab.submit("-c", "cat n.txt > %d.txt" % n)
        lab.submit("-c", "cat %d.txt n.txt > twice%d.txt" % (n, n))
    lab.run()
    assert [lab.read("twice%d.txt" % n) for n in range(3)] == ["0\n0\n", "1\n1\n", "2\n2\n"]


def test_a_file_that_was_edited_after_the_queue_made_it_is_used_as_it_is(lab):
    process = lab.start()
    lab.submit("-c", "sort a.txt > x.txt")
    wait_for(lambda: len(lab.file().ended) == 1)
    (lab.cwd / "x.txt").write_text("edited\n")
    (lab.cwd / "x.txt.CHECKSUM").unlink()
    lab.submit("-c", "cat x.txt > y.txt")
    assert cmd_queue.queue_finish([]) == 0 and process.wait(20) == 0
    assert lab.read("y.txt") == "edited\n"


def test_a_directory_into_which_a_queued_command_writes_is_refused_as_an_input(lab):
    (lab.cwd / "d").mkdir()
    lab.submit("-c", "sort a.txt > d/x.txt")
    assert "a queued command will make" in lab.submit("-c", "ls d > list.txt", code=1)
    lab.submit("-c", "cat d/x.txt > y.txt")
    lab.run()
    assert lab.read("y.txt") == "a\nb\nb\n"


def test_an_input_inside_a_directory_that_a_queued_command_makes_is_refused(lab):
    lab.submit("--capture", "out", "-i", "a.txt", "-c", "sh -c 'mkdir out; cp a.txt out/f'")
    for word in ("out/f", "out/f.txt"):
        assert "%s' is inside '" % word in lab.submit("-c", "cat %s > x.txt" % word, code=1)
    lab.submit("-c", "ls out > x.txt")
    lab.run()
    assert lab.read("x.txt") == "f\n"


@pytest.mark.parametrize("main", [cmd_queue.queue, cmd_queue.queue_finish, lambda argv: cmd_run.main(["--qsubmit", "-c", "sort a.txt > x.txt"])])
def test_a_queue_file_that_cannot_be_read_is_one_sentence(lab, main):
    (lab.cwd / ".seamless-queue").mkdir()
    lab.captured.readouterr()
    assert main([]) == 1
    err = lab.captured.readouterr().err
    assert "cannot be read: Is a directory" in err and "internal" not in err


def test_a_command_that_uses_what_is_being_made_is_queued_at_once(lab):
    process = lab.start()
    lab.submit("-c", "until [ -e %s/go ]; do sleep 0.05; done; echo 1 > x.txt" % lab.cwd)
    wait_for(lambda: (lab.cwd / "x.txt.FUTURE").exists())
    assert lab.start("--qsubmit", "-c", "cat x.txt > y.txt", command="seamless-run").wait(20) == 0
    assert not (lab.cwd / "x.txt").exists()
    (lab.cwd / "go").touch()
    assert cmd_queue.queue_finish([]) == 0 and process.wait(20) == 0
    assert lab.read("y.txt") == "1\n"


def test_the_file_is_not_removed_while_it_holds_a_command_that_has_not_ended(lab):
    lab.submit("-c", "echo 1 > x.txt")
    file = lab.file()
    file.end(file.pending()[0], None, "no")
    lab.submit("-c", "echo 2 > y.txt")                  # since it was read
    assert not file.remove() and os.path.exists(file.path)
    file.end(file.pending()[0], None, "no")
    assert file.remove() and not os.path.exists(file.path)


@pytest.mark.slow
def test_a_command_run_by_hand_waits_for_what_the_queue_is_making(lab):
    process = lab.start()
    lab.submit("-i", "a.txt", "-c", "sleep 1; sort a.txt > x.txt")
    wait_for(lambda: (lab.cwd / "x.txt.FUTURE").exists())
    assert cmd_run.main(["-c", "cat x.txt"]) == 0
    assert lab.captured.readouterr().out == "a\nb\nb\n"
    assert cmd_queue.queue_finish([]) == 0 and process.wait(20) == 0
    assert not list(lab.cwd.glob("*.FUTURE"))


def test_a_command_whose_maker_ended_with_its_queue_while_it_was_submitted_is_refused(lab, monkeypatch):
    lab.submit("-c", "sort a.txt > x.txt")
    upload = cmd_run._Run.upload
    with monkeypatch.context() as slow:
        slow.setattr(cmd_run._Run, "upload", lambda *args: (upload(*args), lab.run(), lab.file().append({"queue_command": "EOF"})))
        assert "in vain for its input 'x.txt'; submit it again" in lab.submit("-c", "uniq x.txt > y.txt", code=1)
    lab.submit("-c", "uniq x.txt > y.txt")
    lab.run()
    assert lab.read("y.txt") == "a\nb\n"


def test_what_pending_commands_need_stays_for_days_while_a_queue_runs(lab, monkeypatch):
    monkeypatch.setattr(cmd_queue, "RENEW_S", 0.1)
    lab.submit("-c", "sort a.txt > x.txt")
    lab.submit("-c", "until [ -e %s/go ]; do sleep 0.05; done; echo > y.txt" % lab.cwd)
    lab.submit("--metavar", "N=3", "-c", "paste a.txt x.txt y.txt > z.txt")
    queue = cmd_queue._Queue(argparse.Namespace(workers=1, quiet=True, verbose=0))
    try:
        wait_for(lambda: queue.step() or queue.file.ended)
        buffers = [path for path in (lab.cwd / "cache").rglob("*") if len(path.name) == 64]
        for path in buffers:
            os.utime(path, (time.time() - 3 * 86400,) * 2)
        third = queue.file.pending()[-1]
        needed = {queue.file.ended[0].result, *(third.transformation[pin][2] for pin in ("a.txt", "code", "META__N"))}
        wait_for(lambda: queue.step() or all(path.stat().st_atime > time.time() - 60 for path in buffers if path.name in needed), 5)
        assert cmd_gc.main(["--max-size", "0MB"]) == 0
        assert needed < {path.name for path in buffers if path.exists()} < {path.name for path in buffers}
        (lab.cwd / "go").touch()
        wait_for(lambda: queue.step() or not queue.file.pending())
    finally:
        queue.close()
    assert lab.read("z.txt") == "b\ta\t\na\tb\t\nb\tb\t\n"


# --- what goes wrong ----------------------------------------------------------------------------------------

def test_failures_are_told_with_their_output_and_those_that_depend_on_them_too(lab):
    lab.submit("-c", "(echo oh no >&2; exit 3) > x.txt")
    lab.submit("-c", "cat x.txt > y.txt")
    lab.submit("-c", "cat y.txt > z.txt")
    lab.submit("-c", "sort a.txt > w.txt")
    out = lab.run(code=1)
    assert "oh no" in out and "exit code 3" in out and "1 commands are done, 3 failed" in out
    assert "uses 'x.txt' of job 1, which failed" in out and "uses 'y.txt' of job 2, which failed" in out
    assert lab.read("w.txt") == "a\nb\nb\n"


@pytest.mark.slow
def test_a_second_queue_on_the_same_file_is_refused(lab):
    first = lab.start()
    wait_for(lambda: lab.file().is_held())
    second = lab.start()
    assert second.wait(20) == 1 and "is running the commands in" in second.communicate()[0]
    first.terminate()
    assert first.wait(20) == 130


@pytest.mark.slow
def test_a_lost_input_is_the_failure_of_that_command(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    for path in (lab.cwd / "cache").rglob("*"):
        if path.is_file() and path.read_bytes() == b"b\na\nb\n":
            path.unlink()
    assert "job 1 failed" in lab.run(code=1)


def test_what_a_command_prints_is_shown_when_it_has_run(lab):
    lab.submit("-i", "a.txt", "-c", "echo by the way >&2; sort a.txt > x.txt")
    assert "job 1 printed:\nby the way\n" in lab.run()


def test_an_entry_without_params_is_run_as_usual(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    entry = json.loads((lab.cwd / ".seamless-queue").read_bytes()[:-1])
    entry["params"] = {"workdir": str(lab.cwd)}
    (lab.cwd / ".seamless-queue").write_bytes(json.dumps(entry).encode() + b"\0")
    lab.run()
    assert lab.read("x.txt") == "a\nb\nb\n"


def test_a_damaged_entry_is_not_run(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    path = lab.cwd / ".seamless-queue"
    path.write_bytes(path.read_bytes().replace(b'"a.txt": [', b'"b.txt": ['))
    (lab.cwd / "x.txt.FUTURE").write_text("%s.x.txt\n" % lab.file().pending()[0].id)       # left by a queue that was killed
    assert "damaged" in lab.run(code=1) and not list(lab.cwd.glob("x.txt*"))


def counted(lab, seconds, target):
    return "echo ran >> %s/%s.runs; sleep %s; echo %s > %s" % (lab.cwd, target, seconds, target, target)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_queue_that_is_ended_is_continued_by_the_next_one(lab, number):
    lab.submit("-c", counted(lab, 0, "first"))
    lab.submit("-c", counted(lab, "$([ -e %s/go ] || echo 30)0" % lab.cwd, "slow"))
    lab.submit("-c", "cat slow > third")
    process = lab.start("--workers", "1")
    wait_for(lambda: (lab.cwd / "slow.runs").exists() and len(lab.file().ended) == 1)
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "2 commands stay queued" in out and not list(lab.cwd.glob("*.FUTURE"))
    assert not (lab.cwd / "third").exists() and not lab.file().is_held()
    wait_for(lambda: not running("sleep 300"))
    (lab.cwd / "go").touch()
    assert "2 commands are done" not in lab.run()
    assert lab.read("first") == "first\n" and lab.read("third") == lab.read("slow") == "slow\n"
    assert lab.read("first.runs") == "ran\n" and lab.read("slow.runs") == "ran\nran\n"


def running(text):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                if file.read().replace(b"\0", b" ").strip() == text.encode():
                    return True
        except OSError:
            pass
    return False


@pytest.mark.slow
def test_several_commands_run_at_the_same_time(lab):
    for n in (1, 2, 3):
        lab.submit("-c", "touch {0}/at{1}; until [ -e {0}/at1 -a -e {0}/at2 -a -e {0}/at3 ]; do sleep 0.05; done; echo {1} > {1}.txt"
                   .format(lab.cwd, n))
    process = lab.start("--workers", "3", "-q")
    assert cmd_queue.queue_finish([]) == 0
    assert process.communicate(timeout=20)[0] == "" and lab.read("3.txt") == "3\n"


def test_a_result_that_is_known_is_not_computed_again(lab):
    lab.submit("-c", counted(lab, 0, "x"))
    lab.run()
    (lab.cwd / "x").unlink()
    lab.submit("-c", counted(lab, 0, "x"))
    assert "was cached" in lab.run()
    assert lab.read("x") == "x\n" and lab.read("x.runs") == "ran\n"


# --- seamless-queue-finish ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_finish_says_that_no_queue_is_running(lab, monkeypatch):
    monkeypatch.setattr(cmd_queue, "APPEAR_S", 0.2)
    assert cmd_queue.queue_finish([]) == 1
    assert "nothing is queued" in lab.captured.readouterr().err and not (lab.cwd / ".seamless-queue").exists()
    lab.submit("-c", "sort a.txt > x.txt")
    assert cmd_queue.queue_finish([]) == 1
    assert "nobody runs the 1 commands" in lab.captured.readouterr().err
    process = lab.start()                               # the end is noted
    assert process.wait(20) == 0 and lab.read("x.txt") == "a\nb\nb\n"


def test_finish_notices_that_the_queue_was_killed(lab):
    lab.submit("-c", "sleep 300; echo > x.txt")
    process = lab.start()
    wait_for(lambda: (lab.cwd / "x.txt.FUTURE").exists())
    finish = lab.start(command="seamless-queue-finish")
    wait_for(lambda: lab.file().eof)
    process.kill()
    out = finish.communicate(timeout=30)[0]             # killed before it was seen to run, or after
    assert finish.returncode == 1 and ("1 commands are left" in out or "nobody runs the 1 commands" in out), out


@pytest.mark.slow
def test_a_queue_without_commands_ends(lab):
    process = lab.start()
    assert cmd_queue.queue_finish([]) == 0
    assert process.wait(20) == 0 and not list(lab.cwd.glob(".seamless-queue*"))


@pytest.mark.parametrize("main", [cmd_queue.queue, cmd_queue.queue_finish])
def test_help_is_shown_and_appends_nothing(lab, main):
    assert main(["--help"]) == 0
    out = lab.captured.readouterr().out
    assert "exit codes" in out and "SEAMLESS_QUEUE_FILE" in out and not (lab.cwd / ".seamless-queue").exists()
    assert main(["--nonsense"]) == 2 and (main is cmd_queue.queue_finish or main(["--workers", "0"]) == 2)


def test_a_command_that_comes_after_the_end_mark_is_not_lost(lab):
    lab.submit("-c", "sort a.txt > x.txt")
    lab.file().append({"queue_command": "EOF"})
    lab.submit("-c", "cat x.txt > y.txt")
    assert lab.start().wait(20) == 0
    assert lab.read("y.txt") == "a\nb\nb\n"


def test_a_full_disk_is_one_sentence_and_leaves_the_file_whole(lab, monkeypatch):
    lab.submit("-c", "sort a.txt > x.txt")
    before = (lab.cwd / ".seamless-queue").read_bytes()
    write = os.write
    monkeypatch.setattr(queuefile.os, "write", lambda fd, data: write(fd, data[:100]))
    with pytest.raises(SeamlessError, match="disk is full"):
        lab.file().append({"queue_command": "EOF", "x": "y" * 200})
    assert (lab.cwd / ".seamless-queue").read_bytes() == before


def test_a_queue_on_a_full_disk_says_so_in_one_sentence_and_keeps_its_commands(lab, monkeypatch):
    lab.submit("-c", "sort a.txt > x.txt")
    file = lab.file()
    monkeypatch.setattr(queuefile.os, "write", lambda fd, data: os.pwrite(-1, data, 0))
    file.hold().close()                                 # it writes its number there, which nobody needs
    monkeypatch.undo()
    monkeypatch.chdir(lab.cwd)
    monkeypatch.setattr(hostside, "ROOM_BYTES", 1 << 62)
    lab.captured.readouterr()
    assert cmd_queue.queue([]) == 1
    err = lab.captured.readouterr().err
    assert "No space left on device" in err and "internal error" not in err and len(lab.file().pending()) == 1


def test_a_result_that_is_too_large_to_be_brought_is_no_failure(lab, monkeypatch):
    monkeypatch.delenv("SEAMLESS_CACHE")
    monkeypatch.setenv("SEAMLESS_MAX_DOWNLOAD_SIZE", "3")
    with servers(lab.cwd / "far") as clients:
        monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", clients)
        lab.submit("-n", "-c", "sort a.txt > x.txt")
        lab.submit("-y", "-c", "uniq x.txt > y.txt")
        assert "job 1: 1 files of 6 bytes are not downloaded without a question" in lab.run()
    assert lab.read("y.txt") == "a\nb\n" and not (lab.cwd / "x.txt").exists()
    assert lab.read("x.txt.CHECKSUM") == Checksum.of(b"a\nb\nb\n") + "\n"


# --- clusters -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_jobserver_gets_all_commands_at_once_and_ctrl_c_ends_them_there(services, monkeypatch):   # noqa: F811
    services.configure(REMOTE, workers=3)
    monkeypatch.chdir(services.work)
    (services.work / "a.txt").write_text("b\na\n")
    for n in (1, 2, 3):
        services.run("--qsubmit", "-c", "touch {0}/at{1}; until [ -e {0}/at1 -a -e {0}/at2 -a -e {0}/at3 ]; do sleep 0.05; done; echo {1} > {1}.txt"
                     .format(services.work, n))
    services.run("--qsubmit", "-c", "cat 3.txt > 4.txt")
    queue = services.start(str(BIN / "seamless-queue"))
    wait_for(lambda: (services.work / "4.txt").exists(), 60)
    services.run("--qsubmit", "-c", "sleep 321 > 5.txt")
    wait_for(lambda: running("sleep 321"), 30)
    queue.send_signal(signal.SIGINT)
    err = queue.communicate(timeout=30)[1].decode()
    assert queue.returncode == 130 and "1 commands stay queued" in err and "4 commands are done, 0 failed" in err
    wait_for(lambda: not running("sleep 321"))


@pytest.mark.slow
def test_a_queue_whose_jobserver_cannot_be_reached_keeps_its_commands(services, monkeypatch):        # noqa: F811
    services.configure(REMOTE)
    services.run("--qsubmit", "-c", "echo 1 > 1.txt")
    clusters = services.home / ".seamless/clusters.yaml"
    clusters.write_text(clusters.read_text().replace("network_interface: 127.0.0.1", "network_interface: 192.0.2.1"))
    queue = services.start(str(BIN / "seamless-queue"))
    err = queue.communicate(timeout=90)[1].decode()
    assert queue.returncode == 1 and "1 commands stay queued" in err and "Traceback" not in err
