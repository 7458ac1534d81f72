"""Why a command or function would run: ``seamless-run --why`` and ``Transformation.why()``."""
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from seamless_lite import cmd_run, config, delayed, differences, why
from seamless_lite.checksum import Checksum
from seamless_lite.database import DatabaseClient, DatabaseService
from seamless_lite.folder import Folder
from seamless_lite.httpbase import Listen, start
from seamless_lite.layers import LayeredResults
from seamless_lite.resulttable import MemoryResults, ResultTable


@pytest.fixture
def run(tmp_path, monkeypatch, capfdbinary):
    """Runs ``seamless-run`` in this process, in a folder with a.txt and data/; returns its output as text."""
    (tmp_path / "data").mkdir()
    for name, text in (("a.txt", "alpha\nbeta\n"), ("b.txt", "gamma\n"), ("data/x", "x"), ("data/y", "y")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)

    def call(*argv, code=0):
        capfdbinary.readouterr()
        found = cmd_run.main([str(word) for word in argv])
        out, err = capfdbinary.readouterr()
        assert found == code and b"Traceback" not in err, err
        return out.decode()
    return call


@pytest.fixture
def store(home):
    return Folder(home / ".seamless" / "cache" / "__TOPLEVEL__")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The module ``config`` with results in the embedded store."""
    monkeypatch.setattr(config, "_state", config._State())
    config.init(workdir=str(tmp_path))
    yield config.session()
    config._state.close()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- commands ---------------------------------------------------------------------------------------------

def test_the_search_leaves_no_trace_by_which_all_would_seem_to_be_in_use(run, store):
    for option in ("", "-r", "-u", "-n"):
        run("-c", "sort %s a.txt" % option)
    paths = [path for path in pathlib.Path(store.directory).glob("??/*")]
    for path in paths:
        os.utime(path, (1.7e9, 1.7e9))
    assert "a.txt" in run("--why", "-c", "sort b.txt", code=1)
    names = {path.name for path in paths if os.stat(path).st_atime != 1.7e9}
    assert len([name for name in names if b"__language__" in store.peek(name)]) <= 1, "only the nearest was used"


def test_a_hit_is_said_to_be_one_and_nothing_runs(run, tmp_path):
    run("-c", "cat a.txt; echo ran | tee -a %s/log > /dev/null" % tmp_path)
    said = run("--why", "-c", "cat a.txt; echo ran | tee -a %s/log > /dev/null" % tmp_path)
    assert said.startswith("hit: ") and (tmp_path / "log").read_text() == "ran\n"


def test_a_command_that_never_ran_has_no_earlier_run_and_is_not_run(run, tmp_path, home):
    run("sort", "a.txt")
    before = files(home)
    said = run("--why", "-c", "cut -c1 a.txt; echo ran | tee -a %s/log > /dev/null" % tmp_path, code=1)
    assert said.startswith("miss: ") and "no earlier run of this command was found (runs looked at: 1)" in said
    assert not (tmp_path / "log").exists() and files(home) == before, "asking has stored something"


def test_an_input_file_that_changed_is_named_with_both_checksums(run, tmp_path):
    run("paste", "a.txt", "b.txt")
    old = Checksum.of_file("a.txt")
    (tmp_path / "a.txt").write_text("other")
    said = run("--why", "paste", "a.txt", "b.txt", code=1)
    assert "file 'a.txt': was %s, is %s" % (differences.short(old), differences.short(Checksum.of_file("a.txt"))) in said
    assert "b.txt" not in said and "code" not in said


def test_entries_of_a_directory_that_changed_are_named(run, tmp_path):
    run("ls", "data")
    (tmp_path / "data/y").write_text("z")
    (tmp_path / "data/z").write_text("z")
    (tmp_path / "data/x").unlink()
    said = run("--why", "ls", "data", code=1)
    assert "directory 'data': was" in said and "'y': was" in said and "'z': is new" in said and "'x': is not there any more" in said


def test_the_line_of_the_code_that_differs_is_shown_and_not_the_script_around_it(run):
    run("-c", "cat a.txt\nsort a.txt\nuniq a.txt")
    said = run("--why", "-c", "cat a.txt\nsort -r a.txt\nuniq a.txt > out", code=1)
    assert "line 2:\n    - sort a.txt\n    - uniq a.txt\n    + sort -r a.txt\n    + uniq a.txt > out\n" in said
    assert "mkdir" not in said and "result: was the output, is files" in said


def test_variables_are_shown_with_their_values_and_metavars_do_not_matter(run):
    run("--var", "N=3", "--metavar", "T=1", "-c", "cat a.txt; echo $N $T")
    said = run("--why", "--var", "N=4", "--metavar", "T=2", "-c", "cat a.txt; echo $N $T", code=1)
    assert said.endswith("  variable 'N': was '3', is '4'\n") and "T" not in said.replace("TOP", "")
    assert run("--why", "--var", "N=3", "--metavar", "T=2", "-c", "cat a.txt; echo $N $T").startswith("hit")


def test_inputs_that_were_added_removed_or_renamed_are_named(run, tmp_path):
    run("-i", "data", "cat", "a.txt")
    said = run("--why", "-i", "b.txt", "cat", "a.txt", code=1)
    assert "file 'b.txt': is new" in said and "directory 'data': is not there any more" in said
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    said = run("--why", "-i", "data", "cat", "c.txt", code=1)
    assert "file 'a.txt': is called 'c.txt' now" in said and "new" not in said and "any more" not in said


def test_of_several_earlier_runs_the_one_with_most_in_common_counts_and_of_equal_ones_the_last(run, tmp_path):
    run("paste", "a.txt", "b.txt")
    for text in ("1", "2"):
        (tmp_path / "b.txt").write_text(text)
        run("paste", "a.txt", "b.txt")
    second = differences.short(Checksum.of_file("b.txt"))
    run("-c", "paste -s a.txt b.txt")
    (tmp_path / "b.txt").write_text("3")
    said = run("--why", "paste", "a.txt", "b.txt", code=1)
    assert "file 'b.txt': was %s" % second in said and "code" not in said and "a.txt" not in said
    (tmp_path / "a.txt").write_text("another")
    said = run("--why", "paste", "a.txt", "b.txt", code=1)
    assert "file 'b.txt': was %s" % second in said and "code" not in said and "file 'a.txt': was" in said


def test_a_result_whose_bytes_are_gone_is_said_to_be_gone(run, store):
    run("sort", "a.txt")
    os.unlink(store.path(Checksum.of(b"alpha\nbeta\n")) or "")
    said = run("--why", "sort", "a.txt", code=1)
    assert "it ran before, and its result is" in said and "not in the store any more" in said


def test_the_file_of_a_captured_result_that_is_gone_is_named(run, store):
    run("-c", "cat a.txt > out1.txt; sort -r a.txt > out2.txt")
    os.unlink(store.path(Checksum.of(b"beta\nalpha\n")))
    said = run("--why", "-c", "cat a.txt > out1.txt; sort -r a.txt > out2.txt", code=1)
    assert "1 of the 1 parts" in said and "'out2.txt'" in said


@pytest.mark.parametrize("again", [("--undo", "sort", "a.txt"), None], ids=["undone", "failed"])
def test_what_was_begun_but_has_no_result_is_said_to_be_so(run, again):
    command = ("sort", "a.txt")
    if again:
        run(*command)
        run(*again)
    else:
        command = ("-c", "cat a.txt; false")
        run(*command, code=1)
    assert "this very transformation is in the store, but has no result" in run("--why", *command, code=1)


def test_a_result_in_another_project_and_stage_is_found(run, tmp_path, home):
    (home / ".seamless").mkdir(exist_ok=True)
    (home / ".seamless/clusters.yaml").write_text(
        "local:\n  frontends:\n    - hashserver: {bufferdir: %s/b}\n      database: {database_dir: %s/r}\n" % (tmp_path, tmp_path))
    (tmp_path / "seamless.yaml").write_text("- cluster: local\n- project: one\n- execution: process\n- stage late:\n    - nparallel: 2\n")
    run("--project", "two:sub", "--stage", "late", "sort", "a.txt")
    said = run("--why", "sort", "a.txt", code=1)
    assert "has a result in project 'two:sub', stage 'late'" in said


def test_the_search_ends_in_time_and_says_so(run, monkeypatch):
    run("sort", "a.txt")
    monkeypatch.setattr(why, "SEARCH_S", -1)
    assert "no earlier run of this command was found (runs looked at: the latest 0)" in run("--why", "-c", "sort -r a.txt", code=1)


def test_a_long_history_is_searched_to_its_end_and_beyond_irreproducible_runs(run, store, home):
    run("paste", "a.txt", "b.txt")
    table = ResultTable(store.directory + "/seamless.db")
    [(_, first)] = table.recent()
    table.put(first, "f" * 64)
    table.put_many([(Checksum.of(b"%d" % n), "0" * 64, None) for n in range(2500)])
    table.close()
    assert "nearest earlier run, %s" % first in run("--why", "-c", "paste -s a.txt b.txt", code=1)


def test_damaged_and_foreign_rows_are_passed_over(run, store):
    run("sort", "a.txt")
    junk = store.put_many([b'{"__language__": "bash", "code": ["text", null, [7]]}', b'{"__language__": "bash"}', b'["bash"]', b'"bash', b'{"bash": {}}',
                           b'{"__language__": "bash", "code": ["text", null, "%s"], "x": [1, 2, {}]}' % (b"a" * 64)])
    table = ResultTable(store.directory + "/seamless.db")
    table.put_many([(name, "0" * 64, None) for name in junk])
    table.close()
    assert "+ sort -r a.txt" in run("--why", "-c", "sort -r a.txt", code=1)


def test_options_that_exclude_each_other_are_refused(run):
    run("--why", "--undo", "sort", "a.txt", code=2)


def test_a_hit_imports_nothing_that_explaining_needs(tmp_path, run, home):
    run("sort", "a.txt")
    code = ("import sys; sys.argv = ['seamless-run', 'sort', 'a.txt']; from seamless_lite import cmd_run; cmd_run.main()\n"
            "print({name for name in sys.modules if name.split('.')[-1] in ('why', 'verify', 'differences', 'fingertip', 'difflib')})")
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(why.__file__))},
                         stdout=subprocess.PIPE, check=True, timeout=60)
    assert out.stdout.endswith(b"set()\n")


def test_with_services_elsewhere_runs_are_found_through_them(run, tmp_path, monkeypatch):
    from seamless_lite.hashserver import HashService
    table = ResultTable(tmp_path / "far" / "seamless.db")
    table.write(lambda db: None)
    services = [start(service, Listen(host="127.0.0.1")) for service in (HashService(Folder(tmp_path / "far")), DatabaseService(table))]
    urls = [service.address for service in services]
    monkeypatch.setenv("SEAMLESS_REMOTE_CLIENTS", json.dumps({
        "buffer": [{"readonly": False, "remote_url": urls[0]}], "database": [{"readonly": False, "remote_url": urls[1]}]}))
    run("--var", "N=3", "-c", "cat a.txt; echo $N")
    said = run("--why", "--var", "N=4", "-c", "cat a.txt; echo $N", code=1)
    assert "variable 'N': was '3', is '4'" in said
    for service in services:
        service.stop()


# --- functions --------------------------------------------------------------------------------------------

def test_arguments_of_a_function_are_shown_with_their_values(session):
    @delayed
    def scaled(x, factor):
        return x * factor
    assert "no earlier run of this function" in str(scaled(2, 3).why())
    scaled(2, 3).run()
    found = scaled(2, 3).why()
    assert found.hit and str(found).startswith("hit: ")
    found = scaled(2, 4).why()
    assert not found.hit and found.nearest == scaled(2, 3).transformation_checksum
    assert found.lines[2:] == ("  argument 'factor': was 3, is 4",) and repr(found) == str(found)


def test_code_celltypes_globals_and_modules_of_a_function_are_compared(session):
    first, second = types.ModuleType("own"), types.ModuleType("own")

    def define(factor, text):
        names = {}
        path = os.path.join(os.environ["HOME"], "f%d.py" % factor)
        with open(path, "w") as file:
            file.write("def f(x):\n    y = x\n    return y * %d\n" % factor)
        with open(path) as file:
            exec(compile(file.read(), path, "exec"), names)
        function = delayed(names["f"])
        function.modules.own = {"code": text, "language": "python", "type": "interpreted"}
        function.globals.LIMIT = factor
        return function
    assert first is not second
    define(2, "def g():\n    return 1\n")(5).run()
    changed = define(3, "def g():\n    return 2\n")
    said = str(changed(5).why())
    assert "line 3:\n    -     return y * 2\n    +     return y * 3" in said
    assert "module 'own':\n    line 2:\n    -     return 1\n    +     return 2" in said
    assert "globals:" in said and "- LIMIT = 2" in said and "+ LIMIT = 3" in said
    same = define(2, "def g():\n    return 1\n")
    same.celltypes.x = "int"
    same.celltypes.result = "int"
    said = str(same(5).why())
    assert "argument 'x', celltype: was mixed, is int" in said and "result: was mixed, is int" in said


def test_dependencies_without_a_result_are_explained_instead(session):
    @delayed
    def first(a):
        return a + 1

    @delayed
    def second(b):
        return b + 1
    first(1).run()
    found = second(first(2)).why()
    assert not found.hit and "argument 'a': was 1, is 2" in str(found) and "\nfirst " in str(found)
    assert "no earlier run" in str(second(first(1)).why())
    second(first(1)).run()
    assert second(first(1)).why().hit
    first(2).run()
    assert "argument 'b': was 2, is 3" in str(second(first(2)).why())


def test_another_function_is_not_an_earlier_run_of_this_one(session):
    @delayed
    def one(x):
        return x * 2 + 1

    @delayed
    def two(x):
        return [x, x, "something else"]
    one(1).run()
    assert two(1).why().nearest is None


# --- listing what has run ---------------------------------------------------------------------------------

@pytest.fixture(params=["memory", "table", "service", "layers"])
def results(request, tmp_path):
    table = ResultTable(tmp_path / "seamless.db")
    if request.param == "service":
        running = start(DatabaseService(table), Listen(socket_path=str(tmp_path / "s")))
        yield DatabaseClient(running.address)
        running.stop()
    else:
        yield {"memory": MemoryResults(), "table": table, "layers": LayeredResults(table, [MemoryResults()])}[request.param]
    table.close()


def test_what_has_run_is_listed_in_pages_the_last_first(results):
    names = [Checksum.of(b"%d" % n) for n in range(2345)]
    assert not results.recent()
    for start_ in range(0, len(names), 1000):
        results.put_many([(name, "1" * 64, None) for name in names[start_:start_ + 1000]])
    results.put(names[7], "2" * 64, again=True)             # irreproducible from now on
    found, page = [], results.recent()
    while page:
        assert len(page) <= 1000
        found += [name for _, name in page]
        page = results.recent(page[-1][0])
    assert list(dict.fromkeys(found)) == names[:7:-1] + names[6::-1] + [names[7]]
