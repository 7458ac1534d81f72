"""``seamless-run`` as a user meets it: real commands, real files, the embedded store."""
import base64
import contextlib
import gzip
import io
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from seamless_lite import cmd_run, command, confirm, run_options
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError
from seamless_lite.folder import Folder
from seamless_lite.session import Session
from seamless_lite.settings import load_settings

from test_command import VECTORS, make_files

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Shell:
    """Types commands in the folder ``cwd``."""

    def __init__(self, cwd, home, capfdbinary):
        self.cwd, self.home, self._captured = cwd, home, capfdbinary

    def __call__(self, *argv, code=0):
        """Run ``seamless-run argv`` in this process; returns (stdout, stderr)."""
        self._captured.readouterr()
        found = cmd_run.main([str(word) for word in argv])
        out, err = self._captured.readouterr()
        assert found == code, err
        assert b"Traceback" not in err
        return out, err.decode()

    def start(self, *argv, **options):
        """The same as a process of its own."""
        return subprocess.Popen([sys.executable, str(ROOT / "bin" / "seamless-run"), *map(str, argv)], cwd=self.cwd,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    @property
    def store(self):
        return Folder(self.home / ".seamless" / "cache" / "__TOPLEVEL__")

    def files(self):
        return {str(path.relative_to(self.cwd)): path.read_bytes() for path in self.cwd.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path, home, capfdbinary, monkeypatch):
    make_files(tmp_path, {"a.txt": {"text": "alpha\nbeta\n"}, "b.txt": {"text": "gamma\n"}})
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, home, capfdbinary)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def count_runs(folder, text="cat a.txt"):
    """A command that leaves a line in ``folder`` each time it really runs."""
    return "%s; echo ran | tee -a %s/runs > /dev/null" % (text, folder)


def runs(folder):
    return (folder / "runs").read_text().count("ran") if (folder / "runs").exists() else 0


@pytest.fixture
def ledger(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger")


# --- compatibility --------------------------------------------------------------------------------------

#: What we do otherwise than Seamless, and why: id -> fields of the vector that are replaced.
DEVIATIONS = {
    # stdout carries results only: what a command prints besides its result files is not a result, and would
    # be missing when the result files come from the cache.  It is shown on stderr.
    "g1-tee": {"stdout_base64": ""},
    # What a command printed before it failed is printed, as in a plain run.
    "dir-slash": {"stdout_base64": base64.b64encode(b"1\n")},
    "fail": {"stdout_base64": base64.b64encode(b"alpha\nbeta\n")},
}


@pytest.mark.parametrize("vector", [vector for vector in VECTORS if "exit_code" in vector], ids=lambda v: v["id"])
def test_vector(vector, tmp_path, home, capfdbinary, monkeypatch):
    make_files(tmp_path, vector["files"])
    cwd = tmp_path / vector.get("cwd", "")
    monkeypatch.chdir(cwd)
    shell = Shell(cwd, home, capfdbinary)
    for data in vector.get("store", ()):
        shell.store.put(base64.b64decode(data))
    argv = [word.replace("{CWD}", str(cwd)) for word in vector["argv"]]
    expected = {**vector, **DEVIATIONS.get(vector["id"], {})}
    before = shell.files()
    for _ in range(2):                      # the second time from the cache
        out, err = shell(*argv, code=expected["exit_code"])
        assert out == base64.b64decode(expected.get("stdout_base64", ""))
        created = {name: data for name, data in shell.files().items() if name not in before}
        wanted = {name: base64.b64decode(data) for name, data in expected.get("created", {}).items()}
        created = {name: data for name, data in created.items() if name in wanted or name not in
                   {key + ".CHECKSUM" for key in wanted}}
        assert created == wanted
    if vector.get("result_checksum"):
        assert shell.store.get(vector["result_checksum"]) == bytes.fromhex(vector["result_buffer_hex"])
        assert shell("--undo", *argv) and shell("--undo", *argv, code=1)


def test_a_conda_environment_is_no_part_of_the_identity(run):
    vector, = [vector for vector in VECTORS if vector["id"] == "conda-env"]
    out, _ = run("--dry", "-j", "job", *vector["argv"])
    assert json.loads((run.cwd / "job" / "env.json").read_bytes()) == vector["env.json"]


# --- the output -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, output", [
    ("printf 'no newline'", b"no newline"), ("true", b""), ("printf '\\n\\n x \\n\\n\\n'", b"\n\n x \n\n\n"),
    ("printf '\\0\\377\\r\\n\\200'", b"\0\xff\r\n\x80")])
