"""Shell recipes run in a private folder, and leave nothing behind: no file, no process."""
import base64
import gzip
import json
import os
import pathlib
import signal
import stat
import subprocess
import threading
import time

import pytest

from seamless_lite import compressed
from seamless_lite.celltypes import deserialize, pack_deep, plain_dumps, serialize
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, ConfigurationError, DeadlineError, JobCancelledError, JobError
from seamless_lite.execute import execute
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.function import build_recipe, string_code
from seamless_lite.shell import run_shell
from seamless_lite.transformation import Meta, Recipe

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))
RAN = [vector for vector in VECTORS["commands"] if vector.get("result_checksum")]


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return MemoryBuffers() if request.param == "memory" else Folder(tmp_path / "buffers")


@pytest.fixture
def run_dir(tmp_path):
    """Where jobs make their folders; it must be empty again afterwards."""
    path = tmp_path / "run dir $x;'"
    path.mkdir()
    yield str(path)
    assert os.listdir(path) == []


def file_pin(store, data):
    return ("bytes", None, store.put(data)), {"filesystem": {"mode": "file", "optional": True}}


def folder_pin(store, files):
    index = {name: store.put(data) for name, data in files.items()}
    return ("mixed", None, store.put(plain_dumps(index))), \
        {"celltype": "deepfolder", "filesystem": {"mode": "directory", "optional": True}}


def run(store, code, run_dir, celltype="bytes", meta=Meta(), pins={}, **options):
    """Run ``code``; the bytes of the result.  ``pins``: name -> pin, or (pin, format)."""
    all_pins = {"code": ("text", None, store.put(code.encode()))}
    formats = {}
    for name, pin in pins.items():
        if len(pin) == 2:
            pin, formats[name] = pin
        all_pins[name] = pin
    recipe = Recipe("bash", all_pins, ("result", celltype, None), {"__format__": formats} if formats else {})
    return store.get(run_shell(recipe, meta, store, run_dir=run_dir, **options))


def value_pin(store, value, celltype="mixed"):
    return (celltype, None, store.put(serialize(value, celltype)))


@pytest.mark.parametrize("vector", RAN, ids=lambda vector: vector["id"])
def test_a_command_vector_gives_the_result_that_seamless_gives(vector, run_dir):
    store = MemoryBuffers()
    for name, file in vector["files"].items():
        data = file["text"].encode() if "text" in file else base64.b64decode(file["base64"])
        store.put(gzip.decompress(data) if name.endswith(".gz") else data)
    for data in vector.get("store", ()):
        store.put(base64.b64decode(data))
    store.put(vector["code_buffer"].encode())
    store.put(plain_dumps({"x.txt": store.put(b"1\n"), "sub/y.dat": store.put(b"2\n")}))
    for text in ("1", "5", "hello world"):
        store.put(serialize(text, "str"))
    words = vector["argv"]
    metavars = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--metavar")
    result = run_shell(Recipe.from_dict(vector["transformation"]), Meta(metavars=metavars), store, run_dir=run_dir)
    assert result == vector["result_checksum"]
    assert store.get(result) == bytes.fromhex(vector["result_buffer_hex"])


def test_the_vector_of_the_python_face_gives_its_result(run_dir):
    vector = next(v for v in VECTORS["functions"] if v.get("language") == "bash")
    store = MemoryBuffers()
    arguments = {name: eval(text) for name, text in vector["args"].items()}
    recipe, buffers = build_recipe(string_code(vector["code_string"], "bash"), arguments, vector["celltypes"])
    store.put_many(buffers.values())
    assert execute(recipe, Meta(), store, run_dir=run_dir) == vector["result_checksum"]


# --- inputs ------------------------------------------------------------------------------------------------

