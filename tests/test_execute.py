"""Python recipes are executed: values, modules, errors; and nothing of a run is left behind."""
import json
import linecache
import os
import subprocess
import sys
import textwrap
import threading
import types

import pytest
from function_vectors import NUMPY, VECTORS, vector_recipe, write_module

from seamless_lite.celltypes import Buffer, deserialize
from seamless_lite.checksum import Checksum
from seamless_lite.errors import (CacheMissError, CelltypeError, ConfigurationError, JobCancelledError, JobError,
                                  error_from_dict, error_to_dict)
from seamless_lite.execute import execute
from seamless_lite.folder import MemoryBuffers
from seamless_lite.function import build_recipe, python_code, string_code
from seamless_lite.surroundings import children
from seamless_lite.transformation import Meta, Recipe


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(code, celltypes={}, modules={}, globals_={}, meta=Meta(), **arguments):
    """Execute a function or code text; the result's value, read back from the store."""
    code = string_code(textwrap.dedent(code)) if isinstance(code, str) else python_code(code)
    recipe, buffers = build_recipe(code, arguments, celltypes, modules, globals_)
    store = MemoryBuffers()
    store.put_many(buffers.values())
    checksum = execute(recipe, meta, store)
    return deserialize(store.get(checksum), recipe.output[1])


def module(text):
    return {"code": textwrap.dedent(text).strip("\n"), "language": "python", "type": "interpreted"}


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.get("language") != "bash"], ids=lambda vector: vector["id"])
def test_a_vector_gives_the_result_that_seamless_gives(vector, tmp_path, monkeypatch):
    if vector["id"] in NUMPY:
        pytest.importorskip("numpy")
    _, recipe, buffers = vector_recipe(vector, tmp_path, monkeypatch)
    store = MemoryBuffers()
    store.put_many(buffers.values())
    store.put(b"3\n")                                           # the result of "add"
    result = execute(recipe, Meta(), store)
    if vector["id"] == "none-arg":                              # where Seamless fails with a NameError
        assert store.get(result) == b"1\n"
    else:
        assert result == vector["result_checksum"]
        assert store.get(result) == bytes.fromhex(vector["result_buffer_hex"])


# --- kinds of code, values -------------------------------------------------------------------------------

def test_each_kind_of_code_has_its_result():
    assert run("def f(x, y=2):\n    return x + y", x=1) == 3
    assert run("lambda x: x + 1", x=1) == 2
    assert run("[x,\n x + 1]", x=1) == [1, 2]
    assert run("y = x + 1\nresult = y", x=1) == 2
    assert run("# comment\n\ndef f(x):\n    return x\n# end", x=1) == 1
    assert run("import math\ndef half(x):\n    return x / 2\nresult = half(x)", x=1) == 0.5
    assert run("x" + " " * 62 + "#", x=5) == 5                  # 64 characters: no checksum


def test_none_is_an_input_and_annotations_and_mutable_defaults_do_no_harm():
    text = """
        def f(a, b: Undefined = [], *, c: 1 / 0 = None) -> Nothing:
            b.append(1)
            local: Unknown = c
            return [a is None, len(b), local]
        """
    assert run(text, a=None) == [True, 1, None]
    assert run(text, a=None) == [True, 1, None]


def test_pins_arrive_as_the_types_that_seamless_gives():
    def types_of(c, d, f, b, k):
        return [[type(x).__name__ for x in (c["a"], d["p"], f["p"], b, k[0])], f["p"] == b"abc", b.checksum]
    cells = {"c": "deepcell", "d": "deepfolder", "f": "folder", "b": "bytes", "k": "checksum"}
    name = Checksum.of(b"x")
    assert run(types_of, cells, c={"a": 1}, d={"p": b"x"}, f={"p": b"abc"}, b=b"x", k=[name]) == \
        [["Checksum", "Checksum", "bytes", "Buffer", "Checksum"], True, name]


def test_all_leaves_of_a_deep_result_are_stored():
    code = string_code("result = {'a': 1, 'b': ['x']}")
    recipe, buffers = build_recipe(code, {}, {"result": "deepcell"})
    store = MemoryBuffers()
    store.put_many(buffers.values())
    index = deserialize(store.get(execute(recipe, Meta(), store)), "plain")
    assert store.get(index["a"]) == b"1\n" and store.get(index["b"][0]) == b'"x"\n'


