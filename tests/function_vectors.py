"""The ``functions`` of vectors.json as code, arguments, modules and globals."""
import importlib.util
import json
import pathlib
import sys
import types

from seamless_lite.function import build_recipe, python_code, string_code

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))["functions"]
RESULTS = {vector["id"]: vector.get("result_checksum") for vector in VECTORS}
NUMPY = {"numpy", "mixed-composite", "binary-result"}


def load_module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_module(folder, name, text):
    """Write ``text`` to a file, import it as ``name``, return the module."""
    path = folder / (name + ".py")
    path.write_text(text, encoding="utf-8")
    return load_module(path, name)


def vector_recipe(vector, folder, monkeypatch):
    """(code, recipe, buffers) of one vector."""
    api = types.ModuleType("vector_api")
    api.delayed = lambda function: function
    monkeypatch.setitem(sys.modules, "vector_api", api)
    names = {}
    if "source" in vector:
        names = vars(write_module(folder, "vector_" + vector["id"].replace("-", "_"), vector["source"]))
        code = python_code(eval(vector["function"], names))
    else:
        code = string_code(vector["code_string"], vector.get("language", "python"))
    if any("np." in text for text in vector["args"].values()):
        import numpy as np
        names = dict(names, np=np)
    arguments = {name: RESULTS[text[7:]] if text.startswith("RESULT:") else eval(text, dict(names))
                 for name, text in vector["args"].items()}
    modules = {name: write_module(folder, name, module) if isinstance(module, str) else module
               for name, module in vector.get("modules", {}).items()}
    globals_ = {name: eval(text, names) for name, text in vector.get("globals", {}).items()}
    recipe, buffers = build_recipe(code, code.bind((), arguments), vector.get("celltypes", {}), modules, globals_)
    return code, recipe, buffers
