"""Functions and code text become recipes, or are refused with a sentence that names the cure."""
import functools
import math
import os
import subprocess
import sys
import textwrap

import pytest
from function_vectors import NUMPY, VECTORS, vector_recipe, write_module

import seamless_lite
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CelltypeError, FunctionError
from seamless_lite.function import build_recipe, python_code, string_code

OUTER = 10


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_a_vector_has_the_identity_that_seamless_gives_it(vector, tmp_path, monkeypatch):
    if vector["id"] in NUMPY:
        pytest.importorskip("numpy")
    code, recipe, buffers = vector_recipe(vector, tmp_path, monkeypatch)
    assert code.buffer.decode() == vector["code_buffer"]
    assert recipe.to_dict() == vector["transformation"]
    assert recipe.buffer.decode() == vector["transformation_buffer"]
    assert recipe.checksum == vector["transformation_checksum"]
    for name, data in vector["pins"].items():
        if data is not None and not vector["args"].get(name, "").startswith("RESULT:"):
            assert buffers[recipe.pins[name][2]] == bytes.fromhex(data)
    assert buffers[code.checksum] == code.buffer
    assert all(Checksum.of(data) == checksum for checksum, data in buffers.items())


def refusal(*words):
    """A FunctionError whose sentence has all these words, on one line."""
    return pytest.raises(FunctionError, match="(?s)" + "".join("(?=.*%s)" % word for word in words))


# --- source ---------------------------------------------------------------------------------------------

def text_of(tmp_path, source, name="f", module="source_module"):
    return python_code(getattr(write_module(tmp_path, module, textwrap.dedent(source)), name)).text


def test_decorators_of_several_lines_are_cut_off_whole(tmp_path):
    source = """
        def deco(*names):
            return lambda function: function
        @deco("a",
              "b"
              )
        @deco()

        # kept
        def f(x):
            return x
        """
    assert text_of(tmp_path, source) == "\n# kept\ndef f(x):\n    return x\n"


def test_comments_between_decorators_do_not_keep_the_second_one(tmp_path):
    source = "d = lambda f: f\n@d\n# why\n@d\ndef f(x):\n    return x\n"
    assert text_of(tmp_path, source) == "def f(x):\n    return x\n"


def test_a_string_that_reaches_further_left_than_a_nested_function_survives(tmp_path):
    source = 'def make():\n    def f(x):\n        return """\nleft\n""" + x\n    return f\nf = make()\n'
    assert text_of(tmp_path, source) == 'def f(x):\n    return """\nleft\n""" + x\n'


def test_a_form_feed_between_lines_becomes_a_newline_as_in_seamless(tmp_path):
    assert text_of(tmp_path, "def f(x):\n    y = x\n\x0c\n    return y\n") == "def f(x):\n    y = x\n\n\n    return y\n"


def test_odd_line_breaks_inside_a_string_are_kept(tmp_path):
    text = text_of(tmp_path, 'def f(x):\n    return x + "\u2028" + """a\x0cb"""\n')
    assert text == 'def f(x):\n    return x + "\u2028" + """a\x0cb"""\n'


def test_of_two_lambdas_on_a_line_the_right_one_is_found(tmp_path):
    module = write_module(tmp_path, "two_lambdas", "pair = [lambda x: x + 1, lambda x: x + 2]  # both\n")
    assert [python_code(f).text for f in module.pair] == ["lambda x: x + 1\n", "lambda x: x + 2\n"]


def test_a_lambda_over_several_lines_is_refused(tmp_path):
    module = write_module(tmp_path, "long_lambda", "f = (lambda x:\n     x + 1)\n")
    with refusal("line 1", "'def'"):
        python_code(module.f)


def test_a_file_that_changed_under_the_program_is_noticed(tmp_path):
    module = write_module(tmp_path, "changing", "def f(x):\n    return x\n")
    (tmp_path / "changing.py").write_text("# new\ndef g(y):\n    return y * 1000\n")
    with refusal("'f'", "changed"):
        python_code(module.f)


@pytest.mark.parametrize("body", ["return x * 2", "return x + 3", "y = x\n    return y", "return (lambda: x + 2)()"])
def test_a_body_that_changed_under_the_program_is_noticed(body, tmp_path):
    module = write_module(tmp_path, "changing", "def f(x):\n    return x + 2\n\ng = lambda x: x + 2\n")
    python_code(module.f), python_code(module.g)
    (tmp_path / "changing.py").write_text("def f(x):\n    %s\n\ng = lambda x: x * 2\n" % body)
    with refusal("'f'", "changed"):
        python_code(module.f)
    with refusal("line 4", "import its file again"):
        python_code(module.g)


