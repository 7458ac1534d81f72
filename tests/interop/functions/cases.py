"""Transformations that both packages run: ``python cases.py PACKAGE [CASE...]`` prints JSON.

Each line of JSON: case -> {"transformation", "result", "value", "ran"}.  Every function writes to the file $LEDGER when it
runs.  This file is executed by the real package's Python too, so it imports nothing of ours but by the name it is given.
"""
import hashlib
import importlib
import json
import os
import sys
import warnings

import numpy as np

import case_module
import case_package


# --- the functions -------------------------------------------------------------------------------------------

def same(x):
    open(__import__("os").environ["LEDGER"], "a").write("same\n")
    return x


def same_again(x):
    # comments and the spaces below are part of the identity
    open(__import__("os").environ["LEDGER"], "a").write("same_again\n")

    return   x


def add(a, b, c=0, *, d=1):
    """A docstring, which counts, with é and \\n in it."""
    open(__import__("os").environ["LEDGER"], "a").write("add\n")
    return a + b + c + d


def describe(x):
    import os
    with open(os.environ["LEDGER"], "a") as file:
        file.write("describe\n")
    if isinstance(x, dict):
        return {key: [type(x[key]).__name__, str(x[key])] for key in sorted(x)}
    return type(x).__name__


def look(x):
    """What a function sees of its argument."""
    open(__import__("os").environ["LEDGER"], "a").write("look\n")

    def see(value):
        name = type(value).__name__
        if isinstance(value, dict):
            return [name, [[str(key), see(item)] for key, item in value.items()]]
        if isinstance(value, (list, tuple)):
            return [name, [see(item) for item in value]]
        if hasattr(value, "dtype"):
            return [name, str(value.dtype), list(value.shape), list(value.strides),
                    value.flags.writeable or value.dtype.kind == "S", value.flags.c_contiguous,
                    value.flags.f_contiguous, repr(value.tolist())]
        return [name, repr(getattr(value, "content", value))]

    return see(x)


def content(x):
    open(__import__("os").environ["LEDGER"], "a").write("content\n")
    return x.tobytes() if hasattr(x, "tobytes") else x.content


def total(arr, factor):
    open(__import__("os").environ["LEDGER"], "a").write("total\n")
    return {"sum": float(arr.sum()) * factor, "scaled": arr * factor}


def make(n):
    import numpy
    open(__import__("os").environ["LEDGER"], "a").write("make\n")
    return numpy.arange(n, dtype="f4").reshape(2, -1)


def files(n):
    open(__import__("os").environ["LEDGER"], "a").write("files\n")
    return {"d/%d.txt" % i: b"file %d\n" % i for i in range(n)}


def cells(n):
    open(__import__("os").environ["LEDGER"], "a").write("cells\n")
    return {"k%d" % i: {"i": i, "é": [i / 3]} for i in range(n)}


def with_module(x):
    open(__import__("os").environ["LEDGER"], "a").write("with_module\n")
    from .case_module import triple
    return triple(x) + case_module.OFFSET


def with_package(x):
    open(__import__("os").environ["LEDGER"], "a").write("with_package\n")
    from .case_package import twice
    return twice(x)


def helper(x):
    return x * SCALE


def none_needed():
    open(__import__("os").environ["LEDGER"], "a").write("none_needed\n")
    return "fixed"


def is_none(x):
    open(__import__("os").environ["LEDGER"], "a").write("is_none\n")
    return [x is None]


def decorator(function):
    return function


@decorator
@decorator
# a comment between decorator and function is part of the code
def decorated(x):
    open(__import__("os").environ["LEDGER"], "a").write("decorated\n")
    return [x, "@decorator"]


class Point:
    def __init__(self, x):
        self.x = x


def with_globals(x):
    open(__import__("os").environ["LEDGER"], "a").write("with_globals\n")
    return [helper(x), Point(x).x, TABLE["k"]]


MODULE = "OFFSET = 1000\n\ndef triple(x):\n    return 3 * x\n"
SCALE, TABLE = 7, {"k": [1, 2.5, None, "ü"]}