def test_inputs_become_files_and_short_values_variables_too(store, run_dir):
    values = {"n": 5, "f": 2.5, "b": True, "s": "two words\n", "long": "x" * 1001, "dot.txt": "d", "l": [1, {"a": "é"}]}
    pins = {name: value_pin(store, value) for name, value in values.items()}
    pins["raw"] = value_pin(store, b"\0\1", "bytes")
    pins["sub dir/deep/$x;'\n"] = file_pin(store, b"odd name")
    out = run(store, "for i in n f b s dot.txt l raw; do cat $i | od -c -An | tr -d ' \\n'; echo; done > RESULT\n"
              "cat sub*/deep/* >> RESULT; echo \"|$n|$f|$b|$s|${long-unset}|${raw-unset}|${l-unset}|\" >> RESULT\nwc -c < long >> RESULT",
              run_dir, pins=pins).decode()
    assert out == ("5\\n\n2.5\\n\nTrue\\n\ntwowords\\n\nd\\n\n[1,{\"a\":\"\\u00e9\"}]\n\\0001\n"
                   "odd name|5|2.5|True|two words|unset|unset|unset|\n1002\n")


def test_arrays_become_raw_bytes_or_npy_files(store, run_dir):
    np = pytest.importorskip("numpy")
    pins = {"u": value_pin(store, np.arange(3, dtype="u1")), "a": value_pin(store, np.arange(3.0)), "m": value_pin(store, b"abc")}
    out = run(store, "od -An -tu1 u > RESULT; head -c 6 a | tail -c 5 >> RESULT; cat m >> RESULT", run_dir, pins=pins)
    assert out == b"   0   1   2\nNUMPYabc"
    with pytest.raises(JobError, match="'c'.*arrays inside"):
        run(store, "true", run_dir, pins={"c": value_pin(store, {"x": np.arange(3)})})


def test_a_suffix_promises_the_form_of_a_file(store, run_dir):
    pins = {"z.txt.gz": file_pin(store, b"zipped\n"), "d.gz": folder_pin(store, {"x": b"1\n", "s/y": b"2\n"})}
    code = "zcat z.txt.gz d/x.gz d/s/y.gz > RESULT; test ! -e d/x"
    assert run(store, code, run_dir, pins=pins) == b"zipped\n1\n2\n"
    first = run(store, "cat z.txt.gz > RESULT", run_dir, pins=pins)
    assert first[:8] == b"\x1f\x8b\x08\x00\0\0\0\0"             # neither a time nor a name


def test_zstd_inputs_need_the_program_and_say_so(store, run_dir, monkeypatch, tmp_path):
    tool = tmp_path / "zstd"
    tool.write_text("#!/bin/sh\nprintf packed; cat\n")
    tool.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setattr(compressed, "ZSTD_MODULES", ())
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, path))
    pins = {"a.zst": file_pin(store, b" data")}
    assert run(store, "cat a.zst > RESULT", run_dir, pins=pins) == b"packed data"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(JobError, match="'a.zst'.*zstd"):
        run(store, "cat a.zst > RESULT", run_dir, pins=pins)


def test_a_job_may_write_to_its_inputs_and_the_store_does_not_change(tmp_path, run_dir):
    store = Folder(tmp_path / "buffers")
    pins = {"a.txt": file_pin(store, b"original"), "d": folder_pin(store, {"x": b"leaf"})}
    out = run(store, "cat a.txt d/x > RESULT; echo changed > a.txt; echo more >> d/x; rm d/x", run_dir, pins=pins)
    assert out == b"originalleaf"
    fresh = Folder(tmp_path / "buffers")
    assert fresh.get(Checksum.of(b"original")) == b"original" and fresh.get(Checksum.of(b"leaf")) == b"leaf"


@pytest.mark.parametrize("name", ["/abs", "../up", "a/../../b", ".."])
def test_an_input_outside_the_folder_is_refused(name, store, run_dir):
    with pytest.raises(JobError, match="relative and without"):
        run(store, "true", run_dir, pins={name: file_pin(store, b"")})
    with pytest.raises(JobError, match="outside of it"):
        run(store, "true", run_dir, pins={"d": folder_pin(store, {"../x": b""})})