def test_a_file_that_changed_elsewhere_does_no_harm(tmp_path):
    source = """
        from __future__ import annotations
        class A:
            def make(self, k):
                def f(x: Unknown, y=3):     # a comment
                    __mangled, inner = k, lambda z: Unknown2 and {1, 2, 0.5} | {z: x, __mangled: 1}
                    class Local:
                        field: Undefined = y
                    return inner
                return f, lambda x: x + k
        f, g = A().make(1)
        # end
        """
    module = write_module(tmp_path, "changing", textwrap.dedent(source))
    (tmp_path / "changing.py").write_text(textwrap.dedent(source).replace("# end", "more = 1").replace("a comment", "another"))
    assert "# another" in python_code(module.f).text and python_code(module.g).text == "lambda x: x + k\n"


def console(arguments, code):
    return subprocess.run([sys.executable] + arguments, input=code, universal_newlines=True, timeout=30, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, cwd=os.path.dirname(os.path.dirname(seamless_lite.__file__))).stdout


TYPED = """
import sys; del sys.argv[:]
from seamless_lite.function import python_code
def twice(f):
    return f
@twice
def f(x):
    return x        # \u00e9

g = lambda x: x + 1
def show(f):
    try:
        print(ascii(python_code(f).text))
    except TypeError as exc:
        print(exc)

def made(text):
    names = {}
    exec(text, names)
    return names["f"]

for each in f, g, made("\\n" * 5 + "def f(x):\\n    return x + 1000"), made("f = lambda x: x"): show(each)

"""


@pytest.mark.parametrize("words", [["-c", TYPED], ["-B", "-Wignore", "-c", TYPED, "def f(x):\n    return 7"], ["-Bc" + TYPED]],
                         ids=["plain", "options", "joined"])
def test_functions_on_the_command_line_work_and_those_made_with_exec_there_are_refused(words):
    lines = console(words, "").splitlines()
    assert lines[0] == r"'def f(x):\n    return x        # \xe9\n'"
    assert lines[1] == r"'lambda x: x + 1\n'"
    assert lines[2].startswith("the source of 'f' cannot be found (was it typed in a console, or made with exec?)")
    assert lines[3].startswith("the source of a lambda cannot be found")
    assert len(lines) == 4


@pytest.mark.parametrize("words", [[], ["-"], ["-i"]])
def test_functions_on_standard_input_are_refused_with_the_cure(words):
    text = console(words, TYPED)
    unknown = 2 if r"'lambda x: x + 1\n'" not in text else 1       # from 3.13 on Python knows what was typed
    assert unknown == 2 or words == ["-i"] and r"'def f(x):\n    return x " in text
    assert text.count("source of 'f' cannot be found") == unknown == text.count("source of a lambda cannot be found")
    assert "put it in a file" in text and "Traceback" not in text


def test_a_function_of_a_notebook_cell_works():
    import linecache
    cell = "def f(x):\n    return x * 2\n"
    name = "<ipython-input-7-abcdef>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
    names = {"__name__": "__main__"}
    exec(compile(cell, name, "exec"), names)
    assert python_code(names["f"]).text == cell


def test_a_foreign_decorator_that_wraps_is_left_out_with_a_warning(tmp_path):
    module = write_module(tmp_path, "wrapped", "import functools\n@functools.lru_cache(\n    None)\ndef f(x):\n    return x\n")
    with pytest.warns(UserWarning, match="decorators of f"):
        assert python_code(module.f).text == "def f(x):\n    return x\n"


class Thing:
    def method(self, x):
        return x


def generator(x):
    yield x


async def coroutine(x):
    return x


@pytest.mark.parametrize("thing, words", [
    (Thing, ("Thing", "class")), (Thing().method, ("Thing.method", "method", "parameters")),
    (len, ("'len'", "builtin", "'def'")), (math.sqrt, ("'sqrt'",)), (functools.partial(generator, 1), ("partial", "generator")),
    (generator, ("generator", "yield", "list")), (coroutine, ("coroutine", "async", "'def'")), (3, ("int",)),
    (staticmethod(generator), ("staticmethod", "below")), (classmethod(generator), ("classmethod",)),
    (lambda *a: a, ("lambda", r"\*a", "parameter")), (lambda **a: a, (r"\*\*a",)),
    (eval("lambda a, /: a"), ("'a'", "positional-only", "'/'")), (lambda result: 1, ("'result'", "another name")),
    (lambda code: 1, ("'code'",)), (lambda __x: 1, ("__x'", "reserved")), (lambda META__x: 1, ("META__x",)),
], ids=str)
def test_what_cannot_be_a_transformation_is_refused_by_name(thing, words):
    with refusal(*words):
        python_code(thing)