# Theirs refuses a lambda that calls a global; the default runs here, and again where the text runs.
the_lambda = lambda x, y=open(__import__("os").environ["LEDGER"], "a").write("lambda\n"): x * 2 + y


def outer():
    def inner(x):
        open(__import__("os").environ["LEDGER"], "a").write("inner\n")
        text = """
            indented
            text"""
        return [x, text]
    return inner


BLOCK = """\
open(__import__("os").environ["LEDGER"], "a").write("block\\n")
result = {"sum": a + b, "é": [a, b]}
"""
EXPRESSION = 'a + b + 0 * open(__import__("os").environ["LEDGER"], "a").write("x\\n")'
BASH = 'cat b.txt > RESULT; echo "$a" >> RESULT'

# --- the cases: name -> (code, arguments, celltypes, modules, globals, language) ----------------------------

CASES = {}


def case(name, code, arguments, celltypes=(), modules=(), globals_=(), language=None):
    CASES[name] = (code, arguments, dict(celltypes), dict(modules), dict(globals_), language)


VALUES = {
    "int": 42, "negative": -7, "big": 2 ** 63 - 1, "huge": 10 ** 30, "float": 0.1, "1e-5": 1e-5, "1e-7": 1.5e-7, "1e16": 1e16,
    "1e22": 1e22, "1e300": -1.5e300, "minus-zero": -0.0, "whole": 100.0, "true": True, "false": False,
    "text": "hello", "unicode": "é\u2028\U0001f600\x7f\t\"\\/", "empty-text": "", "newlines": "a\nb\n\n",
    "empty-list": [], "empty-dict": {}, "nested": {"b": [1, 2.0, None, True, {"z": "ß", "a": []}], "a": {"y": [[1], [2, [3]]]}},
    "tuple": (1, "2", (3,)), "int-keys": {1: "a", 2: "b"}, "none-inside": [None, [None]],
    "nan": [float("nan"), float("inf"), -float("inf")],
}
for _name, _value in VALUES.items():
    case("mixed " + _name, same, {"x": _value})
    case("seen mixed " + _name, look, {"x": _value}, {"result": "plain"})
    if _name not in ("huge", "int-keys", "nan"):
        case("plain " + _name, same, {"x": _value}, {"x": "plain", "result": "plain"})
        case("seen plain " + _name, look, {"x": _value}, {"x": "plain", "result": "plain"})
for _celltype, _value in (("int", 5), ("int", "12"), ("float", 2), ("float", 1e16), ("bool", 1), ("str", "é\n"), ("str", 5),
                          ("text", "é\r\nx\n\n"), ("bytes", b"\x00\xff raw \n"), ("bytes", b"{}\n")):
    case("%s %r" % (_celltype, _value), same_again, {"x": _value}, {"x": _celltype, "result": _celltype})
    case("seen %s %r" % (_celltype, _value), look, {"x": _value}, {"x": _celltype, "result": "plain"})
case("bytes as mixed", content, {"x": b"abc\n"}, {"result": "bytes"})
case("empty bytes", content, {"x": b""}, {"x": "bytes", "result": "bytes"})

# No padding: Seamless writes what was in memory there, so that the checksum changes from run to run.
_struct = np.zeros(3, dtype=np.dtype([("b", "f8"), ("d", "i4", (2,)), ("c", "S4"), ("a", "i4")], align=True))
_struct["a"], _struct["b"], _struct["c"] = [1, 2, 3], [0.5, 1.5, 2.5], [b"x", b"yy", b"zzzz"]
ARRAYS = {
    "i8": np.arange(6), "f4": np.linspace(0, 1, 5, dtype="f4"), "u1": np.arange(256, dtype="u1"), "bool": np.array([True, False]),
    "i2-2d": np.arange(12, dtype="i2").reshape(3, 4), "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "0-d": np.array(3.5), "strided": np.arange(20)[::3], "empty": np.zeros((0, 3)), "S": np.array([b"ab", b"c"]),
    "f2": np.array([0.1, 2], dtype="f2"), "3-d": np.arange(24, dtype="i4").reshape(2, 3, 4).transpose(2, 0, 1),
    "struct": _struct, "struct-scalar": _struct[1], "1000000": np.zeros(1000),
}
for _name, _value in ARRAYS.items():
    case("array " + _name, same, {"x": _value})
    case("composite " + _name, same, {"x": {"z": [_value, 1, "é"], "a": {"k": _value, "n": None}}})
    case("seen array " + _name, look, {"x": _value}, {"result": "plain"})
    case("seen composite " + _name, look, {"x": {"z": [_value, 1, "é"], "a": {"k": _value, "n": None}}}, {"result": "plain"})
    if isinstance(_value, np.ndarray):
        case("seen binary " + _name, look, {"x": _value}, {"x": "binary", "result": "plain"})
        case("binary " + _name, same_again, {"x": _value}, {"x": "binary", "result": "binary"})