def test_a_missing_input_is_named(store, run_dir):
    with pytest.raises(CacheMissError, match="'a.txt'"):
        run(store, "true", run_dir, pins={"a.txt": (("bytes", None, Checksum("ab" * 32)), {"filesystem": {"mode": "file"}})})


def test_variables_are_exported_to_the_script_that_can_be_looked_at(store, run_dir):
    meta = Meta(metavars={"N": "it's"})
    out = run(store, 'echo "${META__N} $x" > RESULT; test -x transform.sh; head -3 transform.sh >> RESULT', run_dir, meta=meta,
              pins={"x": value_pin(store, "1")})
    assert out == b"it's 1\n#!/bin/bash\nexport META__N='it'\"'\"'s'\nexport x=1\n"


def test_an_input_called_transform_sh_is_the_users(store, run_dir):
    assert run(store, "cat transform.sh > RESULT", run_dir, pins={"transform.sh": file_pin(store, b"mine")}) == b"mine"


def test_target_folders_are_there_unless_the_command_makes_them(store, run_dir):
    def target(command):
        code = "mkdir -p RESULT/ RESULT/sub/deep\n%s\nmv sub/deep/out RESULT/sub/deep\n" % command
        return json.loads(run(store, code, run_dir, "deepfolder"))
    assert list(target("echo 1 > sub/deep/out")) == ["sub/deep/out"]
    assert list(target("mkdir sub; mkdir sub/deep/; echo 1 > sub/deep/out")) == ["sub/deep/out"]


# --- results -----------------------------------------------------------------------------------------------

def test_a_result_is_stored_byte_for_byte_also_when_it_is_empty(store, run_dir):
    assert run(store, "printf 'a\\0\\377\\n\\n' > RESULT", run_dir) == b"a\0\xff\n\n"
    assert run(store, ": > RESULT", run_dir) == b""


def test_a_result_folder_becomes_an_index_and_its_files_buffers(store, run_dir):
    code = ("mkdir -p RESULT/s/empty; echo 1 > RESULT/a; echo 2 > 'RESULT/s/.b c'; ln -s ../a RESULT/s/link; ln -s . RESULT/s/loop;"
            "head -c 200000 /dev/zero > RESULT/big; ln RESULT/big RESULT/same")
    index = json.loads(run(store, code, run_dir, "deepfolder"))
    assert list(index) == ["a", "big", "s/.b c", "s/link", "same"]
    assert [store.get(Checksum(index[name])) for name in ("a", "s/.b c", "s/link")] == [b"1\n", b"2\n", b"1\n"]
    assert store.get(Checksum(index["big"])) == bytes(200000) and index["same"] == index["big"]


@pytest.mark.parametrize("celltype, command, value", [
    ("mixed", "echo 42", 42), ("mixed", "echo hello", "hello\n"), ("plain", "echo '{\"a\": [1]}'", {"a": [1]}), ("int", "echo 7", 7),
    ("text", "echo 1e5; echo", "1e5"), ("str", "echo hello", "hello\n"), ("float", "echo 3", 3.0), ("bool", "echo true", True)])
def test_a_result_file_is_read_as_the_celltype_wants(celltype, command, value, run_dir):
    store = MemoryBuffers()
    assert deserialize(run(store, "(%s) > RESULT" % command, run_dir, celltype), celltype) == value


def test_bytes_that_are_no_text_become_an_array(run_dir):
    np = pytest.importorskip("numpy")
    store = MemoryBuffers()
    value = deserialize(run(store, "printf '\\377\\376' > RESULT", run_dir, "mixed"), "mixed")
    assert np.array_equal(value, np.array([255, 254], "u1"))


def test_a_result_folder_as_mixed_is_a_dict(run_dir):
    store = MemoryBuffers()
    data = run(store, "mkdir -p RESULT/s; echo 1 > RESULT/a; echo hi > RESULT/s/b", run_dir, "mixed")
    assert deserialize(data, "mixed") == {"a": 1, "s/b": "hi\n"}