def test_the_output_is_that_of_a_plain_run(run, command, output):
    plain = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True).stdout
    assert run("-g1", "-c", command)[0] == plain == output
    assert run("-g1", "-c", command)[0] == plain


def test_a_second_run_answers_from_the_cache(run, ledger):
    command = count_runs(ledger)
    first = run("-g1", "-c", command)
    assert run("-g1", "-c", command) == first and runs(ledger) == 1
    (run.cwd / "a.txt").write_text("other\n")
    assert run("-g1", "-c", command)[0] == b"other\n" and runs(ledger) == 2


def test_undo_makes_it_run_again(run, ledger):
    command = count_runs(ledger)
    run("-g1", "-c", command)
    out, err = run("--undo", "-g1", "-c", command)
    assert out == b"" and "forgot the result" in err
    run("-g1", "-c", command)
    assert runs(ledger) == 2
    assert "no result of this command" in run("--undo", "true", code=1)[1]


def test_a_damaged_result_is_made_again(run, ledger):
    command = count_runs(ledger) + "; echo end"     # the input has another content, and so does not bring it back
    run("-g1", "-c", command)
    path = run.store.path(Checksum.of(b"alpha\nbeta\nend\n"))
    os.chmod(path, 0o600)
    pathlib.Path(path).write_bytes(b"alpha\nbetX\nend\n")
    assert run("-g1", "-c", command)[0] == b"alpha\nbeta\nend\n" and runs(ledger) == 2


def test_a_command_that_fails_passes_on_its_exit_code_and_is_not_cached(run, ledger):
    command = count_runs(ledger) + "; echo oops >&2; exit 7"
    for number in (1, 2):
        out, err = run("-g1", "-c", command, code=7)
        assert out == b"alpha\nbeta\n" and "oops" in err and runs(ledger) == number


def test_a_killed_command_ends_with_128_plus_the_signal(run):
    assert "SIGKILL" in run("-c", "kill -9 $$", code=137)[1]


def test_much_on_stderr_is_shown_and_does_not_hang(run):
    out, err = run("-c", "head -c 200000 /dev/zero | tr '\\0' x >&2; echo done")
    assert out == b"done\n" and err.count("x") == 200000


def test_stderr_comes_while_the_command_runs(run, ledger):
    process = run.start("-g1", "-c", "echo now >&2; while [ ! -e %s/go ]; do sleep 0.05; done; echo end" % ledger)
    assert process.stderr.readline() == b"now\n"
    (ledger / "go").write_text("")
    assert process.communicate(timeout=30) == (b"end\n", b"") and process.returncode == 0


def test_the_command_never_reads_the_terminal(run):
    process = run.start("-c", "cat; echo end")
    assert process.communicate(timeout=30)[0] == b"end\n"


def test_a_reader_that_has_had_enough_is_no_error(run):
    done = subprocess.run("%s %s -c 'seq 1000000' | head -n 1" % (sys.executable, ROOT / "bin" / "seamless-run"),
                          shell=True, cwd=run.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (done.stdout, done.stderr) == (b"1\n", b"")


@pytest.mark.slow
def test_a_large_result_is_not_held_in_memory(run):
    argv = ["-c", "head -c 2000000000 /dev/zero"]
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
              "sys.path.insert(0, %r); from seamless_lite.cmd_run import main; sys.exit(main(%r))" % (str(ROOT), argv))
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script], cwd=run.cwd, stdout=subprocess.PIPE) as process:
            assert sum(len(piece) for piece in iter(lambda: process.stdout.read(1 << 20), b"")) == 2000000000
        assert process.returncode == 0
    run("-c", "head -c 2000000000 /dev/zero > big.bin")
    assert (run.cwd / "big.bin").stat().st_size == 2000000000


