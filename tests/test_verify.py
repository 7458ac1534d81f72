"""Results that are computed again and compared: ``seamless-run --verify`` and ``Transformation.verify()``."""
import gzip
import json
import os

import pytest

from seamless_lite import cmd_run, config, delayed, differences
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, JobError
from seamless_lite.folder import Folder
from seamless_lite.resulttable import ResultTable


@pytest.fixture
def run(tmp_path, monkeypatch, capfdbinary):
    """Runs ``seamless-run`` in this process, in a folder with a.txt; returns its output as text.  ``run.err``: the rest."""
    (tmp_path / "a.txt").write_text("alpha\nbeta\n")
    (tmp_path / "counter").write_text("")
    monkeypatch.chdir(tmp_path)

    def call(*argv, code=0):
        capfdbinary.readouterr()
        found = cmd_run.main([str(word) for word in argv])
        out, err = capfdbinary.readouterr()
        call.err = err.decode()
        assert found == code and b"Traceback" not in err, err
        return out.decode()
    return call


@pytest.fixture
def store(home):
    return Folder(home / ".seamless" / "cache" / "__TOPLEVEL__")


def rows(store):
    table = ResultTable(store.directory + "/seamless.db")
    found = table.query('SELECT * FROM "transformation"'), table.query('SELECT * FROM "meta_data"')
    table.close()
    return found


def damage(store, data):
    """Change one byte of what is stored of ``data``."""
    path = store.path(Checksum.of(data))
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(bytes([data[0] ^ 1]))


def changing(tmp_path):
    """A shell word that has another value each time."""
    return "$(echo x >> %s/counter; wc -l < %s/counter | tr -d ' ')" % (tmp_path, tmp_path)


# --- commands ---------------------------------------------------------------------------------------------

def test_a_command_that_gives_the_same_again_really_ran_and_changed_nothing_that_is_stored(run, tmp_path, store):
    command = "sort a.txt; echo ran | tee -a %s/log > /dev/null" % tmp_path
    run("-c", command)
    before = rows(store)
    said = run("--verify", "-c", command)
    assert said.startswith("equal: ") and Checksum.of(b"alpha\nbeta\n") in said
    assert (tmp_path / "log").read_text() == "ran\nran\n" and rows(store) == before


def test_the_line_of_the_output_that_differs_is_shown_and_both_results_are_kept(run, tmp_path, store):
    command = "cat a.txt; echo %s" % changing(tmp_path)
    run("-c", command)
    said = run("--verify", "-c", command, code=1)
    assert said.startswith("different: ") and said.endswith("  line 3:\n  - 1\n  + 2\n")
    assert store.has([Checksum.of(b"alpha\nbeta\n1\n"), Checksum.of(b"alpha\nbeta\n2\n")]) == [True, True]


def test_a_command_that_gave_another_result_is_irreproducible_from_then_on(run, tmp_path, store):
    command = "cat a.txt; echo %s" % changing(tmp_path)
    run("-c", command)
    run("--verify", "-c", command, code=1)
    assert rows(store) == ([], [])
    table = ResultTable(store.directory + "/seamless.db")
    [(_, transformation), _] = table.recent()
    assert table.irreproducible(transformation) == [Checksum.of(b"alpha\nbeta\n%d\n" % n) for n in (1, 2)]
    table.close()
    assert "irreproducible" in run("--why", "-c", command, code=1)
    run("--verify", "-c", command, code=1)
    assert "is known to be irreproducible (2 results)" in run.err


def test_a_command_that_gives_another_result_because_a_file_of_it_is_damaged_is_irreproducible_too(run, tmp_path, store):
    command = "echo %s > d.txt" % changing(tmp_path)
    run("-c", command)
    damage(store, b"1\n")
    (tmp_path / "d.txt").unlink()
    run("-c", command)
    assert (tmp_path / "d.txt").read_text() == "2\n" and rows(store) == ([], [])
    assert "it is irreproducible" in run("--why", "-c", command, code=1)


def test_of_captured_files_and_directories_those_that_differ_are_named(run, tmp_path, store):
    command = "cat a.txt > same; mkdir d; cat a.txt > d/same; echo %s > d/other; echo %s > out; [ -s out ]" % (
        changing(tmp_path), changing(tmp_path))
    options = ("--capture", "same", "--capture", "d", "--capture", "out", "-c", command)
    run(*options)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    said = run("--verify", *options, code=1)
    assert "'d/other': was" in said and "'out': was" in said and "same" not in said
    files["counter"] = (tmp_path / "counter").read_bytes()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files, "results here were touched"


def test_without_a_known_result_nothing_runs(run, tmp_path):
    assert run("--verify", "-c", "cat a.txt; echo ran | tee -a %s/log > /dev/null" % tmp_path, code=1) == ""
    assert "there is no result of transformation" in run.err and not (tmp_path / "log").exists()


def test_a_result_of_which_only_the_checksum_is_known_is_compared_too(run, store):
    run("--scratch", "sort", "a.txt")
    assert store.get(Checksum.of(b"alpha\nbeta\n")) is not None     # the input has the same content
    run("--scratch", "-c", "sort -r a.txt")
    assert store.get(Checksum.of(b"beta\nalpha\n")) is None
    assert run("--verify", "-c", "sort -r a.txt").startswith("equal")