@pytest.mark.parametrize("celltype, command, words", [
    ("bytes", "true", "left no file"), ("deepfolder", "mkdir RESULT", "empty"), ("deepfolder", "echo > RESULT", "make RESULT a folder"),
    ("int", "echo x > RESULT", "cannot be stored"), ("plain", ": > RESULT", "empty"), ("deepfolder", "mkdir RESULT; mkfifo RESULT/p", "RESULT/p"),
    ("deepfolder", "mkdir RESULT; ln -s /nowhere RESULT/l", "RESULT/l"), ("deepfolder", "mkdir RESULT; : > RESULT/$'\\377'", "UTF-8"),
    ("bytes", "mkfifo RESULT", "RESULT"), ("bytes", "ln -s nowhere RESULT", "left no file"), ("bytes", "mkdir RESULT; : > RESULT/a", "RESULT"),
])
def test_a_result_that_is_none_is_an_error_with_the_output(celltype, command, words, store, run_dir):
    with pytest.raises(JobError, match=words) as info:
        run(store, "echo printed\n" + command, run_dir, celltype)
    assert info.value.logs == "printed\n" and info.value.returncode == 0


@pytest.mark.parametrize("link", ["ln -s", "ln"])
def test_a_result_that_links_to_a_file_elsewhere_leaves_that_file_alone(link, store, run_dir, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    before = mine.stat()
    result = run(store, "%s '%s' RESULT" % (link, mine), run_dir)
    after = mine.stat()
    assert result == b"precious" and (after.st_mode, after.st_nlink) == (before.st_mode, before.st_nlink)


# --- failures ----------------------------------------------------------------------------------------------

def test_a_failure_has_the_exit_code_the_output_and_what_was_written_so_far(store, run_dir):
    with pytest.raises(JobError) as info:
        run(store, "(\necho out; echo err >&2; exit 3\n) > RESULT\n", run_dir)
    error = info.value
    assert error.returncode == 3 and error.logs == "err\n"
    assert error.args[0] == "the command 'echo out; echo err >&2; exit 3' failed: exit code 3"
    assert store.get(error.partial) == b"out\n"


@pytest.mark.parametrize("code, returncode, words", [
    ("nosuchprogram", 127, "127"), ("kill -9 $$", -9, r"exit code 137 \(SIGKILL\)"), ("sh -c 'kill -11 $$'; true", 139, "SIGSEGV"),
    ("echo $undefined", 1, "exit code 1"), ("false; echo > RESULT", 1, "exit code 1"), ("if", 2, "exit code 2"),
    ("exit 255", 255, "exit code 255")])
def test_every_way_to_fail_is_told(code, returncode, words, run_dir):
    with pytest.raises(JobError, match=words) as info:
        run(MemoryBuffers(), code, run_dir)
    assert info.value.returncode == returncode


def test_any_amount_of_output_passes_and_the_end_of_it_is_kept(run_dir, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        code = "head -c 3000000 /dev/zero | tr '\\0' e >&2; head -c 3000000 /dev/zero | tr '\\0' o; echo END >&2; exit 1"
        with pytest.raises(JobError) as info:
            run(MemoryBuffers(), code, run_dir, log_fd=log.fileno())
    assert (tmp_path / "log").read_bytes() == b"e" * 3000000 + b"o" * 3000000 + b"END\n"
    assert len(info.value.logs) == 1 << 16 and info.value.logs.endswith("ooEND\n")


def test_output_is_passed_on_as_it_comes(run_dir, tmp_path):
    reader, writer = os.pipe()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    results = []
    thread = threading.Thread(target=lambda: results.append(
        run(MemoryBuffers(), "echo first >&2; cat '%s' > RESULT" % gate, run_dir, log_fd=writer)))
    thread.start()
    assert os.read(reader, 100) == b"first\n"               # while the command still waits
    gate.write_text("go")
    thread.join(20)
    os.close(reader)
    os.close(writer)
    assert results == [b"go"]


def test_a_log_that_nobody_reads_any_more_does_not_stop_the_job(run_dir):
    reader, writer = os.pipe()
    os.close(reader)
    assert run(MemoryBuffers(), "echo to nobody; echo 1 > RESULT", run_dir, log_fd=writer) == b"1\n"
    os.close(writer)


def test_standard_input_is_empty(run_dir):
    assert run(MemoryBuffers(), "cat > RESULT", run_dir) == b""


def test_code_that_is_too_long_for_an_argument_runs_from_a_file(run_dir):
    code = "# %s\necho $x > RESULT; echo 'é' >> RESULT\n" % ("c" * 300_000)
    store = MemoryBuffers()
    assert run(store, code, run_dir, pins={"x": value_pin(store, 1)}) == "1\né\n".encode()


def test_without_bin_bash_there_must_be_one_on_the_path(run_dir, monkeypatch):
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/bin/bash" and real(path))
    assert run(MemoryBuffers(), "echo 1 > RESULT", run_dir) == b"1\n"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigurationError, match="no bash"):
        run(MemoryBuffers(), "echo 1 > RESULT", run_dir)


# --- processes and folders ---------------------------------------------------------------------------------

def alive(pid):
    """Whether a process is there and no zombie."""
    out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE).stdout.decode().strip()
    return bool(out) and not out.startswith("Z")


