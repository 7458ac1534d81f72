"""From a command line to code, pins and checksum: compatibility vectors, and the cases that Seamless corrupts."""
import base64
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import threading

import pytest

from seamless_lite import command, compressed, inputs, run_options
from seamless_lite.checksum import Checksum
from seamless_lite.errors import SeamlessError, UsageError

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors.json").read_text())["commands"]


def make_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content["text"].encode() if "text" in content else base64.b64decode(content["base64"]))
        if content.get("executable"):
            path.chmod(0o755)


def build(cwd, *argv):
    """The plan of ``seamless-run argv...``, typed in the folder ``cwd``."""
    flags, words = run_options.split([str(word) for word in argv])
    values = vars(run_options.make_parser().parse_args(flags))
    fields = {name: values[name] for name in values if name in command.Options._fields}
    return command.build(words, command.Options(
        cwd=str(cwd), check_suffixed=not values["g1"], check_bare=not values["g2"],
        search_path=os.environ["PATH"], **fields))


@pytest.fixture
def here(tmp_path):
    make_files(tmp_path, {"a.txt": {"text": "alpha\n"}, "b.txt": {"text": "beta\n"}, "d/x.txt": {"text": "1\n"},
                          "my file.txt": {"text": "m\n"}, "noext": {"text": "n\n"},
                          "s.sh": {"text": "#!/bin/sh\n", "executable": True}})
    return tmp_path


def pins(plan):
    return sorted(set(plan.recipe.pins) - {"code"})


# --- compatibility --------------------------------------------------------------------------------------

@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_vector(vector, tmp_path):
    make_files(tmp_path, vector["files"])
    cwd = tmp_path / vector.get("cwd", "")
    argv = [word.replace("{CWD}", str(cwd)) for word in vector["argv"]]
    if "error" in vector:
        with pytest.raises(SeamlessError) as caught:
            build(cwd, *argv)
        assert caught.value.exit_code == vector["exit_code"]
        return
    plan = build(cwd, *argv)
    assert plan.code == vector["code_buffer"]
    assert plan.recipe.to_dict() == vector["transformation"]
    assert plan.recipe.buffer.decode() == vector["transformation_buffer"]
    assert plan.recipe.checksum == vector["transformation_checksum"]
    assert Checksum.of(plan.inputs.buffers[plan.recipe.pins["code"][2]]) == plan.recipe.pins["code"][2]


def test_every_pin_can_be_uploaded(here):
    plan = build(here, "--var", "X=1", "-i", "d", "cat", "a.txt")
    for checksum in plan.recipe.inputs():
        path = plan.inputs.files.get(checksum)
        data = plan.inputs.buffers[checksum] if path is None else pathlib.Path(path).read_bytes()
        assert Checksum.of(data) == checksum
    assert Checksum.of(b"1\n") in plan.inputs.files         # and so can what the index of d names


# --- words ----------------------------------------------------------------------------------------------

def test_one_word_may_hold_a_whole_command_line(here):
    plan = build(here, "paste a.txt b.txt | sort -k2 | uniq -c")
    assert plan.code == "(\npaste a.txt b.txt | sort -k2 | uniq -c\n) > RESULT\n"
    assert pins(plan) == ["a.txt", "b.txt"]


def test_options_of_the_command_are_left_alone(here):
    assert build(here, "cat", "-n", "--in", "-v", "a.txt").code == "(\ncat -n --in -v a.txt\n) > RESULT\n"
    assert build(here, "-g1", "--", "cat", "-c").code == "(\ncat -c\n) > RESULT\n"


WEIRD = ["with space.txt", "quote'd.txt", 'double"d.txt', "$HOME.txt", "semi;colon.txt", "new\nline.txt", "a&b.txt",
         "star*.txt", "back\\slash.txt", "(paren).txt", "`tick`.txt", "é.txt", "tab\t.txt", "#hash.txt", "~tilde.txt",
         "-dash.txt", "a|b.txt", "{a,b}.txt", "x=1.txt", "[ab].txt", "a>b.txt"]


