"""Buffers that no store has are made again where they are needed: real sessions, each like a program of its own."""
import contextlib
import os
import pathlib
import threading
import time

import pytest

from seamless_lite import fingertip
from seamless_lite.celltypes import serialize
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, SeamlessError
from seamless_lite.jobs import Asker
from seamless_lite.jobserver import JobServer
from seamless_lite.session import Session
from seamless_lite.settings import load_settings
from seamless_lite.stores import open_stores
from seamless_lite.transformation import Job, Meta, Recipe, Request

from test_end_to_end import lab as processes       # noqa: F401 (fixture)

SCRATCH = Meta(scratch=True)


class Lab:
    """A store, and sessions on it; ``runs`` tells which functions ran."""

    def __init__(self, folder):
        self.folder, self.log = folder, str(folder / "log")
        self.settings = load_settings(str(folder), environ={"SEAMLESS_CACHE": str(folder / "cache")})

    @contextlib.contextmanager
    def program(self, **options):
        with contextlib.closing(Session(self.settings, who=None, **options)) as session:
            yield session

    def recipe(self, source, output="mixed", **inputs):
        """(recipe, buffers) of a function: inputs are values, or a (checksum, celltype) of one."""
        buffers, pins = {}, {}

        def pin(name, value, celltype, sub=None):
            data = serialize(value, celltype)
            buffers[Checksum.of(data)] = data
            pins[name] = (celltype, sub, Checksum.of(data))
        pin("code", source, "python", "transformer")
        for name, value in {**inputs, "log": self.log}.items():
            if isinstance(value, tuple):
                pins[name] = (value[1], None, value[0])
            else:
                pin(name, value, "mixed")
        return Recipe("python", pins, ("result", output, None)), buffers

    def run(self, session, source, meta=Meta(), output="mixed", **inputs):
        recipe, buffers = self.recipe(source, output, **inputs)
        return recipe, session.run(recipe, meta, buffers)

    def runs(self):
        text = open(self.log).read() if os.path.exists(self.log) else ""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)
        return text


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def function(name, expression, parameters):
    return "def %s(%s, log):\n    with open(log, 'a') as file:\n        file.write(%r)\n    return %s\n" % (name, parameters, name, expression)


A, B, C = function("a", "'x' * n", "n"), function("b", "text + text", "text"), function("c", "len(text) + more", "text, more")


def make_chain(lab, size=10):
    """b(a(size)), both scratch; returns their checksums.  As an input of b, the result of a was stored: that is undone."""
    with lab.program() as session:
        _, first = lab.run(session, A, SCRATCH, n=size)
        _, second = lab.run(session, B, SCRATCH, text=(first.result, "mixed"))
        os.unlink(session.store.path(first.result))
    assert lab.runs() == "ab"
    return first.result, second.result


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_chain_of_scratch_results_is_made_again_for_a_job_of_another_program(lab, size, options):
    first, second = make_chain(lab, size)
    with lab.program(**options) as session:
        assert session.store.has([first, second]) == [False, False]
        _, outcome = lab.run(session, C, text=(second, "mixed"), more=1)
        assert outcome.exception() is None and outcome.buffer == b"%d" % (2 * size + 1) + b"\n"
        assert lab.runs() == "abc"
        _, outcome = lab.run(session, C, text=(second, "mixed"), more=2)
        assert lab.runs() == "c"                # it is remembered
    with lab.program() as session:
        assert lab.run(session, C, text=(second, "mixed"), more=1)[1].cached and lab.runs() == ""