case("scalar f8", same, {"x": np.float64(1e-7)})
case("scalar i2", same, {"x": [np.int16(3), np.float32(0.1)]})
case("composite of arrays", same, {"x": {"b": np.arange(3), "a": [np.eye(2), b"bytes", "text"], "list": [np.arange(2), np.arange(2)]}})
case("composite of bytes", same, {"x": {"raw": b"\x00\x01", "n": 1}})
case("seen composite of bytes", look, {"x": {"raw": b"\x00\x01", "t": (1, (2, b"x")), "f": np.float32(1), "i": [np.int8(1)]}},
     {"result": "plain"})
case("seen bytes as mixed", look, {"x": b"abc"}, {"result": "plain"})
case("array total", total, {"arr": np.arange(4, dtype="f8"), "factor": 2.5})
case("binary result", make, {"n": 6}, {"result": "binary"})
for _value in (b"abc", b"", b"text\n"):
    case("seen %r as binary" % _value, look, {"x": _value}, {"x": "binary", "result": "plain"})
case("array of a list", content, {"x": [[1, 2], [3, 4]]}, {"x": "binary", "result": "bytes"})

case("defaults left out", add, {"a": 1, "b": 2})
case("defaults given", add, {"a": 1, "b": 2, "c": 0, "d": 1})
case("no argument", none_needed, {})
case("argument None", is_none, {"x": None})                                # theirs can only read its result
case("two lines between", decorated, {"x": 1})
case("nested function", outer(), {"x": 1})
case("lambda", the_lambda, {"x": 4})
case("lambda with default given", the_lambda, {"x": 4, "y": 5})
case("block", BLOCK, {"a": 6, "b": 7}, {"a": "int", "b": "int"})
case("block mixed", BLOCK, {"a": "x", "b": "y"}, {"a": "mixed", "b": "mixed", "result": "plain"})
case("expression", EXPRESSION, {"a": 6, "b": 7}, {"a": "mixed", "b": "mixed"})
case("bash", BASH, {"a": "hello world", "b.txt": "file content"}, {"a": "mixed", "b.txt": "text", "result": "bytes"}, (), (), "bash")
case("bash text", BASH, {"a": 5, "b.txt": "x"}, {"a": "int", "b.txt": "text", "result": "text"}, (), (), "bash")

case("module", with_module, {"x": 5}, (), {"case_module": case_module})
case("package", with_package, {"x": 5}, (), {"case_package": case_package})
case("module as a dict", with_module, {"x": 6}, (), {"case_module": {"code": MODULE, "language": "python", "type": "interpreted"}})
case("globals", with_globals, {"x": 2}, (), (), {"helper": helper, "SCALE": SCALE, "Point": Point, "TABLE": TABLE})

case("folder result", files, {"n": 3}, {"result": "folder"})
case("deepfolder result", files, {"n": 2}, {"result": "deepfolder"})           # theirs refuses it
case("deepcell result", cells, {"n": 3}, {"result": "deepcell"})
_FILE, _VALUE = (hashlib.sha256(data).hexdigest() for data in (b"file 1\n", b"42\n"))
for _celltype in ("folder", "deepfolder"):                                  # by checksum, of files that are in the store
    case("%s seen" % _celltype, look, {"x": {"é/a.txt": _FILE, "b": _FILE}}, {"x": _celltype, "result": "plain"})
    case("%s by checksums" % _celltype, describe, {"x": {"é/a.txt": _FILE, "b": _FILE}}, {"x": _celltype})