@pytest.mark.parametrize("name", WEIRD)
@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_input_may_have_any_name(name, prefix, tmp_path):
    (tmp_path / name).write_text("content of it\n")
    if name.startswith("-"):
        prefix = "./"
    plan = build(tmp_path, "cat", prefix + name)
    assert pins(plan) == [name]
    ran = tmp_path / "ran"
    ran.mkdir()
    shutil.copy(tmp_path / name, ran / name)
    subprocess.run(["bash", "-c", plan.code], cwd=ran, check=True)
    assert (ran / "RESULT").read_text() == "content of it\n"


@pytest.mark.parametrize("name", [name for name in WEIRD if "\n" not in name])
def test_a_result_may_have_any_name(name, tmp_path):
    plan = build(tmp_path, "-c", "echo hi > './sub dir/../%s'" % name.replace("'", "'\"'\"'"))
    target, = plan.targets
    (tmp_path / "sub dir").mkdir()
    subprocess.run(["bash", "-c", plan.code], cwd=tmp_path, check=True)
    assert (tmp_path / "RESULT" / os.path.normpath(target.server)).read_text() == "hi\n"


def test_names_that_are_not_utf8_are_refused_or_mapped(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("x")
    with pytest.raises(SeamlessError, match="not UTF-8"):
        build(tmp_path, "cat", name)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text("x")
    with pytest.raises(SeamlessError, match="not UTF-8"):
        build(tmp_path, "ls", "d")
    assert pins(build(tmp_path, "-g1", "-mx", "-i", name, "-c", "cat file1.txt")) == ["file1.txt"]
    assert build(tmp_path, "-mx", "cat", name).code == "(\ncat file1.txt\n) > RESULT\n"
    with pytest.raises(SeamlessError, match=r"'cat caf\\xe9.txt; echo caf\\xe9.txt' is not UTF-8"):
        build(tmp_path, "-mx", "-c", "cat %s; echo %s" % (name, name))


def test_expansions_are_not_file_names(here):
    assert pins(build(here, "-c", "for f in x; do cat $f.txt a.txt; done")) == ["a.txt"]


@pytest.mark.parametrize("argv, words", [
    (["cat", "gone.txt"], "argument #2 'gone.txt'.*does not exist"),
    (["cat", "a.txt", "noext"], "argument #3 'noext'.*-g2"),
    (["ls", "gone/"], "argument #2 'gone/'.*not a directory"),
    (["-c", "cat *.txt"], "patterns are not expanded"),
    (["-c", "cat a.txt | wc x.y"], "argument #4 'x.y'"),
    (["-i", "gone", "ls"], "-i gone does not exist"),
    (["-I", "gone", "ls"], "-I gone: the file cannot be read"),
    (["cat", "/etc/nsswitch.conf"], "lies outside the working directory.*-w DIR"),
    (["-ms", "cat", "a.txt", "e/a.txt"], "'a.txt' and 'e/a.txt' would both be called 'a.txt'"),
    (["-g2", "cat", "code"], "cannot be called 'code'"),
    (["cat", "__init__.py"], "cannot be called '__init__.py'"),
    (["cat", "pipe.txt"], "'pipe.txt' is a pipe"),
    (["cat", "bad.txt.gz"], "bad.txt.gz is not whole gzip data"),
    (["-c", "cat a.txt", "b.txt"], "-c takes the whole command as one word"),
    (["-c", " "], "the command is empty"),
    (["-c", "cat 'a.txt"], "unclosed|unexpected|end"),
    (["-c", "for f in a; do"], "unclosed|unexpected|end"),
    (["--primary", "3", "cat", "a.txt"], "number 3"),
    (["--var", "1X=2", "ls"], "--var 1X=2: it takes NAME=VALUE"),
    (["--var", "X", "ls"], "--var X: it takes NAME=VALUE"),
    (["--var", "X=1", "--var", "X=2", "ls"], "X was already given as '1'"),
    (["--var", "code=1", "ls"], "that name is taken"),
    (["--metavar", "META__X=1", "ls"], "must not begin with META__"),
    (["-cp", "/abs", "ls"], "--capture /abs: a command writes its results below"),
    (["-cp", ":", "ls"], "it takes SERVER"),
    (["-c", "echo > ../x"], "> ../x: a command writes its results below"),
    (["-c", "echo > /somewhere/x"], "> /somewhere/x: a command writes its results below"),
    (["-c", "echo > $X"], r"the name of the output file, \$X, is known only where the command runs"),
    (["-c", "echo > o1 > o2"], "several output redirections, 'o1' and 'o2'"),
])
def test_a_mistake_gets_one_sentence(argv, words, here):
    make_files(here, {"e/a.txt": {"text": "other\n"}, "code": {"text": ""}, "__init__.py": {"text": ""},
                      "bad.txt.gz": {"text": "no gzip"}})
    os.mkfifo(here / "pipe.txt")
    with pytest.raises(SeamlessError, match=words) as caught:
        build(here, *argv)
    assert "\n" not in str(caught.value)


# --- done right where Seamless is not ---------------------------------------------------------------------

def test_a_redirected_input_is_an_input_and_no_result(here):
    plan = build(here, "-c", "tr a-z A-Z < ./a.txt")
    assert pins(plan) == ["a.txt"] and plan.targets == []
    assert plan.code == "(\ntr a-z A-Z < a.txt\n) > RESULT\n"
    assert pins(build(here, "-c", "while read x; do echo $x; done < 'my file.txt'")) == ["my file.txt"]
    assert pins(build(here, "-c", "cat <<END\n$HOME\nEND")) == []


def test_dev_null_is_no_result(here):
    assert build(here, "-c", "cat a.txt > /dev/null").targets == []
    assert build(here, "-c", "cat a.txt >&2").targets == []


def test_an_absolute_result_inside_becomes_relative(here):
    plan = build(here, "-c", "cat a.txt > %s/out.txt" % here)
    assert plan.code == "mkdir -p RESULT/\ncat a.txt > out.txt\nmv out.txt RESULT/\n"


def test_primary_chooses_whose_words_are_inputs(here):
    assert pins(build(here, "--primary", "2", "-c", "mkdir q; cat ./a.txt")) == ["a.txt"]
    assert build(here, "--primary", "2", "-c", "mkdir q; cat ./a.txt").code == "(\nmkdir q; cat a.txt\n) > RESULT\n"


def test_captures_may_come_from_a_loop_with_computed_names(here):
    plan = build(here, "-cp", "o1", "-c", "for i in 1 2; do echo > o$i; done")
    assert [target.server for target in plan.targets] == ["o1"]


@pytest.mark.parametrize("text, missed", [
    ("cat a.txt && cat b.txt", ["b.txt"]),
    ("cat a.txt > o b.txt", ["b.txt"]),
    ("diff <(sort a.txt) <(sort b.txt)", ["a.txt", "b.txt"]),
    ("for f in a.txt b.txt x; do cat $f; done", ["a.txt", "b.txt"]),
    ("for f in [ab].txt; do cat $f; done", ["a.txt", "b.txt"]),
    ("echo $(cat a.txt) \"$(< b.txt)\"", ["a.txt", "b.txt"]),
    ("echo `cat a.txt \\`cat b.txt\\``", ["a.txt", "b.txt"]),
    ("f=a.txt; echo x --from=b.txt", ["a.txt"]),
    ("[[ -f a.txt ]]", ["a.txt"]),
    ("cat a.txt; ./s.sh", ["./s.sh"]),
    ("cat a.txt; cat d/x.txt > d/o.txt", ["d/x.txt"]),
    ("cat d/x.txt; ls d", ["d"]),
    ("cat a.txt; cat {}/b.txt", ["{}/b.txt"]),
    # covered, made by the command, or no file
    ("cat a.txt; cat ./a.txt", []), ("ls d; cat d/x.txt", []), ("ls .; cat d/x.txt b.txt", []),
    ("sort a.txt > b.txt; cat b.txt", []), ("echo $(sort x > b.txt; cat b.txt)", []), ("echo; ls . ..; cat 'x y'", []),
    ("cat a.txt; d", []), ("cat a.txt; ls d > d/o.txt", []), ("cat a.txt; ls / /dev/null", []),
])
def test_words_that_are_files_here_only_are_known(text, missed, here):
    assert build(here, "-g1", "-c", text.replace("{}", str(here))).missed == [
        name.replace("{}", str(here)) for name in missed]


def test_captured_results_are_not_missed(here):
    (here / "res").mkdir()
    assert build(here, "-i", "a.txt", "-cp", "res/e", "-c", "true; mkdir -p res/e; cp a.txt res/e/f").missed == []


def test_the_recipe_from_before_the_results_were_here_is_known(here):
    argv = ["-i", "a.txt", "-cp", "res", "-c", "mkdir res; cp a.txt res/f"]
    before = build(here, *argv)
    assert before.earlier is None
    make_files(here, {"res/f": {"text": "old\n"}})
    after = build(here, *argv)
    assert after.recipe != before.recipe and after.earlier == before.recipe
    make_files(here, {"s.txt": {"text": ""}})
    assert build(here, "-cp", "s.txt", "-c", "cp a.txt s.txt").earlier is None      # without s.txt it is refused


def test_an_empty_word_is_a_value_and_no_input(here):
    assert pins(build(here, "-c", "wc -l a.txt ''")) == ["a.txt"]
    with pytest.raises(UsageError, match="-i '' names no input"):
        build(here, "-i", "", "ls")


def test_words_of_the_system_are_values(here):
    assert pins(build(here, "-c", "cat /dev/null /proc/version /dev/x.txt /proc/self/ < /proc/version")) == []


@pytest.mark.parametrize("text, chmod, code", [
    ("timeout 5 ./s.sh ./a.txt", "s.sh", "timeout 5 ./s.sh a.txt"),
    ("env A=1 nice -n 3 {}/s.sh", "s.sh", "env A=1 nice -n 3 ./s.sh"),
    ("xargs -I {{}} ./d/t.sh {{}} < a.txt", "d/t.sh", "xargs -I {{}} d/t.sh {{}} < a.txt"),
    ("nohup stdbuf -o L timeout -s KILL 2s './s.sh'", "s.sh", "nohup stdbuf -o L timeout -s KILL 2s './s.sh'"),
    ("env cat ./s.sh", "", "env cat s.sh"),                 # data, not run
    ("timeout 5 ./a.txt", "", "timeout 5 a.txt"),           # cannot be run here either
])
def test_a_script_behind_a_wrapper_can_be_run(text, chmod, code, here):
    shutil.copy(here / "s.sh", here / "d" / "t.sh")
    plan = build(here, "-c", text.replace("{{}}", "{0}").replace("{}", str(here)).replace("{0}", "{}"))
    assert ("chmod +x '%s'\n" % chmod in plan.code) if chmod else "chmod" not in plan.code
    assert "\n%s\n" % code.replace("{{}}", "{}") in plan.code


def test_the_local_name_of_a_capture_wins(here):
    target, = build(here, "-cp", "o.txt:mine.txt", "-c", "cat a.txt > o.txt").targets
    assert target == command.Target("o.txt", "mine.txt")
    target, = build(here, "-cp", "o.txt", "-c", "cat a.txt >> o.txt").targets
    assert target == command.Target("o.txt", "o.txt", True)


def test_a_result_behind_dots_lands_where_bash_puts_it(here):
    plan = build(here, "-c", "cat a.txt > d/../o.txt")
    assert plan.code == "mkdir -p RESULT/\ncat a.txt > o.txt\nmv o.txt RESULT/\n"
    with pytest.raises(UsageError, match="a command writes its results below"):
        build(here, "-c", "cat a.txt > d/../../o.txt")


def test_a_pyenv_like_program_outside_is_left_alone(here, tmp_path_factory, monkeypatch):
    shims = tmp_path_factory.mktemp("shims")
    make_files(shims, {"tool": {"text": "#!/bin/sh\n", "executable": True}})
    monkeypatch.setenv("PATH", str(shims), prepend=os.pathsep)
    assert build(here, "tool", "a.txt").code == "(\ntool a.txt\n) > RESULT\n"
    make_files(here, {"tools/mine": {"text": "#!/bin/sh\n", "executable": True}})
    monkeypatch.setenv("PATH", str(here / "tools"), prepend=os.pathsep)
    plan = build(here, "mine", "a.txt")
    assert plan.code == "chmod +x 'tools/mine'\n(\ntools/mine a.txt\n) > RESULT\n"


def test_a_program_later_in_the_pipeline_is_an_input_too(here):
    plan = build(here, "-c", "cat a.txt | ./s.sh")
    assert plan.code == "export PATH=./:$PATH\nchmod +x 's.sh'\n(\ncat a.txt | s.sh\n) > RESULT\n"


def test_a_device_is_a_value(here):
    assert pins(build(here, "cat", "/dev/null", "a.txt")) == ["a.txt"]


def test_inputs_outside_are_refused_before_they_run(here):
    with pytest.raises(SeamlessError, match="outside the working directory"):
        build(here / "d", "cat", "../a.txt").check_pins()


# --- inputs ---------------------------------------------------------------------------------------------

def test_a_compressed_file_counts_as_its_content(here):
    (here / "z.txt.gz").write_bytes(gzip.compress(b"alpha\n"))
    plan = build(here, "zcat", "z.txt.gz")
    checksum = plan.recipe.pins["z.txt.gz"][2]
    assert checksum == Checksum.of(b"alpha\n") and plan.inputs.packed == {checksum: str(here / "z.txt.gz")}
    compressed.expand_to(str(here / "z.txt.gz"), str(here / "plain"), checksum)
    assert (here / "plain").read_bytes() == b"alpha\n"


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the program zstd")
def test_a_zstd_file_counts_as_its_content(here):
    subprocess.run(["zstd", "-q", "a.txt"], cwd=here, check=True)
    assert build(here, "cat", "a.txt.zst").recipe.pins["a.txt.zst"][2] == Checksum.of(b"alpha\n")


def test_a_sidecar_stands_for_a_file_that_is_not_here(here):
    (here / "far.txt.CHECKSUM").write_text("# made elsewhere\n%s\n" % ("a" * 64))
    plan = build(here, "cat", "far.txt")
    assert plan.recipe.pins["far.txt"][2] == "a" * 64 and not plan.inputs.files
    with pytest.raises(SeamlessError, match="does not hold a checksum"):
        (here / "far.txt.CHECKSUM").write_text("nonsense")
        build(here, "cat", "far.txt")


def test_a_sidecar_that_contradicts_the_file_is_refused(here):
    (here / "a.txt.CHECKSUM").write_text("a" * 64)
    with pytest.raises(SeamlessError, match="the content of 'a.txt' is not what .*a.txt.CHECKSUM says"):
        build(here, "cat", "a.txt")


def test_a_directory_with_sidecars_is_not_read(here):
    index = inputs.plain_dumps({"x.txt": Checksum.of(b"1\n"), "gone.txt": "b" * 64})
    (here / "d.INDEX").write_bytes(index)
    (here / "d.CHECKSUM").write_text(Checksum.of(index))
    plan = build(here, "ls", "d/")
    assert plan.recipe.pins["d"] == ("mixed", None, Checksum.of(index))
    assert list(plan.inputs.files) == [Checksum.of(b"1\n")]
    (here / "d.INDEX").write_bytes(inputs.plain_dumps({"../evil": "b" * 64}))
    (here / "d.CHECKSUM").write_text(Checksum.of((here / "d.INDEX").read_bytes()))
    with pytest.raises(SeamlessError, match="outside the directory"):
        build(here, "ls", "d")


@pytest.mark.slow
def test_a_directory_of_10000_files(tmp_path):
    (tmp_path / "big").mkdir()
    for number in range(10000):
        (tmp_path / "big" / ("f%d" % number)).write_bytes(b"%d" % number)
    plan = build(tmp_path, "ls", "big")
    assert len(plan.inputs.files) == 10000
    assert not plan.inputs.seen[0].changed()
    (tmp_path / "big" / "f9999").write_bytes(b"other")
    assert plan.inputs.seen[0].changed()


def test_a_directory_follows_links_to_files_only(here):
    (here / "d" / "link").symlink_to("../a.txt")
    (here / "d" / "dangling").symlink_to("nowhere")
    (here / "d" / "up").symlink_to("..")
    os.mkfifo(here / "d" / "pipe")
    plan = build(here, "ls", "d")
    index = inputs.parse_index(plan.inputs.buffers[plan.recipe.pins["d"][2]], "it")
    assert index == {"link": Checksum.of(b"alpha\n"), "x.txt": Checksum.of(b"1\n")}


def test_plain_and_compressed_side_by_side_must_agree(here):
    (here / "d" / "x.txt.gz").write_bytes(gzip.compress(b"1\n"))
    build(here, "ls", "d")
    (here / "d" / "x.txt.gz").write_bytes(gzip.compress(b"2\n"))
    with pytest.raises(SeamlessError, match="both plain and compressed"):
        build(here, "ls", "d")


def test_a_change_is_seen_even_with_the_same_size_and_time(here):
    seen, = build(here, "cat", "a.txt").inputs.seen
    assert not seen.changed()
    status = os.stat(here / "a.txt")
    (here / "a.txt").write_text("ALPHA\n")
    os.utime(here / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert seen.changed()
    (here / "a.txt").unlink()
    assert seen.changed()


def test_a_file_that_is_being_written_to_is_refused(here):
    stop = threading.Event()
    with open(here / "growing.dat", "wb") as file:
        file.truncate(64 << 20)             # hashing it takes many times as long as one write

        def write():
            while not stop.is_set():
                os.pwrite(file.fileno(), os.urandom(8), 0)
        thread = threading.Thread(target=write)
        thread.start()
        try:
            with pytest.raises(SeamlessError, match="'growing.dat' is being written to"):
                build(here, "wc", "growing.dat")
        finally:
            stop.set()
            thread.join()
    assert pins(build(here, "wc", "growing.dat")) == ["growing.dat"]


def test_touching_a_file_is_no_change(here):
    os.utime(here / "a.txt", (1, 1))
    seen, = build(here, "cat", "a.txt").inputs.seen
    os.utime(here / "a.txt", (2, 2))
    assert not seen.changed()


def test_an_input_that_another_command_makes_is_waited_for(here):
    (here / "new.txt.FUTURE").write_text("x")

    def finish(text):
        said.append(text)
        (here / "new.txt").write_text("now\n")
        (here / "new.txt.FUTURE").unlink()
    said = []
    options = command.Options(cwd=str(here))
    plan = command.build(["cat", "new.txt"], options, finish)
    assert pins(plan) == ["new.txt"] and "waiting for" in said[0]
    (here / "dead.txt.FUTURE").write_text("x")
    os.utime(here / "dead.txt.FUTURE", (1, 1))
    with pytest.raises(SeamlessError, match="remove .*dead.txt.FUTURE"):
        command.build(["cat", "dead.txt"], options)


# --- options --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, border", [
    (["ls"], 0), (["-v", "ls", "-v"], 1), (["-vv", "-i", "x", "ls"], 3), (["--var=A=1", "ls"], 1),
    (["--var", "A=1", "ls"], 2), (["--cap", "x", "ls"], 2), (["-w", "..", "-W", "ls"], 3),
    (["--dry", "-j", "d", "ls"], 3),
    (["-", "x"], 0), (["--capture"], 1)])