def test_a_buffer_given_as_a_result_is_its_bytes():
    assert run(lambda: b"\0\1", {"result": "bytes"}) == Buffer(b"\0\1")


# --- modules and globals ---------------------------------------------------------------------------------

HELPER = module("K = 3\ndef triple(x):\n    return K * x")


def test_a_module_can_be_used_in_every_way_that_seamless_has():
    for text in ("from .helper import triple", "from transformer.helper import triple", "from . import helper\ntriple = helper.triple",
                 "import transformer.helper\ntriple = transformer.helper.triple", "from transformer import helper as h\ntriple = h.triple",
                 "triple = helper.triple"):
        assert run(text + "\nresult = triple(x)", modules={"helper": HELPER}, x=2) == 6, text


def test_modules_and_packages_import_each_other_also_in_circles():
    package = {"type": "interpreted", "language": "python", "code": {
        "__init__": {"code": "from .a import fa"}, "a": {"code": "from . import sub\ndef fa(x): return sub.c.fc(x)"},
        "sub.__init__": {"code": "from . import c"}, "sub.c": {"code": "from .. import a\nfrom ...helper import K\ndef fc(x): return K + x"}}}
    assert run("from .pkg import fa\nresult = [fa(x), pkg.sub.c.fc(1)]", modules={"pkg": package, "helper": HELPER}, x=2) == [5, 4]


def test_a_package_of_one_file_and_a_folder_without_init_work():
    package = {"type": "interpreted", "code": {"__init__": {"code": "from ..helper import K"}, "sub.c": {"code": "from .. import K as L"}}}
    assert run("from .pkg.sub.c import L\nresult = L", modules={"pkg": package, "helper": HELPER}) == 3
    package = {"type": "interpreted", "code": {"__init__": {"code": "from ..helper import K"}}}
    assert run("result = pkg.K", modules={"pkg": package, "helper": HELPER}) == 3


def test_a_main_module_and_globals_together_work():
    assert run("result = [a, b, main.b]", modules={"main": module("a = 1")}, globals_={"b": 2}) == [1, 2, 2]


def lonely(y):
    return y + K + len(Shape.sides(y))          # noqa: F821


class Shape:
    @staticmethod
    def sides(n):
        return range(n)


def test_functions_classes_and_values_among_the_globals_see_each_other():
    assert run("result = alias(x)", globals_={"lonely": lonely, "alias": lonely, "K": 10, "Shape": Shape}, x=2) == 14
    assert run("result = add(x)", globals_={"add": lambda x: x + 1}, x=1) == 2


def test_dataclasses_and_enums_can_be_defined_inside():
    text = """
        from __future__ import annotations
        import dataclasses, enum, pickle
        @dataclasses.dataclass
        class Point:
            x: int
            y: int = 0
        class Colour(enum.Enum):
            RED = 1
        p = pickle.loads(pickle.dumps(Point(3)))
        result = [p.x, p == Point(3), Colour.RED.name, Point.__module__]
        """
    first, second = run(text), run(text)
    assert first[:3] == [3, True, "RED"]
    assert first == second                       # a module's name that leaks into a result is the same every time