@pytest.mark.parametrize("text, words", [
    ("def f(:\n", ("not valid Python", "line 1")), ("", ("no code",)), ("async def f(x):\n    return 1", ("f is an async",)),
    ("def f(*x): pass", (r"\*x",)), ("def f(result): pass", ("'result'",)), ("a\0b", ("not valid Python",)),
])
def test_code_text_that_cannot_run_is_refused(text, words):
    with refusal(*words):
        string_code(text)


# --- arguments ------------------------------------------------------------------------------------------

def three(a, b, *, c=3):
    return a, b, c


def test_arguments_are_bound_as_python_would_and_defaults_are_left_out():
    code = python_code(three)
    assert code.bind((1, 2), {}) == {"a": 1, "b": 2}
    assert code.bind((1,), {"c": None, "b": 2}) == {"a": 1, "b": 2, "c": None}


@pytest.mark.parametrize("args, kwargs, words", [
    ((1,), {}, ("three", "'b'")), ((), {}, ("parameters", "'a', 'b'")), ((1, 2, 3), {}, ("three takes 2", "3 given")),
    ((1, 2), {"a": 1}, ("three", "two values", "'a'")), ((1, 2), {"d": 1}, ("three has no parameter 'd'", "'c'")),
])
def test_wrong_arguments_are_refused_by_function_and_parameter(args, kwargs, words):
    with refusal(*words):
        python_code(three).bind(args, kwargs)


def test_code_text_takes_inputs_by_name_also_undeclared_ones():
    code = string_code("result = a + b")
    recipe, _ = build_recipe(code, code.bind((), {"a": 1, "b": 2}), {"a": "int"})
    assert recipe.pins["a"][0] == "int" and recipe.pins["b"][0] == "mixed"
    with refusal("by name"):
        code.bind((1,), {})
    with refusal("'result'"):
        code.bind((), {"result": 1})
    assert string_code("def f(x, y=2):\n    return x").bind((1,), {}) == {"x": 1}


def test_checksums_and_64_hex_digits_are_inputs_that_exist_already():
    code, name = python_code(three), "AB" * 32
    recipe, buffers = build_recipe(code, {"a": name, "b": Checksum(name), "c": "z" * 64})
    assert recipe.pins["a"][2] == recipe.pins["b"][2] == name.lower()
    assert buffers[recipe.pins["c"][2]] == b'"%s"\n' % (b"z" * 64)


def test_celltypes_of_inputs_and_result_reach_the_recipe():
    cells = {"a": "folder", "b": "deepcell", "c": "checksum", "result": "folder"}
    recipe, buffers = build_recipe(python_code(three), {"a": {"d/f": b"abc"}, "b": [1, {"k": 2}], "c": ["ab" * 32]}, cells)
    assert recipe.output == ("result", "folder", None)
    assert recipe.pins["c"][:2] == ("plain", "checksum")
    assert recipe.extra == {"__format__": {"a": {"celltype": "folder", "filesystem": {"mode": "directory"}}}}
    assert b"abc" in buffers.values() and b"2\n" in buffers.values()


@pytest.mark.parametrize("celltypes, words", [
    ({"a": "cson"}, ("'a'", "'cson'", "mixed")), ({"a": "python"}, ("'python'", "'text'")), ({"result": "yaml"}, ("'result'",)),
    ({"a": "module"}, (r"\.modules",)), ({"z": "int"}, ("'z'", "parameters")),
])
def test_celltypes_that_cannot_be_are_refused(celltypes, words):
    with refusal("three", *words):
        build_recipe(python_code(three), {"a": 1, "b": 2}, celltypes)


def test_a_value_that_does_not_fit_its_celltype_is_refused_by_name():
    with pytest.raises(CelltypeError, match="input 'b' of three"):
        build_recipe(python_code(three), {"a": 1, "b": {1, 2}})


# --- names ----------------------------------------------------------------------------------------------

def uses_import(x):
    return math.floor(x)


def helper(y):
    return y + OUTER


def uses_helper(x):
    return helper(x)


def uses_value(x):
    return x + OUTER


def uses_nothing(x: "Unknown", y: OUTER = 2) -> OUTER:
    import os
    from sys import path as p
    total: Undefined = [z for z in p if z] or os.sep         # noqa: F821 (annotations are not evaluated)

    class Inner:
        a = 1
        b = a

        def again(self):
            return Inner, len, __name__

    def fact(n):
        return n and fact(n - 1)
    try:
        pass
    except ValueError as exc:
        print(exc)
    global made_here
    made_here = 1
    return uses_nothing, Inner, fact, total, y, made_here


def uses_default(x, y=OUTER):
    return x