def test_the_command_begins_at_the_first_word_that_is_no_option(argv, border):
    assert run_options.split(argv) == (argv[:border], argv[border:])


def test_options_are_complete_and_each_is_explained(capsys):
    assert "exit codes" in run_options.make_parser().format_help()
    for options in run_options.OPTIONS.values():
        assert all(keywords["help"] for _, keywords in options)


def test_command_options_are_checked_by_type():
    with pytest.raises(UsageError):
        command.assignments(["A B=1"], "--var")


def test_a_program_that_runs_twice_is_made_executable_twice_as_in_seamless(here):
    assert "chmod +x 's.sh' 's.sh'\n" in build(here, "-c", "./s.sh a.txt | ./s.sh b.txt").code
    assert "chmod +x './s.sh' './s.sh'\n" in build(here, "-i", "s.sh", "-c", "cat a.txt; ./s.sh a.txt; ./s.sh").code
    assert "chmod" not in build(here, "-c", "cat a.txt; ./s.sh").code


def test_words_of_a_group_in_a_pipeline_are_inputs_as_in_seamless(here):
    assert pins(build(here, "-c", "cat a.txt | (sort; cat b.txt)")) == ["a.txt", "b.txt"]
    assert pins(build(here, "-c", "{ cat a.txt; cat b.txt; } | sort")) == ["a.txt", "b.txt"]
    assert pins(build(here, "-c", "(cat a.txt; cat b.txt)")) == ["a.txt"]
