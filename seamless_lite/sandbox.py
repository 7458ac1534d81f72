"""The Python modules in which user code is executed: made for one run, and gone after it.

Each run has a package of its own in ``sys.modules``, so that two runs in two threads do not meet.  The code
is executed in the package itself; the module pins are its submodules, found by one finder, so that imports
between them work as in a real package.  The code sees the package as ``transformer``.

Compiled code is kept from run to run.  Its lines are registered with ``linecache``: tracebacks show them,
and ``inspect.getsource`` finds functions that are defined here (nested transformations need that).
"""
import __future__
import builtins
import collections
import importlib
import importlib.machinery
import itertools
import linecache
import re
import sys
import threading
import types
import typing as _t

from .errors import FunctionError
from .usercode import code_kind, compile_user

KEPT_PROGRAMS = 256
_FUTURE = "from __future__ import annotations\n"
#: Types of what a function's name may stand for in its namespace without having been declared as a global.
_UNDECLARED = (types.ModuleType, type(__future__.annotations), type(None))


class NoResult(Exception):
    """A block of code has run, and its result has no value."""


class Program:
    """Compiled text.  ``kind`` is that of ``source.code_kind``, or "module"; ``name`` is for people."""
    is_package = False

    def __init__(self, text: str, name: str, checksum: str, is_module: bool = False):
        self.text = text
        self.kind, node = ("module", None) if is_module else code_kind(text, name)
        self.name = name = getattr(node, "name", None) or name
        self.file = "<%s %s>" % (name, checksum[:8])
        if name == "main" and is_module and _FUTURE in text and not text.startswith(_FUTURE):
            text = text.replace(_FUTURE, "\n")          # it may stand in the middle (identity.md 4.3)
        mode = "eval" if self.kind in ("lambda", "expression") else "exec"
        if is_module and name != "main":
            self.code = compile(text, self.file, mode, 0, dont_inherit=True)
        else:
            self.code = compile_user(text, self.file, mode)
        self._lines = (len(self.text), None, self.text.splitlines(True), self.file)

    def register(self) -> None:
        """Make the lines known to ``linecache`` (again: anybody may clear it)."""
        linecache.cache[self.file] = self._lines

    def run(self, namespace: dict, inputs: dict, result: str):
        """Execute, and return the value; a block's value is what it assigns to ``result`` (``NoResult`` if nothing)."""
        namespace["__builtins__"] = self.builtins(namespace["__builtins__"])
        if self.kind == "function":
            declared = namespace.get(self.name)
            exec(self.code, namespace)
            function = namespace[self.name]
            if not isinstance(declared, _UNDECLARED):   # a driver that calls itself calls the transformer
                namespace[self.name] = declared
            return function(**inputs)
        if self.kind == "lambda":
            return eval(self.code, namespace)(**inputs)
        namespace.update(inputs)
        if self.kind == "expression":
            return eval(self.code, namespace)
        exec(self.code, namespace)
        if result not in namespace:
            raise NoResult()
        return namespace[result]

    def builtins(self, given: dict) -> dict:
        """``given``, by which code of Seamless 1.x that calls other functions imports our ``direct`` where that is not installed."""
        if "seamless.transformer" not in self.text:
            return given

        def load(name, globals=None, locals=None, fromlist=(), level=0):
            try:
                return given["__import__"](name, globals, locals, fromlist, level)
            except ModuleNotFoundError as exc:
                if name != "seamless.transformer" or exc.name != "seamless" or not fromlist:
                    raise
                return importlib.import_module(__package__ + ".transformer")        # as in ``furnish_main``
        return dict(given, __import__=load)


class _Cache:
    """The programs used last, by key."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._entries: "collections.OrderedDict[tuple, object]" = collections.OrderedDict()

    def get(self, key: tuple, make: _t.Callable[[], _t.Any]):
        """The entry; ``make`` makes it if there is none, and may raise."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = make()
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > self._size:
                for old in _files(self._entries.popitem(last=False)[1]):
                    linecache.cache.pop(old, None)
        return entry


def _files(entry) -> _t.List[str]:
    return [program.file for program in (entry.values() if isinstance(entry, dict) else [entry])]


programs = _Cache(KEPT_PROGRAMS)