def damage(path):
    """Change one byte of a stored buffer."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
@pytest.mark.parametrize("way", ["run", "submit"])
def test_inputs_that_this_process_has_are_stored_again_if_the_store_turns_out_to_lack_them(lab, options, way):
    with lab.program(**options) as session:
        for size in (10, 300_000):
            for more in (1, 2):
                recipe, buffers = lab.recipe(C, text="x" * size, more=more)
                outcome = session.run(recipe, Meta(), buffers) if way == "run" else session.submit(recipe, Meta(), buffers).result(30)
                assert outcome.exception() is None, outcome.exception()
                damage(pathlib.Path(session.store.path(recipe.pins["text"][2])))
        recipe, buffers = lab.recipe(C, text="x" * size, more=1)
        assert session.rerun(recipe, Meta(), buffers).buffer == b"300001\n"


def test_an_input_that_only_another_stage_has_is_brought_and_not_made_again(lab):
    other = load_settings(str(lab.folder), environ={"SEAMLESS_CACHE": str(lab.folder / "other")})
    with lab.program() as first, contextlib.closing(Session(other, who=None, others=lambda: [first])) as session:
        made = lab.run(first, A, n=300_000)[1].result
        index = first.store.put(serialize({"text": made}, "plain"))
        deep = function("c", "len(data['text']) + more", "data, more")
        for more in (1, 2):
            assert lab.run(session, C, text=(made, "mixed"), more=more)[1].exception() is None
            os.unlink(session.store.path(made))
            assert lab.run(session, deep, data=(index, "folder"), more=more)[1].exception() is None
            os.unlink(session.store.path(made))
    assert lab.runs() == "acccc"


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
@pytest.mark.parametrize("fresh", [False, True])
def test_who_joins_a_scratch_run_and_is_not_scratch_has_the_bytes_kept(lab, options, fresh):
    with lab.program(**options) as session:
        recipe = command(lab, session, "touch %s; while test ! -e %s2; do sleep 0.01; done; echo 1 > RESULT" % (lab.log, lab.log))
        first = session.submit(recipe, Meta(scratch=True, fresh=fresh))
        while not os.path.exists(lab.log):
            time.sleep(0.01)
        second = session.submit(recipe)
        (lab.folder / "log2").touch()
        assert first.result(20).result == second.result(20).result == Checksum.of(b"1\n") and first is second
        assert session.store.has([Checksum.of(b"1\n")]) == [True] and not session._kept


def test_a_result_whose_bytes_are_gone_and_that_is_another_one_now_is_not_remembered(lab):
    (lab.folder / "log2").write_text("1")
    source = function("a", "open(log + '2').read()", "n")
    with lab.program() as session:
        os.unlink(session.store.path(lab.run(session, source, n=1)[1].result))
    for way in ("run", "submit"):               # the second time there are two results in the table
        with lab.program() as session:
            (lab.folder / "log2").write_text(way)
            for _ in range(2):
                recipe, buffers = lab.recipe(source, n=1)
                outcome = session.run(recipe, Meta(), buffers) if way == "run" else session.submit(recipe, Meta(), buffers).result(20)
                assert not outcome.cached
            session.forget(recipe.checksum)
            os.unlink(session.store.path(lab.run(session, source, n=1)[1].result))


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
def test_a_result_that_was_remembered_before_another_one_came_out_is_forgotten(lab, options):
    (lab.folder / "log2").write_text("before")
    source = function("a", "open(log + '2').read()", "n")
    with lab.program() as session:
        recipe, outcome = lab.run(session, source, SCRATCH, n=1)
    (lab.folder / "log2").write_text("after")
    with lab.program(**options) as session:
        assert session.lookup(recipe, value=False).result == outcome.result
        now = lab.run(session, source, n=1)[1].result
        assert now == Checksum.of(serialize("after", "mixed")) and len(session.stores.results.irreproducible(recipe.checksum)) == 2
        assert session.lookup(recipe, value=False) is None and not lab.run(session, source, n=1)[1].cached


def test_a_leaf_that_is_gone_while_its_index_is_in_memory_makes_the_result_run_again(lab):
    source = function("a", "{'one': n}", "n")
    with lab.program() as session:
        recipe, outcome = lab.run(session, source, output="deepcell", n=5)
        os.unlink(session.store.path(Checksum.of(b"5\n")))
        assert session.lookup(recipe) is not None           # as far as this process remembers
        session.doubt(recipe.checksum, outcome.result)
        assert session.lookup(recipe) is None and not lab.run(session, source, output="deepcell", n=5)[1].cached


def test_many_jobs_that_lack_the_same_input_have_it_made_once(lab):
    _, second = make_chain(lab)
    with lab.program() as session:
        made = [lab.recipe(C, text=(second, "mixed"), more=n) for n in range(50)]
        futures = session.submit_many([Request(recipe, Meta(), buffers) for recipe, buffers in made])
        outcomes = [session.wait(recipe.checksum, future, 30) for (recipe, _), future in zip(made, futures)]
        assert [outcome.buffer for outcome in outcomes] == [b"%d\n" % (20 + n) for n in range(50)]
    assert sorted(lab.runs()) == sorted("ab" + 50 * "c")


def test_a_buffer_that_is_gone_from_the_store_counts_as_scratch(lab):
    with lab.program() as session:
        _, first = lab.run(session, A, n=10)
        os.unlink(session.store.path(first.result))
        lab.runs()
    with lab.program() as session:
        fingertip.make(session, first.result)
        assert session.get_buffer(first.result) == serialize("x" * 10, "mixed")
    assert lab.runs() == "a"


def test_a_deep_result_is_made_again_if_the_index_or_a_leaf_is_gone(lab):
    source = function("a", "{'one': n, 'two': n + 1}", "n")
    reader = function("c", "sorted(data)", "data")
    with lab.program() as session:
        index = lab.run(session, source, SCRATCH, output="deepcell", n=5)[1].result
    for celltype, gone in (("deepcell", index), ("folder", Checksum.of(b"6\n")), ("folder", index)):
        with lab.program() as session:
            os.unlink(session.store.path(gone))
            lab.runs()
            _, outcome = lab.run(session, reader + "# %s %s" % (gone, celltype), data=(index, celltype))
            assert outcome.exception() is None, outcome.exception()
            assert lab.runs() == "ac" and session.store.has([gone]) == [True]


def test_something_else_is_an_error_that_names_the_transformation_and_is_recorded(lab):
    source = function("a", "open(log + '2').read()", "n")
    (lab.folder / "log2").write_text("before")
    with lab.program() as session:
        recipe, outcome = lab.run(session, source, SCRATCH, n=1)
    lab.runs()
    (lab.folder / "log2").write_text("after")
    with lab.program() as session:
        consumer, failed = lab.run(session, B, text=(outcome.result, "mixed"))
        error = failed.exception()
        assert isinstance(error, CacheMissError)
        now = Checksum.of(serialize("after", "mixed"))
        for part in (consumer.checksum, "'text'", "transformation %s made %s, but when it ran again it made %s" % (
                recipe.checksum, outcome.result, now), "irreproducible"):
            assert part in str(error)
        results = session.stores.results
        assert results.get(recipe.checksum) is None and results.irreproducible(recipe.checksum) == [outcome.result, now]
        assert session.store.has([outcome.result, now]) == [False, False] and session.supply.held(outcome.result) is None
        assert results.get(consumer.checksum) is None
    assert lab.runs() == "a"
    with lab.program() as session:                      # it runs each time
        for _ in range(2):
            session.doubt(recipe.checksum)
            assert not lab.run(session, source, n=1)[1].cached
    assert lab.runs() == "aa"


def test_the_second_transformation_that_made_it_is_tried_when_the_first_fails(lab):
    (lab.folder / "log2").write_text("xx")
    with lab.program() as session:
        first = lab.run(session, function("a", "open(log + '2').read()", "n"), SCRATCH, n=1)[1]
        second = lab.run(session, function("b", "'xx'", "n"), SCRATCH, n=1)[1]
        assert first.result == second.result
    os.unlink(lab.folder / "log2")
    lab.runs()
    with lab.program() as session:
        fingertip.make(session, first.result)
        assert session.get_buffer(first.result) == serialize("xx", "mixed")
    assert lab.runs().endswith("b")


def test_what_is_needed_to_make_itself_is_an_error_and_no_endless_search(lab):
    with lab.program() as session:
        x, y = Checksum.of(b"no such buffer"), Checksum.of(b"nor this one")
        for source, made, needed in ((A, x, y), (B, y, x)):
            recipe, buffers = lab.recipe(source, n=(needed, "mixed"))
            session.store.put_many([recipe.buffer, *buffers.values()])
            session.stores.results.put(recipe.checksum, made)
        with pytest.raises(CacheMissError, match="needed to make itself"):
            fingertip.make(session, x)
    assert lab.runs() == ""


def test_a_long_chain_is_followed_and_a_longer_one_is_an_error(lab, monkeypatch):
    step = function("s", "n + 1", "n")
    with lab.program() as session:
        value = lab.run(session, step, SCRATCH, n=0)[1].result
        for _ in range(60):
            before, value = value, lab.run(session, step, SCRATCH, n=(value, "mixed"))[1].result
            os.unlink(session.store.path(before))
    lab.runs()
    monkeypatch.setattr(fingertip, "MOST_LEVELS", 50)
    with lab.program() as session, pytest.raises(CacheMissError, match="more than 50 transformations"):
        fingertip.make(session, value)
    monkeypatch.undo()
    with lab.program() as session:
        fingertip.make(session, value)
        assert session.get_buffer(value) == b"61\n"
    assert lab.runs() == 61 * "s"


def test_why_it_cannot_be_made_is_said(lab):
    unknown = Checksum.of(b"somebody else's")
    with lab.program() as session:
        with pytest.raises(CacheMissError, match="no transformation that makes it is known"):
            fingertip.make(session, unknown)
        _, outcome = lab.run(session, B, text=(unknown, "mixed"))
        assert "'text'" in str(outcome.exception()) and unknown in str(outcome.exception())
        first = lab.run(session, A, SCRATCH, n=1)
        second = lab.run(session, B, SCRATCH, text=(first[1].result, "mixed"))[1].result
        for gone in (first[0].checksum, first[1].result):       # the transformation, and what it made
            os.unlink(session.store.path(gone))
    with lab.program() as session:
        with pytest.raises(CacheMissError, match="which made %s, lacks an input: buffer %s" % (second, first[1].result)):
            fingertip.make(session, second)


def test_a_recomputation_neither_looks_up_nor_records(lab):
    (lab.folder / "log2").write_text("before")
    source = function("a", "open(log + '2').read() + str(n)", "n")
    for options in ({}, {"workers": 1}):
        with lab.program() as session:
            recipe, outcome = lab.run(session, source, n=len(options))
        (lab.folder / "log2").write_text("after")
        with lab.program(**options) as session:
            again = session.rerun(recipe)
            assert not again.cached and again.buffer == serialize("after%d" % len(options), "mixed") and again.result != outcome.result
            assert session.stores.results.get(recipe.checksum) == outcome.result
            assert session.store.has([again.result]) == [False]
            assert session.lookup(recipe).result == outcome.result
        (lab.folder / "log2").write_text("before")


def test_a_job_that_is_wanted_while_it_is_recomputed_runs_after_that_and_is_recorded_unless_it_is_strict_and_another(lab):
    source = "def slow(n, log):\n    import os, time\n    open(log, 'a').write('s')\n    while not os.path.exists(log + '2'):\n" \
             "        time.sleep(0.01)\n    return n\n"
    recipe, buffers = lab.recipe(source, n=7)
    spec = Session(lab.settings).stores_spec
    server = JobServer(1, open_stores(spec), spec)
    try:
        def ask(token, **meta):
            return server.jobs.ask(Asker("me", token, None, False), [Job(recipe, Meta(**meta), buffers).to_dict()])
        ask("one", scratch=True, fresh=True)
        while not os.path.exists(lab.log):
            time.sleep(0.01)
        _, broken = ask("two", strict=True, metavars={"V": "1"})
        assert "--strict" in broken[recipe.checksum]["error"]["message"]
        entries, broken = ask("three", strict=True)
        (lab.folder / "log2").touch()
        assert server.jobs.wait(entries, 20) and not broken
        result = entries[0].outcome["result"]
        assert server.jobs.stores.results.get(recipe.checksum) == result and server.jobs.stores.buffers.has([result]) == [True]
    finally:
        server.close()
    assert lab.runs() == "ss"


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
@pytest.mark.slow
def test_of_two_programs_that_run_the_same_at_the_same_moment_the_first_result_stays(lab, options, caplog):
    source = function("a", "__import__('time').sleep(0.5) or __import__('os').urandom(9).hex()", "n")
    with lab.program(**options) as one, lab.program(**options) as other:
        recipe, buffers = lab.recipe(source, n=1)
        outcomes = []
        threads = [threading.Thread(target=lambda session=session: outcomes.append(session.run(recipe, Meta(), buffers)))
                   for session in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        results = {outcome.result for outcome in outcomes}
        assert len(results) == 2 and lab.runs() == "aa"
        assert one.stores.results.get(recipe.checksum) in results and not one.stores.results.irreproducible(recipe.checksum)
    with lab.program(**options) as session:
        assert lab.run(session, source, n=1)[1].cached
        os.unlink(session.store.path(session.stores.results.get(recipe.checksum)))
    with lab.program(**options) as session:             # it is known, and made again
        lab.run(session, source, n=1)
        assert len(session.stores.results.irreproducible(recipe.checksum)) == 2


def test_a_dependency_that_makes_something_else_now_is_named(processes):        # noqa: F811
    code = """
        import seamless_lite.config as config
        from seamless_lite import delayed
        config.init()
        @delayed
        def now():
            return open("%s").read()
        @delayed
        def twice(text, n):
            return n * text
        now.scratch = True
        dependency = now()
        tf = twice(dependency, %%d)
        print(tf.compute(), tf.exception and tf.exception.args[0], dependency.transformation_checksum)
        """ % (processes.work / "file")
    processes.configure("- project: my-project\n- execution: process\n")
    (processes.work / "file").write_text("one")
    assert "None" in processes.python(code % 1)
    for path in (processes.home / "buffers").rglob("??/*"):
        if path.is_file() and path.read_bytes() == b'"one"\n':
            path.unlink()                       # as the input of a job it was stored
    (processes.work / "file").write_text("two")
    words = processes.python(code % 2).split()
    assert words[:5] == ["None", "transformation", words[-1], "is", "irreproducible:"]


def command(lab, session, text, **inputs):
    """The recipe of a command; what it needs is stored."""
    pins = {name: ("bytes", None, checksum) for name, checksum in inputs.items()}
    return Recipe("bash", {"code": ("text", None, session.store.put(text.encode())), **pins}, ("result", "bytes", None))


def test_a_command_whose_variables_are_not_known_keeps_its_result_and_one_that_this_session_ran_gets_them_again(lab):
    variables = Meta(metavars={"V": "1"})
    with lab.program() as session:
        maker = command(lab, session, 'echo "v=${META__V-none}" > RESULT')
        result = session.run(maker, variables).result
        os.unlink(session.store.path(result))
        session.supply.recent = type(session.supply.recent)()
        first = session.run(command(lab, session, "cat x x x > RESULT", x=result))
        assert first.exception() is None and first.buffer == 3 * b"v=1\n"
        os.unlink(session.store.path(result))
    with lab.program() as session:
        consumer = command(lab, session, "cat x x > RESULT", x=result)
        error = str(session.run(consumer).exception())
        for part in (maker.checksum, result, Checksum.of(b"v=none\n"), "--metavar", "conda environment"):
            assert part in error
        assert session.stores.results.get(maker.checksum) == result
        assert session.stores.results.irreproducible(maker.checksum) == []


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=["in process", "workers"])
@pytest.mark.parametrize("way", ["run", "submit"])
def test_an_input_or_a_leaf_that_only_this_process_remembers_travels_with_the_job(lab, options, way):
    with lab.program(**options) as session:
        def ended(recipe):
            return session.run(recipe) if way == "run" else session.submit(recipe).result(30)
        _, outcome = lab.run(session, A, n=3)
        leaf = session.store.put(serialize(1, "mixed"))
        index = session.store.put(serialize({"one": leaf}, "plain"))
        assert session.supply.get(leaf) and session.supply.get(index) and session.supply.held(outcome.result)
        deep, buffers = lab.recipe(function("c", "data['one']", "data"), data=(index, "folder"))
        session.store.put_many(buffers.values())
        lab.runs()
        for recipe, gone in ((command(lab, session, "cat x > RESULT", x=outcome.result), [outcome.result]), (deep, [index, leaf])):
            for name in gone:
                os.unlink(session.store.path(name))
            assert ended(recipe).exception() is None
        assert lab.runs() == "c"                # nothing was made again


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_job_that_is_cancelled_while_its_input_is_made_again_does_not_run_and_nor_does_what_makes_it(lab, way):
    with lab.program() as session:
        maker = command(lab, session, "echo a >> %s; while test -e %s.wait; do sleep 0.05; done; echo 1 > RESULT" % (lab.log, lab.log))
        result = session.run(maker).result
        os.unlink(session.store.path(result))
        assert lab.runs() == "a\n"
    (lab.folder / "log.wait").touch()
    with lab.program() as session:
        consumer, outcomes = command(lab, session, "cat x > RESULT; echo b >> %s" % lab.log, x=result), []
        thread = threading.Thread(target=lambda: outcomes.append(
            session.run(consumer) if way == "run" else session.submit(consumer).result(20)))
        thread.start()
        while not os.path.exists(lab.log):
            time.sleep(0.01)
        session.cancel(consumer.checksum)
        thread.join(10)
        assert [outcome.error["kind"] for outcome in outcomes] == ["JobCancelledError"]
        assert lab.runs() == "a\n" and session.stores.results.get(consumer.checksum) is None
        assert not session._makers and not session._interest
        os.unlink(lab.folder / "log.wait")
        assert session.run(consumer).exception() is None        # it can be asked for again


def test_a_program_that_can_start_no_thread_says_so_and_goes_on_when_it_can(lab, monkeypatch):
    _, second = make_chain(lab)
    with lab.program() as session:
        recipe, buffers = lab.recipe(C, text=(second, "mixed"), more=1)
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "seamless-fingertip":
                raise RuntimeError("can't start new thread")
            start(thread)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SeamlessError, match="can't start new thread"):
            session.submit(recipe, Meta(), buffers).result(20)
        monkeypatch.undo()
        assert session.submit(recipe, Meta(), buffers).result(20).exception() is None


@pytest.mark.parametrize("way", ["run", "submit"])
def test_what_was_made_again_is_forgotten_when_its_consumers_have_ended_but_not_what_was_asked_for(lab, way):
    first, second = make_chain(lab, 300_000)
    with lab.program() as session:
        recipe, buffers = lab.recipe(C, text=(second, "mixed"), more=1)
        outcome = session.run(recipe, Meta(), buffers) if way == "run" else session.submit(recipe, Meta(), buffers).result(20)
        assert outcome.exception() is None and lab.runs() == "abc"
        end = time.monotonic() + 10
        while session.supply.scratch and time.monotonic() < end:
            time.sleep(0.01)                    # the future is told before
        assert not session.supply.scratch and not session.supply._wanted
        for name in (first, second):
            os.unlink(session.store.path(name))
    with lab.program() as session:
        fingertip.make(session, second)
        assert list(session.supply.scratch) == [second]


def test_a_recomputation_that_is_cancelled_leaves_no_wrong_count(lab):
    with lab.program() as session:
        recipe, _ = lab.run(session, A, n=1)
        for _ in range(2):
            session.cancel(recipe.checksum)
        session.rerun(recipe)
        assert not session._interest


def test_two_inputs_of_which_one_is_made_from_the_other(lab):
    with lab.program() as session:
        first = lab.run(session, A, SCRATCH, n=3)[1].result
        second = lab.run(session, B, SCRATCH, text=(first, "mixed"))[1].result
        os.unlink(session.store.path(first))
    lab.runs()
    with lab.program() as session:
        _, outcome = lab.run(session, function("c", "one + two", "one, two"), one=(first, "mixed"), two=(second, "mixed"))
        assert outcome.exception() is None, outcome.exception()