def assert_dead(pid, within_s=5.0):
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)


@pytest.mark.parametrize("background", ["sleep 300 &", "(sleep 300 & echo $! > pid)", "bash -c 'trap \"\" TERM; sleep 300 & wait' &"])
@pytest.mark.slow
def test_background_processes_end_with_the_job_and_do_not_delay_it(background, run_dir):
    pid = int(run(MemoryBuffers(), "%s\necho $(cat pid 2>/dev/null || echo $!) > RESULT" % background, run_dir))
    assert_dead(pid)


def test_a_process_substitution_may_finish_its_output(run_dir):
    assert run(MemoryBuffers(), "seq 3 > >(sleep 0.2; cat > RESULT)", run_dir) == b"1\n2\n3\n"


@pytest.mark.slow
def test_a_process_that_leaves_the_session_cannot_hold_the_job_up(run_dir, tmp_path):
    code = "setsid -f sh -c 'echo $$ > %s; exec sleep 300'; while test ! -s %s; do sleep 0.02; done; echo 1 > RESULT" % (
        (tmp_path / "pid",) * 2)
    try:
        assert run(MemoryBuffers(), code, run_dir) == b"1\n"
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


STUBBORN = "trap '' TERM; echo $$ > '%s'; sleep 300 & wait; sleep 300"


@pytest.mark.parametrize("code", ["echo $$ > '%s'; sleep 300", STUBBORN], ids=["meek", "stubborn"])
@pytest.mark.slow
def test_a_time_limit_ends_the_whole_job(code, run_dir, tmp_path):
    with pytest.raises(DeadlineError, match="time limit"):
        run(MemoryBuffers(), code % (tmp_path / "pid"), run_dir, meta=Meta(timeout_s=0.5))
    assert_dead(int((tmp_path / "pid").read_text()))


def test_cancelling_ends_the_whole_job(run_dir, tmp_path):
    cancelled = threading.Event()
    os.mkfifo(tmp_path / "pid")
    pids = []

    def cancel():
        pids.append(int((tmp_path / "pid").read_text()))
        cancelled.set()
    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(JobCancelledError, match="cancelled"):
        run(MemoryBuffers(), "sleep 300 & echo $! > '%s'; wait" % (tmp_path / "pid"), run_dir, cancelled=cancelled)
    thread.join(10)
    assert_dead(pids[0])