# --- interruption ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_whole_job(run, ledger, number):
    process = run.start("-g1", "-c", "(sleep 300; true) & echo $! $$ > %s/pids; wait" % ledger)
    wait_for(lambda: (ledger / "pids").exists() and (ledger / "pids").read_text().endswith("\n"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b""
    assert err.startswith(b"seamless-run: Canceled transformation ") and err.count(b"\n") == 1

    def gone(pid):
        try:
            return pathlib.Path("/proc/%s/stat" % pid).read_text().split(")")[1].split()[0] == "Z"
        except FileNotFoundError:
            return True
    wait_for(lambda: all(map(gone, (ledger / "pids").read_text().split())))


# --- inputs ---------------------------------------------------------------------------------------------

def test_a_whole_command_line_in_one_word(run):
    out, _ = run("paste a.txt b.txt | sort -k2 | uniq -c")
    plain = subprocess.run("paste a.txt b.txt | sort -k2 | uniq -c", shell=True, cwd=run.cwd, stdout=subprocess.PIPE)
    assert out == plain.stdout


@pytest.mark.parametrize("name", ["with space.txt", "quote'd.txt", "$HOME.txt", "new\nline.txt", "é.txt", "`x`;.txt"])
def test_weird_file_names(run, name):
    (run.cwd / name).write_text("weird\n")
    assert run("cat", "./" + name)[0] == b"weird\n"


def test_a_file_name_that_is_not_utf8(run):
    name = os.fsdecode(b"caf\xe9.txt")
    (run.cwd / name).write_text("weird\n")
    out, err = run("cat", name, code=1)
    assert "is not UTF-8" in err
    assert run("-g1", "-mx", "-i", name, "cat", "file1.txt")[0] == b"weird\n"


def test_a_directory_of_many_files(run):
    (run.cwd / "many").mkdir()
    for number in range(300):
        (run.cwd / "many" / ("f%d" % number)).write_text("%d\n" % number)
    assert run("-i", "many", "-c", "cat many/* | sort -n | tail -n 1")[0] == b"299\n"


def test_compressed_inputs(run):
    (run.cwd / "z.txt.gz").write_bytes(gzip.compress(b"inside\n"))
    assert run("zcat", "z.txt.gz")[0] == b"inside\n"
    assert run.store.get(Checksum.of(b"inside\n")) == b"inside\n"


def test_a_redirected_input(run):
    assert run("-c", "tr a-z A-Z < a.txt")[0] == b"ALPHA\nBETA\n"


def test_variables(run):
    assert run("--var", "X=a  b", "--metavar", "N=3", "-c", 'echo "$X" $N')[0] == b"a  b 3\n"
    assert run("--var", "X=a  b", "--metavar", "N=4", "-c", 'echo "$X" $N')[0] == b"a  b 3\n"      # from the cache


def test_an_input_that_changes_meanwhile_is_told_and_not_recorded(run, ledger):
    command = "cat a.txt; touch %s/on; while [ ! -e %s/go ]; do sleep 0.05; done" % (ledger, ledger)
    process = run.start("-g1", "-c", command)
    wait_for((ledger / "on").exists)
    (run.cwd / "a.txt").write_text("changed\n")
    (ledger / "go").write_text("")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == b"alpha\nbeta\n"
    assert err == b"seamless-run: 'a.txt' changed while the command ran, so its result was not recorded\n"
    (run.cwd / "a.txt").write_text("alpha\nbeta\n")
    assert run("--undo", "-g1", "-c", command, code=1)


def prepared(*argv):
    """A ``_Run`` that has made its plan and has its session."""
    options, words = run_options.split(argv)
    prepared = cmd_run._Run(run_options.make_parser().parse_args(options), words)
    prepared.plan = command.build(words, prepared.command_options())
    prepared.session = Session(load_settings(os.getcwd()))
    return prepared


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_an_input_that_changes_before_the_upload_is_told(run, size):
    (run.cwd / "c.txt").write_bytes(b"1" * size)
    some = prepared("cat", "c.txt")
    (run.cwd / "c.txt").write_bytes(b"2" * size)
    with pytest.raises(SeamlessError, match="'c.txt' changed while the command was being prepared"):
        with some.inputs() as files:
            some.session.push_files(files)


def test_large_transfers_are_asked_about(run, monkeypatch):
    prepared("ls").confirm("Upload", 400, 10**8)
    prepared("-y", "ls").confirm("Upload", 401, 10**8)
    with pytest.raises(SeamlessError, match="Upload 401 files, total 10 bytes: refused"):
        prepared("-n", "ls").confirm("Upload", 401, 10)
    for answer, accepted in (("what\nyes\n", True), ("y\n", True), ("n\n", False), ("\n", False), ("", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        with contextlib.nullcontext() if accepted else pytest.raises(SeamlessError, match="refused"):
            prepared("ls").confirm("Download", 2, 6 * 10**8)


def test_a_hint_after_a_failure(run):
    assert "write the command as -c" in run("grep", "foo bar", "a.txt", code=2)[1]


# --- results --------------------------------------------------------------------------------------------

def test_a_result_file_replaces_an_old_one_and_gets_a_sidecar(run):
    (run.cwd / "o.txt").write_text("old")
    os.chmod(run.cwd / "o.txt", 0o640)
    for _ in range(2):
        run("-c", "sort -r a.txt > o.txt")
        assert (run.cwd / "o.txt").read_text() == "beta\nalpha\n"
        assert (run.cwd / "o.txt.CHECKSUM").read_text() == Checksum.of(b"beta\nalpha\n") + "\n"
        assert stat.S_IMODE((run.cwd / "o.txt").stat().st_mode) == 0o640
        (run.cwd / "o.txt").write_text("spoiled")
    assert sorted(run.files()) == ["a.txt", "b.txt", "o.txt", "o.txt.CHECKSUM"]


def test_a_new_file_gets_the_usual_mode(run):
    before = os.umask(0o027)
    try:
        run("-c", "cat a.txt > new/folder/o.txt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((run.cwd / "new/folder/o.txt").stat().st_mode) == 0o640


def test_a_link_stays_a_link(run, ledger):
    (run.cwd / "o.txt").symlink_to(ledger / "target")
    run("-c", "cat b.txt > o.txt")
    assert (run.cwd / "o.txt").is_symlink() and (ledger / "target").read_text() == "gamma\n"


def test_a_result_can_be_written_to_a_pipe(run):
    os.mkfifo(run.cwd / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((run.cwd / "pipe").read_bytes()))
    thread.start()
    run("-c", "cat b.txt > pipe")
    thread.join(20)
    assert read == [b"gamma\n"] and stat.S_ISFIFO((run.cwd / "pipe").stat().st_mode)


def test_a_result_becomes_the_input_of_the_next_command(run):
    run("-c", "sort -r a.txt > o.txt")
    os.unlink(run.cwd / "o.txt")
    assert run("cat", "o.txt")[0] == b"beta\nalpha\n"


def test_a_captured_directory_becomes_the_input_of_the_next_command(run):
    run("-i", "a.txt", "-i", "b.txt", "-cp", "out:here", "-c", "mkdir -p out/sub; cp a.txt out/sub/x; cp b.txt out/y")
    assert (run.cwd / "here/sub/x").read_text() == "alpha\nbeta\n"
    shutil.rmtree(run.cwd / "here")
    assert run("ls", "here/")[0] == b"sub\ny\n"
    (run.cwd / "here").mkdir()
    (run.cwd / "here" / "mine").write_text("kept")
    (run.cwd / "here" / "y").write_text("old")
    run("-i", "a.txt", "-i", "b.txt", "-cp", "out:here", "-c", "mkdir -p out/sub; cp a.txt out/sub/x; cp b.txt out/y")
    assert (run.cwd / "here/mine").read_text() == "kept" and (run.cwd / "here/y").read_text() == "gamma\n"


def test_the_output_can_be_captured(run):
    assert run("-cp", ":all.txt", "cat", "a.txt")[0] == b""
    assert (run.cwd / "all.txt").read_text() == "alpha\nbeta\n"


def test_no_download_writes_only_the_sidecar(run):
    (run.cwd / "o.txt").write_text("old")
    assert "'o.txt' stays as it is" in run("-nd", "-c", "cat b.txt > o.txt")[1].replace(str(run.cwd) + "/", "")
    assert (run.cwd / "o.txt").read_text() == "old"
    assert (run.cwd / "o.txt.CHECKSUM").read_text() == Checksum.of(b"gamma\n") + "\n"
    assert "--no-download" in run("-nd", "cat", "b.txt", code=2)[1]


def test_results_land_here_also_with_a_workdir(run):
    (run.cwd / "d").mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(run.cwd / "d")
        run("-w", "..", "-c", "cat ../a.txt > o.txt")
    assert (run.cwd / "d/o.txt").exists() and (run.cwd / "d/o.txt.CHECKSUM").exists()


def test_appending_does_not_destroy_what_is_there(run):
    (run.cwd / "log.txt").write_text("mine\n")
    assert "would replace what is in that file" in run("-c", "cat b.txt >> log.txt", code=1)[1]
    assert (run.cwd / "log.txt").read_text() == "mine\n"
    os.unlink(run.cwd / "log.txt")
    for _ in range(2):
        run("-c", "cat b.txt >> log.txt")
        assert (run.cwd / "log.txt").read_text() == "gamma\n"


def test_a_result_that_cannot_be_written_gets_one_sentence(run):
    (run.cwd / "o.txt").mkdir()
    assert "a directory of that name is here" in run("-c", "cat b.txt > o.txt", code=1)[1]
    (run.cwd / "file").write_text("")
    assert "'file/x' could not be written" in run("-cp", "x:file/x", "-c", "cp b.txt x", code=1)[1].replace(
        str(run.cwd) + "/", "")
    assert not [name for name in run.files() if name.startswith(".")]


def test_a_future_file_is_there_while_the_command_runs(run, ledger):
    process = run.start("-i", "a.txt", "-c", "touch %s/on; while [ ! -e %s/go ]; do sleep 0.05; done; cat a.txt > o.txt"
                        % (ledger, ledger))
    wait_for((ledger / "on").exists)
    assert (run.cwd / "o.txt.FUTURE").read_text().endswith(".o.txt\n")
    other = run.start("wc", "-l", "o.txt")
    assert other.stderr.readline().startswith(b"seamless-run: waiting for ")
    (ledger / "go").write_text("")
    assert process.wait(30) == 0 and other.communicate(timeout=30)[0] == b"2 o.txt\n"
    assert not (run.cwd / "o.txt.FUTURE").exists()
    process.stdout.close(), process.stderr.close()


# --- options --------------------------------------------------------------------------------------------

def test_scratch_prints_but_keeps_nothing(run):
    assert run("--scratch", "-c", "cat b.txt; echo more")[0] == b"gamma\nmore\n"
    assert run.store.get(Checksum.of(b"gamma\nmore\n")) is None


def test_dry_runs_nothing(run, ledger):
    command = count_runs(ledger)
    assert run("--dry", "-g1", "-c", command) == (b"", "") and runs(ledger) == 0
    out, _ = run("--dry", "--upload", "-g1", "-c", command)
    assert runs(ledger) == 0 and run.store.get(out.decode().strip()).startswith(b"{\n")
    assert run.store.get(Checksum.of(b"alpha\nbeta\n"))
    assert run("--dry", "-j", "job", "--metavar", "N=1", "cat", "a.txt")[0].decode().strip() \
        == Checksum.of((run.cwd / "job/transformation.json").read_bytes())
    assert sorted(os.listdir(run.cwd / "job")) == ["command.txt", "dunder.json", "transformation.json"]
    assert "exists already" in run("--dry", "-j", "job", "cat", "a.txt", code=2)[1]
    run("--dry", "-j", "job3", "--conda", "e", "--docker", "img", "cat", "a.txt")
    assert json.loads((run.cwd / "job3/env.json").read_bytes()) == {"conda_environment": "e", "docker": {"name": "img"}}
    out, _ = run("--dry", "--upload", "-j", "job2", "cat", "a.txt")
    assert (run.cwd / "job2/transformation.json.CHECKSUM").read_bytes() == out.strip()


@pytest.mark.parametrize("argv, code, words", [
    ([], 2, "there is no command"), (["--nonsense", "ls"], 2, "--nonsense"), (["-i"], 2, "expected one argument"),
    (["--docker", "x", "ls"], 2, "--docker is not supported"), (["--qsubmit", "ls"], 2, "no result file"),
    (["--write-remote-job", "d", "ls"], 2, "--write-remote-job needs --dry"), (["-j", "d", "ls"], 2, "--write-job needs --dry"),
    (["--upload", "ls"], 2, "--upload needs --dry"), (["--node", "n1", "ls"], 2, "only a daskserver"), (["--stage", "gone", "ls"], 1, "gone"),
    (["cat", "gone.txt"], 1, "does not exist"), (["-c", "cat 'a"], 2, "column"),
    (["--primary", "0", "ls"], 2, "primary"),
    (["--dry", "--undo", "ls"], 2, "exclude"), (["--project", "a--b", "ls"], 1, "a--b")])
def test_a_mistake_gets_one_sentence_and_an_exit_code(run, argv, code, words):
    out, err = run(*argv, code=code)
    assert words in err and out == b""


def test_help_is_complete(run):
    out, err = run("--help")
    assert "exit codes" in out.decode() and err == ""


def test_verbosity(run):
    assert "transformation" in run("-v", "cat", "a.txt")[1]
    assert "cached" in run("-v", "cat", "a.txt")[1]
    assert run("cat", "a.txt")[1] == ""


def test_projects_keep_their_results_apart(run, ledger):
    for project in ("p1", "p2", "p1", "p1:sub"):
        run("--project", project, "-g1", "-c", count_runs(ledger))
    assert runs(ledger) == 3


def test_accepted_without_effect(run):
    assert run("--fingertip", "--direct-print", "--local", "-y", "cat", "b.txt")[0] == b"gamma\n"


def test_sizes_are_read_with_units(monkeypatch):
    for text, size in (("5", 5), ("2 kB", 2000), ("2KB", 2048), ("1.5 MiB", 1572864), ("3G", 3 << 30)):
        monkeypatch.setenv("SEAMLESS_MAX_UPLOAD_SIZE", text)
        assert confirm.read_size("SEAMLESS_MAX_UPLOAD_SIZE", 1) == size


def test_it_works_through_a_link_and_under_isolation(run, tmp_path_factory):
    link = tmp_path_factory.mktemp("bin") / "seamless-run"
    link.symlink_to(ROOT / "bin" / "seamless-run")
    done = subprocess.run([sys.executable, str(link), "cat", "b.txt"], cwd=run.cwd, stdout=subprocess.PIPE, timeout=60)
    assert done.stdout == b"gamma\n"


def test_a_hit_imports_nothing_heavy(run):
    run("cat", "a.txt")
    script = ("import sys; sys.path.insert(0, %r); from seamless_lite.cmd_run import main; "
              "code = main(['cat', 'a.txt']); print(sorted(set(%r) & set(sys.modules)), file=sys.stderr); "
              "sys.exit(code)")
    heavy = ["http", "http.client", "http.server", "urllib", "urllib.request", "email", "asyncio", "concurrent.futures",
             "multiprocessing", "subprocess", "tempfile", "shutil", "difflib", "unittest", "numpy"]
    done = subprocess.run([sys.executable, "-c", script % (str(ROOT), heavy)], cwd=run.cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60)
    assert done.stdout == b"alpha\nbeta\n" and done.stderr == b"[]\n"