def test_inputs_that_are_not_in_the_store_any_more_or_damaged_are_stored_again(run, store, tmp_path):
    run("wc", "-l", "a.txt")
    os.unlink(store.path(Checksum.of(b"alpha\nbeta\n")))
    assert run("--verify", "wc", "-l", "a.txt").startswith("equal")
    damage(store, b"alpha\nbeta\n")
    assert run("--verify", "wc", "-l", "a.txt").startswith("equal")
    damage(store, b"alpha\nbeta\n")
    assert run("-c", "sort -r a.txt") == "beta\nalpha\n"
    (tmp_path / "d").mkdir()
    (tmp_path / "d/b.txt").write_text("beta\n")
    for n in (1, 2):
        assert run("-g2", "-i", "d", "-c", "cat d/b.txt; : %d" % n) == "beta\n"
        damage(store, b"beta\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"gamma\n"))
    for n in (1, 2):
        assert run("-c", "zcat c.txt.gz | rev | rev; : %d" % n) == "gamma\n"
        damage(store, b"gamma\n")


def test_a_command_that_fails_now_is_an_error_and_its_result_stays(run, tmp_path, store):
    command = "cat a.txt; [ ! -e %s/stop ]" % tmp_path
    run("-c", command)
    before = rows(store)
    (tmp_path / "stop").write_text("")
    run("--verify", "-c", command, code=1)
    assert "failed" in run.err or "exit" in run.err
    assert rows(store) == before


# --- functions --------------------------------------------------------------------------------------------

@pytest.fixture(params=["process", "spawn"])
def session(request, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_state", config._State())
    (tmp_path / "seamless.yaml").write_text("- execution: %s\n" % request.param)
    config.init(workdir=str(tmp_path))
    yield config.session()
    config._state.close()


@pytest.mark.parametrize("session", ["process", pytest.param("spawn", marks=pytest.mark.slow)], indirect=True)
def test_a_function_is_compared_with_hints_at_what_differs(session, tmp_path):
    @delayed
    def steady(a):
        return {"a": a}

    @delayed
    def restless(path):
        with open(path, "a+") as file:
            file.write("x")
        with open(path) as file:
            n = len(file.read())
        return {"n": n, "same": [1, 2], "list": [0] * n, "text": "one\ntwo %d\n" % n, str(n): 0}
    with pytest.raises(CacheMissError, match="no result"):
        steady(1).verify()
    steady(1).run()
    verdict = steady(1).verify()
    assert verdict and verdict.recorded == verdict.computed == steady(1).compute() and str(verdict).startswith("equal")
    job = restless(str(tmp_path / "count"))
    assert job.run()["n"] == 1
    verdict = job.verify()
    said = str(verdict)
    assert not verdict and verdict.recorded != verdict.computed
    assert json.loads(session.get_buffer(verdict.computed))["n"] == 2
    assert "['n']: was 1, is 2" in said and "['list']: 1 items, and 2 now" in said and "['text']: + two 2" in said
    assert "key '2': is new" in said and "key '1': is not there any more" in said and "same" not in said
    for n in (3, 4):                            # known to be irreproducible: it runs each time, and all say so
        assert restless(str(tmp_path / "count")).run()["n"] == n
    assert "irreproducible" in str(restless(str(tmp_path / "count")).why())
    with pytest.raises(CacheMissError, match="irreproducible"):
        restless(str(tmp_path / "count")).verify()


@pytest.mark.parametrize("session", ["process"], indirect=True)
@pytest.mark.parametrize("ask", ["why", "verify"])
def test_who_hears_that_another_program_has_found_a_function_to_be_irreproducible_sees_it_run_again(session, ask):
    @delayed
    def same():
        return 1
    session.stores.results.put(same().transformation_checksum, same().compute(), again=True)
    session.stores.results.put(same().transformation_checksum, "2" * 64, again=True)
    if ask == "why":
        assert "irreproducible" in str(same().why())
    else:
        with pytest.raises(CacheMissError, match="irreproducible"):
            same().verify()
    assert session.lookup(same()._recipe) is None


def test_the_arguments_of_a_function_may_be_other_computations(session):
    @delayed
    def one(a):
        return a + 1

    @delayed
    def two(b):
        return b * 2
    job = two(one(3))
    job.run()
    assert two(one(3)).verify()

    @delayed
    def bad(a):
        raise ValueError(a)
    with pytest.raises(JobError):
        two(bad(1)).verify()


def test_elements_of_arrays_that_differ_are_counted():
    numpy = pytest.importorskip("numpy")
    old = numpy.array([1.0, 2.0, numpy.nan, 4.0])
    new = numpy.array([1.0, 2.5, numpy.nan, 4.0])
    assert differences.of_values(old, new) == ["1 of 4 elements of the array differ, by up to 0.5"]
    assert "shape (4,), is one of float64 with the shape (2,)" in differences.of_values(old, old[:2])[0]
    assert "float32" in differences.of_values({"a": old}, {"a": old.astype("float32")})[0]
    assert differences.of_values({"a": old, "b": 1}, {"a": old.copy(), "b": 2}) == ["['b']: was 1, is 2"]


def test_bytes_that_are_no_text_are_compared_by_position():
    assert differences.of_bytes(b"\xff" * 1000 + b"a", b"\xff" * 1000 + b"bc") == [
        "1001 bytes, and 1002 now; the first that differs is number 1001"]
    assert "number 4" in differences.of_bytes(b"\xff12", b"\xff12\n")[0]


def test_of_long_texts_the_first_line_that_differs_is_shown_quickly():
    old = "".join("%d\n" % n for n in range(50000))
    lines = differences.of_lines(old, old.replace("\n40000\n", "\nnew\nmore\n"))
    assert lines == ["line 40001 is the first of 50001 that differs (50000 before)", "- 40000", "+ new"]
    assert differences.of_lines("a\n", "a") == ["only the ends of lines"]