def test_control_c_ends_the_whole_job(run_dir, tmp_path):
    def interrupt(number, frame):
        raise KeyboardInterrupt
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(MemoryBuffers(), "echo $$ > '%s'; kill -USR1 %d; sleep 300" % (tmp_path / "pid", os.getpid()), run_dir)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert_dead(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.slow
def test_a_time_limit_also_ends_what_has_left_the_session(run_dir, tmp_path):
    code = "setsid -f sh -c 'echo $$ > %s; exec sleep 300'; sleep 300" % (tmp_path / "pid")
    with pytest.raises(DeadlineError):
        run(MemoryBuffers(), code, run_dir, meta=Meta(timeout_s=1))
    assert_dead(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("code", ["(\nkill -INT $$; echo after\n) > RESULT", "kill -INT $$; echo after > RESULT"])
def test_a_command_that_interrupts_its_shell_has_failed(code, run_dir):
    with pytest.raises(JobError, match="SIGINT") as caught:
        run(MemoryBuffers(), code, run_dir)
    assert caught.value.returncode == 130


def test_the_working_folder_itself_may_be_an_input(store, run_dir):
    pins = {".": folder_pin(store, {"a/b": b"1\n", "c": b"2\n"})}
    assert run(store, "cat a/b c > RESULT", run_dir, pins=pins) == b"1\n2\n"


def test_a_folder_that_the_job_locked_is_removed_too(run_dir):
    assert run(MemoryBuffers(), "mkdir -p a/b; echo 1 > a/b/c; echo 1 > RESULT; chmod 000 a/b a .", run_dir) == b"1\n"


def test_the_folder_is_private_and_the_callers_stays_where_it_is(run_dir):
    before = os.getcwd()
    out = run(MemoryBuffers(), "stat -c %a . > RESULT; pwd >> RESULT", run_dir).decode().splitlines()
    assert out[0] == "700" and out[1].startswith(run_dir) and os.getcwd() == before


def test_a_run_dir_that_is_not_there_is_one_sentence():
    with pytest.raises(Exception, match="cannot make a folder for the job in /nowhere/x: No such file"):
        run(MemoryBuffers(), "true", "/nowhere/x")


# --- environments ------------------------------------------------------------------------------------------

def test_a_conda_environment_is_entered(run_dir, tmp_path, monkeypatch):
    script = tmp_path / "conda root" / "etc" / "profile.d" / "conda.sh"
    script.parent.mkdir(parents=True)
    script.write_text('conda() { : "$undefined_and_used"; export ENTERED="$*"; }\n')
    monkeypatch.setenv("CONDA_ROOT", str(tmp_path / "conda root"))
    meta = Meta(environment={"conda_environment": "my env"})
    assert run(MemoryBuffers(), "echo $ENTERED > RESULT", run_dir, meta=meta) == b"activate my env\n"


def test_without_conda_and_with_docker_there_is_one_sentence(run_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CONDA_ROOT", "CONDA_EXE"):
        monkeypatch.delenv(name, raising=False)
    for environment, words in (({"conda_environment": "e"}, "'e'.*no conda"), ({"docker": {"name": "i"}}, "docker")):
        with pytest.raises(ConfigurationError, match=words):
            run(MemoryBuffers(), "true", run_dir, meta=Meta(environment=environment))


# --- size --------------------------------------------------------------------------------------------------

def test_a_large_result_is_moved_into_the_store_without_being_loaded(tmp_path, run_dir):
    resource = pytest.importorskip("resource")
    store = Folder(tmp_path / "buffers")
    code = Recipe("bash", {"code": ("text", None, store.put(b"head -c 300000000 /dev/zero > RESULT"))}, ("result", "bytes", None))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run_shell(code, Meta(), store, run_dir=run_dir)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000        # kB
    assert os.path.getsize(store.path(result)) == 300000000
    assert not os.stat(store.path(result)).st_mode & stat.S_IWUSR


@pytest.mark.slow
def test_a_folder_of_thousands_of_files_goes_in_and_comes_out(tmp_path, run_dir):
    store = Folder(tmp_path / "buffers")
    data, leaves = pack_deep({"s%d/f%d" % (i % 7, i): b"%d" % i for i in range(3000)}, "deepfolder")
    store.put_many([*leaves.values(), data])
    pin = (("mixed", None, Checksum.of(data)), {"celltype": "deepfolder", "filesystem": {"mode": "directory"}})
    assert run(store, "mv d RESULT", run_dir, "deepfolder", pins={"d": pin}) == data