def test_a_name_from_outside_is_refused_with_its_own_cure():
    cases = [(uses_import, ("uses_import uses 'math'", "'import math' inside")),
             (uses_helper, ("uses 'helper'", r"uses_helper\.globals\.helper = helper")),
             (uses_value, ("uses 'OUTER'", r"uses_value\.globals\.OUTER = OUTER", "parameter")),
             (uses_default, ("uses 'OUTER'",))]
    for function, words in cases:
        code = python_code(function)            # making the code is fine: the name may be given later
        with refusal(*words):
            build_recipe(code, {"x": 1})


def test_a_closure_variable_and_an_unknown_name_are_refused():
    K, M = 3, 4
    with refusal("'K'", "function around it", r"\.globals\.K = K", "'M'"):
        build_recipe(python_code(lambda x: x + K + M), {"x": 1})
    with refusal("'b'", "not defined"):
        build_recipe(string_code("result = a + b"), {"a": 1})


def test_a_function_that_needs_nothing_is_accepted():
    assert python_code(uses_nothing).free == frozenset()
    assert build_recipe(python_code(uses_nothing), {"x": 1})


def test_globals_and_modules_make_a_name_known():
    build_recipe(python_code(uses_value), {"x": 1}, globals_={"OUTER": OUTER})
    build_recipe(python_code(uses_helper), {"x": 1}, globals_={"helper": helper, "OUTER": OUTER})
    build_recipe(python_code(uses_import), {"x": 1}, modules={"math": {"code": "floor = 1", "type": "interpreted"}})


def main_text(recipe, buffers):
    import json
    return json.loads(buffers[recipe.pins["main"][2]])["code"]


def test_a_global_that_needs_another_one_is_refused_by_name():
    with refusal("'helper'", "uses_helper", r"uses_helper\.globals\.OUTER = OUTER"):
        build_recipe(python_code(uses_helper), {"x": 1}, globals_={"helper": helper})


class Zbase:
    k = 1


class Derived(Zbase):
    pass


def test_a_class_comes_after_the_base_class_that_it_needs():
    text = main_text(*build_recipe(string_code("Derived.k"), {}, globals_={"Zbase": Zbase, "Derived": Derived}))
    assert text.index("class Zbase") < text.index("class Derived")


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), math, [{1}], {"a": object()}, functools.partial(len)], ids=repr)
def test_a_global_whose_text_is_not_its_value_is_refused(value):
    with refusal("'OUTER'", "uses_value"):
        build_recipe(python_code(uses_value), {"x": 1}, globals_={"OUTER": value})


def test_a_global_that_is_changed_in_place_is_written_anew():
    code, values = python_code(uses_value), [1]
    first = build_recipe(code, {"x": 1}, globals_={"OUTER": values})[0]
    values.append(2)
    assert build_recipe(code, {"x": 1}, globals_={"OUTER": values})[0].checksum != first.checksum


def test_surroundings_that_cannot_change_are_written_once():
    code = python_code(uses_value)
    pins = [build_recipe(code, {"x": x}, globals_={"OUTER": value})[0].pins["main"] for x, value in ((1, 5), (2, 5), (1, 6))]
    assert pins[0] is pins[1]
    assert pins[2] != pins[1]


def test_a_package_is_written_module_by_module_as_far_as_it_was_imported(tmp_path, monkeypatch):
    for name, text in {"__init__": "\nimport os\nfrom .a import fa\nfrom . import b\n", "b": "def fb(x):\n    return x\n\n",
                       "a": "from .b import fb\nfrom .sub import q\ndef fa(x):\n    return fb(x)+1\n",
                       "sub/__init__": "from ..b import fb\nfrom . import c\nq = 1\n",
                       "sub/c": "from .. import b\nfrom .. import sub\n", "never": "1"}.items():
        path = tmp_path / "packed_up" / (name + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import packed_up
    from seamless_lite.surroundings import module_value
    code = module_value("p", packed_up, "f")["code"]
    assert {key: entry["dependencies"] for key, entry in code.items()} == {     # as Seamless 1.4.3 wrote them
        "__init__": [".a", ".b"], "a": [".b", ".sub"], "b": [], "sub.__init__": [".b", ".sub.c"],
        "sub.c": [".b", "__init__"]}
    assert code["__init__"]["code"] == "import os\nfrom .a import fa\nfrom . import b"


@pytest.mark.parametrize("module, words", [(math, ("math", "source")), ("text", ("str", "module itself")), ({}, ("without 'code'",))])
def test_a_module_without_source_is_refused(module, words):
    with refusal(*words):
        build_recipe(python_code(uses_import), {"x": 1}, modules={"math": module})


def test_an_input_and_a_module_of_one_name_are_refused():
    with refusal("both called 'x'"):
        build_recipe(python_code(uses_nothing), {"x": 1}, modules={"x": {"code": "", "type": "interpreted"}})