def test_two_runs_at_once_do_not_see_each_others_modules():
    barrier = threading.Barrier(2)
    meeting = types.ModuleType("meeting_place")
    meeting.wait = lambda: barrier.wait(20)
    sys.modules["meeting_place"] = meeting
    results = {}

    def job(number):
        text = ("import meeting_place\nmeeting_place.wait()\nfrom transformer import helper\nfrom .helper import K\n"
                "meeting_place.wait()\nimport transformer.other\nresult = [helper.K, K, transformer.other.K, x]")
        mods = {"helper": module("K = %d" % number), "other": module("from .helper import K")}
        results[number] = run(text, modules=mods, x=0)
    threads = [threading.Thread(target=job, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    del sys.modules["meeting_place"]
    assert results == {1: [1, 1, 1, 0], 2: [2, 2, 2, 0]}


def test_the_same_job_can_run_twice_at_once():
    barrier, first_is_done = threading.Barrier(2), threading.Event()
    meeting = types.ModuleType("meeting_place")
    meeting.am_second = lambda: barrier.wait(20) == 1
    meeting.wait_for_first = lambda: first_is_done.wait(20)
    sys.modules["meeting_place"] = meeting
    results = []

    def job():
        text = "import meeting_place\nif meeting_place.am_second(): meeting_place.wait_for_first()\nfrom .helper import K\nresult = K"
        results.append(run(text, modules={"helper": HELPER}))
        first_is_done.set()
    threads = [threading.Thread(target=job) for _ in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    del sys.modules["meeting_place"]
    assert results == [3, 3]


def test_nothing_of_a_run_stays_in_sys_modules():
    run("from .helper import K\nresult = K", modules={"helper": HELPER}, globals_={"a": 1})
    with pytest.raises(JobError):
        run("from .helper import nothing", modules={"helper": HELPER})
    assert [name for name in sys.modules if name.startswith("transformer")] == []


def test_the_lines_of_programs_that_are_forgotten_are_forgotten_too():
    for number in range(300):
        run("result = %d" % number)
    assert len([name for name in linecache.cache if name.startswith("<the code ")]) <= 256


# --- nested transformations ------------------------------------------------------------------------------

def test_inspect_finds_the_source_of_what_is_defined_inside():
    text = """
        import inspect
        def outer():
            def inner(x):
                return x + 1     # seen
            return inner
        class A:
            b = 1
        result = [inspect.getsource(outer()), inspect.getsource(A), inspect.getsource(helper.triple)]
        """
    linecache.clearcache()
    found = run(text, modules={"helper": HELPER})
    assert "# seen" in found[0] and found[1] == "class A:\n    b = 1\n" and found[2].strip() == "def triple(x):\n    return K * x"


NESTED = """
    from seamless_lite.transformer import direct, delayed
    K = 100

    @direct
    def leaf(x):
        return x + K
    leaf.globals.K = K
    leaf.celltypes.x = "int"

    @delayed
    def mid(x):
        from .helper import triple
        return triple(leaf(x))
    mid.globals.leaf = leaf
    mid.modules.helper = {"code": "def triple(x): return 3 * x", "language": "python", "type": "interpreted"}

    def plain(x):
        return mid(x).run()

    def top(n):
        return [plain(i) for i in range(n)] + [add(1), shell(word="hi").run()]

    add = direct(lambda x: x + 1)
    shell = delayed("echo $word > RESULT", "bash")
    shell.celltypes.result = "text"

    @direct
    def fact(n):
        return 1 if n < 2 else n * fact(n - 1)
    fact.globals.fact = fact
    """


def test_transformers_among_the_globals_can_be_called_to_any_depth(tmp_path):
    pytest.importorskip("seamless_lite.transformer")
    m = write_module(tmp_path, "nested_transformers", textwrap.dedent(NESTED))
    assert run(m.top, globals_={"plain": m.plain, "mid": m.mid, "add": m.add, "shell": m.shell}, n=2) == [300, 303, 2, "hi"]
    assert run("result = fact(n)", globals_={"fact": m.fact}, n=5) == 120


def test_a_nested_call_is_the_same_transformation_inside_and_outside(tmp_path):
    pytest.importorskip("seamless_lite.transformer")
    m = write_module(tmp_path, "nested_identity", textwrap.dedent(NESTED))
    inside = run("result = str(mid.transformation(7).construct())", globals_={"mid": m.mid})
    assert inside == str(m.mid(7).construct())


RECURSIVE = """
    from seamless_lite.transformer import direct, delayed
    K = 5

    @delayed
    def nest(n):
        return [] if n == 0 else [str(nest(n - 1).construct())] + nest(n - 1).run()
    nest.globals.nest = nest
    nest.celltypes.n = "int"
    nest.modules.helper = {"type": "interpreted", "code": "x = 1"}

    @direct
    def even(n):
        return n == 0 or odd(n - 1)
    @delayed
    def odd(n):
        '''reaches
    far left'''
        return n != 0 and again(n - 1) if helper(K) else 0   # a comment
        # and another one

    def helper(x):
        return x + 1
        # a comment at the end

    even.globals.odd = direct(odd)
    even.globals.odd.globals.update({"again": even, "K": K, "helper": helper})
    even.globals.odd.celltypes.n = "plain"

    @direct
    def main(n):
        return n if n == 0 else 1 + main(n - 1) * K
    main.globals.update({"main": main, "K": 2})
    """


def test_a_driver_that_calls_itself_is_the_same_transformation_at_every_depth(tmp_path):
    m = write_module(tmp_path, "recursive", textwrap.dedent(RECURSIVE))
    inside = m.nest(6).run()
    assert inside == [str(m.nest(n).construct()) for n in (5, 4, 3, 2, 1, 0)]


def test_two_drivers_that_call_each_other_are_the_same_transformations_at_every_depth(tmp_path):
    import seamless_lite.config as config
    m = write_module(tmp_path, "circular", textwrap.dedent(RECURSIVE))
    assert m.even(6) is True
    session = config.session()
    pairs = [(m.even, n) for n in (6, 4, 2, 0)] + [(m.even.globals.odd, n) for n in (5, 3, 1)]
    assert all(session.lookup(driver.transformation(n)._recipe) for driver, n in pairs)


def test_a_driver_called_main_calls_itself_too(tmp_path):
    m = write_module(tmp_path, "called_main", textwrap.dedent(RECURSIVE))
    assert m.main(3) == 1 + 2 * (1 + 2 * 1) and json.dumps(m.main(1)) == "1"


def test_plain_recursion_stays_plain_whatever_the_function_is_called():
    for name in ("f", "main", "annotations"):
        text = "def %s(n):\n    return K if n == 0 else 1 + %s(n - 1)" % (name, name)
        assert run(text, globals_={"K": 7}, n=3) == 10


@pytest.mark.slow
def test_recursion_to_depth_20_with_one_worker_makes_20_jobs(tmp_path):
    script = tmp_path / "recursion.py"
    script.write_text(textwrap.dedent("""
        import seamless_lite
        from seamless_lite import delayed
        seamless_lite.spawn(1)
        @delayed
        def nest(n):
            import os
            return [os.getpid()] + (nest(n - 1).run() if n else [])
        nest.globals.nest = nest
        pids = nest(20).run()
        print(len(pids), len(set(pids)))
        """))
    done = subprocess.run([sys.executable, str(script)], env=dict(os.environ, PYTHONPATH=ROOT), timeout=90,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.stdout, done.stderr) == ("21 21\n", "")     # each waits in its own process for the next


def test_what_is_set_for_a_nested_transformer_beside_its_identity_arrives_inside(tmp_path):
    m = write_module(tmp_path, "nested_meta", textwrap.dedent(NESTED))
    globals_ = {"mid": m.mid, "add": m.add, "plain": m.plain}
    text = ("t = leaf.transformation(1).meta\n"
            "result = [t.timeout_s, t.local, t.scratch, mid.meta, mid.globals.leaf is leaf, add(1), add.local]")
    plain = run(text, globals_=globals_)
    assert plain == [None, False, False, {}, True, 2, False] and children(globals_) == {}
    m.leaf.meta = {"timeout_s": 7, "label": "leaf"}
    m.leaf.local = m.leaf.scratch = True
    meta = Meta.from_dict(json.loads(json.dumps(Meta(children=children(globals_)).to_dict())))
    assert run(text, globals_=globals_, meta=meta) == [7, True, True, {}, True, 2, False]


def test_a_driver_among_its_own_globals_has_its_settings_once(tmp_path):
    m = write_module(tmp_path, "recursive_meta", textwrap.dedent(RECURSIVE))
    m.nest.local = True
    assert children({"nest": m.nest}) == {"nest": {"local": True, "scratch": False}}
    assert children({"even": m.even}) == {}


def test_a_transformer_whose_own_globals_are_missing_is_refused_before_it_travels(tmp_path):
    pytest.importorskip("seamless_lite.transformer")
    m = write_module(tmp_path, "nested_missing", textwrap.dedent(NESTED))
    del m.leaf.globals.K
    with pytest.raises(TypeError, match=r"leaf.*'K'.*leaf\.globals\.K = K"):
        run("result = leaf(1)", globals_={"leaf": m.leaf})


# --- errors ----------------------------------------------------------------------------------------------

def failure(code, kind=JobError, **kwargs):
    with pytest.raises(kind) as info:
        run(code, **kwargs)
    return info.value


def test_an_exception_becomes_a_sentence_and_the_users_own_frames(tmp_path):
    m = write_module(tmp_path, "failing", "def deeper(x):\n    return 1 // x\n\ndef f(x):\n    y = x\n    return helper.go(y)  # here\n")
    error = failure(m.f, modules={"helper": module("def go(x):\n    return 1 // x  # there")}, x=0)
    assert error.args[0] == "ZeroDivisionError: integer division or modulo by zero"
    lines = error.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert '  File "f", line 3, in f' in lines and "    return helper.go(y)  # here" in lines
    assert '  File "helper", line 2, in go' in lines and "    return 1 // x  # there" in lines
    assert lines[-1] == error.args[0]
    assert "seamless_lite" not in error.traceback and "importlib" not in error.traceback
    assert error_from_dict(error_to_dict(error)).traceback == error.traceback


def test_chained_exceptions_and_library_frames_are_shown():
    error = failure("import json\ntry:\n    json.loads('{')\nexcept ValueError as exc:\n    raise KeyError('k') from exc")
    assert error.args[0] == "KeyError: 'k'"
    assert "direct cause" in error.traceback and "json" in error.traceback and "seamless_lite" not in error.traceback


def test_an_error_while_a_module_is_imported_shows_the_modules_line():
    error = failure("result = 1", modules={"helper": module("a = 1\nb = nothing")})
    assert error.args[0].startswith("NameError") and '  File "helper", line 2, in <module>' in error.traceback
    assert "importlib" not in error.traceback


@pytest.mark.parametrize("text, message", [
    ("raise SystemExit(3)", r"SystemExit: the code called exit\(3\)"), ("import sys\nsys.exit()", r"called exit\(\)"),
    ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E()", "E: .*__str__ raised ValueError"),
    ("def f():\n    return f()\nresult = f()", "RecursionError"), ("raise GeneratorExit", "GeneratorExit"),
    ("raise ValueError", "ValueError$"), ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
    ("pass", "never assigns 'result'"), ("result = None", "is None"), ("{}['result']", "KeyError: 'result'"),
    ("result = object()", "the result of the code cannot be stored.*object"), ("a: int = 1\ndel a\nresult = a", "NameError"),
    ("class A:\n    def __len__(self): raise OSError('no')\n    __array__ = __len__\nresult = A()", "cannot be stored"),
])
def test_whatever_user_code_does_becomes_a_job_error(text, message):
    import re
    error = failure(text)
    assert re.search(message, error.args[0]), error.args[0]
    assert len(str(error)) < 200_000


def test_control_c_is_not_the_codes_failure():
    with pytest.raises(KeyboardInterrupt):
        run("raise KeyboardInterrupt")


def test_a_missing_input_or_code_is_named():
    recipe, buffers = build_recipe(string_code("result = x"), {"x": Checksum("ab" * 32)})
    store = MemoryBuffers()
    with pytest.raises(CacheMissError, match="code of the job"):
        execute(recipe, Meta(), store)
    store.put_many(buffers.values())
    with pytest.raises(CacheMissError, match="'x' of the code.*abab"):
        execute(recipe, Meta(label=""), store)


def test_an_input_that_is_not_what_its_celltype_says_is_named():
    recipe, buffers = build_recipe(string_code("result = x"), {"x": Checksum.of(b"{")}, {"x": "plain"})
    store = MemoryBuffers()
    store.put_many([*buffers.values(), b"{"])
    with pytest.raises(CelltypeError, match="input 'x' of the code"):
        execute(recipe, Meta(), store)


def test_unknown_languages_missing_code_and_conda_are_refused():
    store = MemoryBuffers()
    with pytest.raises(JobError, match="'julia'"):
        execute(Recipe("julia", {}), Meta(), store)
    with pytest.raises(JobError, match="no code"):
        execute(Recipe("python", {}), Meta(), store)
    with pytest.raises(ConfigurationError, match="'other'"):
        run("result = 1", meta=Meta(environment={"conda_environment": "other"}))


def test_a_job_cancelled_before_it_started_does_not_start():
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(JobCancelledError):
        execute(Recipe("python", {}), Meta(), MemoryBuffers(), cancelled=cancelled)