def module_programs(name: str, value, checksum: str) -> _t.Dict[str, Program]:
    """The programs of a module pin by name: ``helper``, or ``pkg``, ``pkg.a``... for a package.

    Raises ``FunctionError`` for a value that is no module, ``SyntaxError`` for code that is no Python.
    """
    code = value.get("code") if isinstance(value, dict) else None
    if isinstance(code, str):
        return {name: Program(code, name, checksum, True)}
    if not isinstance(code, dict):
        raise FunctionError("the module '%s' has no code" % name)
    found = {}
    for key, entry in code.items():
        parts = [name] + key.split(".")
        is_package = parts[-1] == "__init__"
        inner = ".".join(parts[:-1] if is_package else parts)
        found[inner] = Program(entry["code"] if isinstance(entry, dict) else entry, inner, checksum, True)
        found[inner].is_package = is_package
    for parts in [(name + "." + key).split(".") for key in code]:
        for n in range(1, len(parts)):                  # folders without an __init__
            inner = ".".join(parts[:n])
            found.setdefault(inner, Program("", inner, checksum, True)).is_package = True
    return found


# --- modules of one run ------------------------------------------------------------------------------------

class _Finder:
    """Finds the submodules of all runs that are going on.  One of it is in ``sys.meta_path``."""

    def __init__(self):
        self.sources: _t.Dict[str, _t.Tuple["Sandbox", Program]] = {}

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.sources:
            return None
        program = self.sources[fullname][1]
        return importlib.machinery.ModuleSpec(fullname, self, origin=program.file, is_package=program.is_package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        sandbox, program = self.sources[module.__name__]
        module.__file__ = program.file
        program.register()
        if program.name == "main":
            sandbox.furnish_main(module.__dict__, program)
        module.__dict__["__builtins__"] = program.builtins(sandbox.builtins)
        exec(program.code, module.__dict__)

    def get_source(self, fullname):
        return self.sources[fullname][1].text


_finder = _Finder()
_numbers = itertools.count(1)


class Sandbox:
    """The namespace of one run: ``with Sandbox(identity, modules) as namespace``.

    ``identity`` names the run (equal runs get equal module names, as far as possible: a name may show up in a
    result); ``modules`` maps names of pins to what ``module_programs`` gives; ``children`` (as in ``Meta``)
    maps names of transformers in ``main`` to their ``meta``.
    """

    def __init__(self, identity: str, modules: _t.Mapping[str, _t.Mapping[str, Program]],
                 children: _t.Mapping[str, dict] = {}):
        self._modules = modules
        self._children = children
        self.package = types.ModuleType("transformer_" + identity[:16])
        # dict.setdefault is atomic: of two threads with the same job one gets the next name
        while sys.modules.setdefault(self.package.__name__, self.package) is not self.package:
            self.package = types.ModuleType("transformer_%s_%d" % (identity[:16], next(_numbers)))
        self.package.__package__ = self.package.__name__
        self.builtins: _t.Any = builtins.__dict__

    def __enter__(self) -> dict:
        if self._modules:
            self._add_modules()
        self.package.__dict__["__builtins__"] = self.builtins
        return self.package.__dict__

    def import_modules(self) -> None:
        """Import the modules and bind their names; ``main``, whose public names go along, comes last.

        Raises what they raise.
        """
        namespace = self.package.__dict__
        for name in sorted(self._modules, key=lambda name: (name == "main", name)):
            module = importlib.import_module("%s.%s" % (self.package.__name__, name))
            namespace[name] = module
            if name == "main":
                for child in self._children.keys() & vars(module).keys():
                    vars(module)[child].meta = self._children[child]
                namespace.update((key, value) for key, value in vars(module).items() if not key.startswith("__"))

    def furnish_main(self, namespace: dict, program: Program) -> None:
        """Put into ``main`` what it may use without a definition: the other modules, and our decorators."""
        for name in self._modules:
            module = sys.modules.get("%s.%s" % (self.package.__name__, name))
            if module is not None and name != "main":
                namespace[name] = module
        if re.search(r"\b(direct|delayed)\b", program.text):
            # By name: transformations are made above this module, and most code declares none.
            transformer = importlib.import_module(__package__ + ".transformer")
            namespace.update(direct=transformer.direct, delayed=transformer.delayed)

    def __exit__(self, kind, error, traceback):
        name = self.package.__name__
        sys.modules.pop(name, None)
        if self._modules:
            inner = name + "."
            for names in (sys.modules, _finder.sources):
                for key in [key for key in list(names) if key.startswith(inner)]:
                    names.pop(key, None)

    def _add_modules(self) -> None:
        if _finder not in sys.meta_path:
            sys.meta_path.append(_finder)
        self.package.__path__ = []
        for programs_ in self._modules.values():
            for inner, program in programs_.items():
                _finder.sources["%s.%s" % (self.package.__name__, inner)] = (self, program)
        self.builtins = dict(builtins.__dict__, __import__=self._import)

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        """``__import__`` for user code that has modules: ``transformer`` is the package of this run."""
        if level == 0 and (name == "transformer" or name.startswith("transformer.")):
            name = self.package.__name__ + name[len("transformer"):]
        return builtins.__import__(name, globals, locals, fromlist, level)