case("deepcell by checksums", describe, {"x": {"a": _VALUE, "b": _VALUE}}, {"x": "deepcell"})
case("argument by checksum", add, {"a": _VALUE, "b": 5})
DEPENDENCIES = {"sum of sums": (add, {"a": ("defaults left out", 1), "b": 39}), "array of an array": (same_again, {"x": ("array f4", 1)}),
                "folder of a function": (describe, {"x": ("folder result", "folder")}),
                "deepfolder of a function": (describe, {"x": ("folder result", "deepfolder")}),
                "deepcell of a function": (describe, {"x": ("deepcell result", "deepcell")}),
                "bytes of a function": (content, {"x": ("bytes as mixed", "bytes")})}


FOLDERS = ("folder result", "deepfolder result")


def canonical(value):
    """The value as JSON that is equal in both packages where the values are."""
    if isinstance(value, (np.ndarray, np.generic)):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "data": repr(value.tolist())}
    if isinstance(value, dict):
        return {"dict": [[repr(key), canonical(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if hasattr(value, "content"):
        value = value.content
    if hasattr(value, "hex") and not isinstance(value, (bytes, float)):
        value = value.hex()                 # their Checksum; ours is a str
    if isinstance(value, str):
        return repr(str(value))
    return repr(bytes(value) if isinstance(value, (bytes, bytearray)) else value)


def ran():
    try:
        with open(os.environ["LEDGER"]) as file:
            return file.read().split("\n")[:-1]
    except FileNotFoundError:
        return []


def main(package, *only):
    warnings.simplefilter("ignore")
    api = importlib.import_module("seamless.transformer" if package == "seamless" else package)
    importlib.import_module(package + ".config").init()
    found, made = {}, {}

    def transformer(code, celltypes={}, modules={}, globals_={}, language=None):
        new = api.delayed(code, language) if language else api.delayed(code)
        for settings, values in ((new.celltypes, celltypes), (new.modules, modules), (new.globals, globals_)):
            for name, value in values.items():
                if settings is new.celltypes:
                    setattr(settings, name, value) if name.isidentifier() else settings.__setitem__(name, value)
                else:
                    setattr(settings, name, value)
        return new

    def run(name, tf):
        before = len(ran())
        try:
            tf.compute()
            error = tf.exception if not callable(tf.exception) else tf.exception()
            value = tf.value if error is None else None
            if name in FOLDERS:             # the value is the contents here, and the checksums there
                value = {key: hashlib.sha256(item).hexdigest() if isinstance(item, bytes) else item
                         for key, item in value.items()}
            found[name] = {"transformation": str(tf.transformation_checksum), "result": str(tf.result_checksum),
                           "value": canonical(value), "error": error and str(error)}
        except Exception as exc:
            found[name] = {"error": "%s: %s" % (type(exc).__name__, exc)}
        found[name]["ran"] = len(ran()) - before

    for name, (code, arguments, celltypes, modules, globals_, language) in CASES.items():
        if only and name not in only:
            continue
        try:
            tf = transformer(code, celltypes, modules, globals_, language)(**arguments)
        except Exception as exc:
            found[name] = {"error": "%s: %s" % (type(exc).__name__, exc), "ran": 0}
            continue
        made[name] = tf
        run(name, tf)
    for name, (code, arguments) in DEPENDENCIES.items():
        if only and name not in only:
            continue
        if any(isinstance(value, tuple) and value[0] not in made for value in arguments.values()):
            found[name] = {"error": "a dependency could not be made", "ran": 0}
            continue
        values = {key: made[value[0]] if isinstance(value, tuple) else value for key, value in arguments.items()}
        celltypes = {key: value[1] for key, value in arguments.items() if isinstance(value, tuple) and value[1] != 1}
        run(name, transformer(code, celltypes)(**values))
    print(json.dumps(found))
    sys.stdout.flush()
    if package == "seamless":
        importlib.import_module(package).close()    # else the end of the program may lose buffers


if __name__ == "__main__":
    main(*sys.argv[1:])
