"""A Python function, or code text, and arguments -> ``Recipe`` (compat/identity.md 4).

    python_code(function), string_code(text)  ->  Code           once per function: text, parameters, names
    Code.bind(args, kwargs)                   ->  {name: value}  as Python would
    build_recipe(code, arguments, ...)        ->  (Recipe, {checksum: bytes})   per call; only the arguments cost

A function that needs a name from outside is refused here, when it is called, with the cure: it runs
elsewhere, where only its own text, its ``modules`` and its ``globals`` exist.
"""
import ast
import dataclasses
import functools
import inspect
import types
import typing as _t
import warnings

from .celltypes import CELLTYPES, DEEP, pack_deep, serialize
from .checksum import Checksum, is_checksum
from .errors import CelltypeError, FunctionError
from .source import definition, free_names, lambda_text, undecorated
from .surroundings import NOTHING, Surroundings, surround
from .transformation import Recipe
from .usercode import code_kind

#: celltype of a pin -> its first two fields, where they are not (celltype, None)
_PINS = {"checksum": ("plain", "checksum"), "module": ("plain", "module")}
_REFUSED = frozenset(("python", "ipython", "yaml"))
_CODE_PINS = {"python": ("python", "transformer"), "bash": ("text", "transformer")}


@dataclasses.dataclass(frozen=True)
class Code:
    """Code that can be part of a recipe.

    ``text`` is what is hashed; ``kind`` one of function, lambda, expression, block, shell.  ``parameters`` are
    those of a function or lambda, None for the other kinds, which take any keyword.  ``free`` are the names
    that must come from ``modules`` and ``globals`` (for an expression or a block: or be arguments).
    """
    language: str
    text: str
    name: str
    kind: str
    parameters: _t.Optional[_t.Tuple[inspect.Parameter, ...]] = None
    free: _t.FrozenSet[str] = frozenset()
    function: _t.Any = dataclasses.field(default=None, compare=False, repr=False)

    @functools.cached_property
    def buffer(self) -> bytes:
        """The buffer of the ``code`` pin."""
        return serialize(self.text, "text")

    @functools.cached_property
    def checksum(self) -> Checksum:
        """The checksum of ``buffer``."""
        return Checksum.of(self.buffer)

    @functools.cached_property
    def pin(self):
        """The ``code`` pin."""
        return _CODE_PINS[self.language] + (self.checksum,)

    @functools.cached_property
    def required(self) -> _t.FrozenSet[str]:
        """Parameters without a default."""
        return frozenset(p.name for p in self.parameters or () if p.default is p.empty)

    @functools.cached_property
    def names(self) -> _t.FrozenSet[str]:
        """All parameters."""
        return frozenset(p.name for p in self.parameters or ())

    @functools.cached_property
    def positional(self) -> _t.Tuple[str, ...]:
        """Parameters that may be given by position."""
        return tuple(p.name for p in self.parameters or () if p.kind is p.POSITIONAL_OR_KEYWORD)

    def bind(self, args: _t.Sequence, kwargs: _t.Mapping) -> _t.Dict[str, object]:
        """The arguments by name; defaults are left out.  Raises ``FunctionError`` for what the code cannot take."""
        if self.parameters is None:
            if args:
                raise FunctionError("%s takes its inputs by name: call it with name=value" % self.name)
            for name in kwargs:
                check_input_name(name, self.name)
            return dict(kwargs)
        if len(args) > len(self.positional):
            raise FunctionError("%s takes %d positional argument%s (%d given)" % (
                self.name, len(self.positional), "" if len(self.positional) == 1 else "s", len(args)))
        bound = dict(zip(self.positional, args))
        for name, value in kwargs.items():
            if name in bound:
                raise FunctionError("%s got two values for its parameter '%s'" % (self.name, name))
            if name not in self.names:
                raise FunctionError("%s has no parameter '%s'; it has %s" % (
                    self.name, name, ", ".join("'%s'" % p.name for p in self.parameters) or "none"))
            bound[name] = value
        if not self.required <= bound.keys():
            missing = [p.name for p in self.parameters if p.name in self.required and p.name not in bound]
            raise FunctionError("%s needs a value for its parameter%s %s" % (
                self.name, "s" if len(missing) > 1 else "", ", ".join("'%s'" % name for name in missing)))
        return bound

    def check(self, available: _t.Collection[str]) -> None:
        """Raise ``FunctionError`` if the code uses a name that is neither its own nor in ``available``."""
        missing = sorted(self.free.difference(available))
        if missing:
            raise FunctionError(_missing_sentence(self, missing))


def check_input_name(name: str, owner: str) -> None:
    """Raise ``FunctionError`` if no pin can be called ``name``."""
    if name in ("code", "result"):
        raise FunctionError("%s has an input called '%s', a name that every transformation uses itself: "
                            "give it another name" % (owner, name))
    if not name or name.startswith("__") or name.startswith("META__"):
        raise FunctionError("%s has an input called '%s'; names that start with '__' or 'META__' are reserved: "
                            "give it another name" % (owner, name))


# --- code ---------------------------------------------------------------------------------------------

def python_code(function) -> Code:
    """The ``Code`` of a function; to be made once per function.  Raises ``FunctionError`` with the cure."""
    function = getattr(function, "__wrapped_function__", function)
    plain = _plain_function(function)
    if plain is not function:
        warnings.warn("the decorators of %s are not part of the transformation: it runs without them" % plain.__name__,
                      stacklevel=4)
    return _function_code(plain)


def _plain_function(function) -> types.FunctionType:
    """The undecorated Python function; everything else is refused by name."""
    name = getattr(function, "__name__", None) or type(function).__name__
    if isinstance(function, (classmethod, staticmethod)):
        raise FunctionError("%s is a %s object: put the decorator for transformations below @%s"
                            % (getattr(function.__func__, "__name__", name), type(function).__name__,
                               type(function).__name__))
    if inspect.isclass(function):
        raise FunctionError("%s is a class, not a function: call it inside a function" % name)
    if inspect.ismethod(function):
        raise FunctionError("%s is a method of an object, which is not an input that can be named by its content: "
                            "write a function that takes what it needs as parameters" % function.__qualname__)
    if isinstance(function, functools.partial):
        raise FunctionError("%r is a functools.partial: write a function, and pass it all arguments"
                            % getattr(function.func, "__name__", function.func))
    try:
        plain = inspect.unwrap(function)
    except ValueError:
        plain = function
    if not inspect.isfunction(plain):
        raise FunctionError("'%s' is a %s without Python source: call it inside a function of your own, made "
                            "with 'def'" % (name, type(plain).__name__))
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise FunctionError("%s is an async function, whose result only an event loop can make: define it with "
                            "'def'" % name)
    if inspect.isgeneratorfunction(plain):
        raise FunctionError("%s is a generator, which has no single result: return a list instead of using 'yield'"
                            % name)
    return plain


def _function_code(function: types.FunctionType) -> Code:
    is_lambda = function.__name__ == "<lambda>"
    name = "the lambda" if is_lambda else function.__name__
    parameters = _check_parameters(inspect.signature(function, follow_wrapped=False).parameters.values(), name)
    text = lambda_text(function) if is_lambda else undecorated(definition(function))
    code = _string_python(text, name)
    if code.kind != ("lambda" if is_lambda else "function") or code.names != frozenset(p.name for p in parameters):
        raise FunctionError("the source that Python finds for %s is not its own: has the file changed since it was "
                            "imported?  Import it again" % name)
    return dataclasses.replace(code, parameters=parameters, function=function)


def _check_parameters(parameters, name) -> _t.Tuple[inspect.Parameter, ...]:
    parameters = tuple(parameters)
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise FunctionError("%s takes %s%s, so its inputs have no fixed names: give each its own parameter" % (
                name, "*" if p.kind == p.VAR_POSITIONAL else "**", p.name))
        if p.kind == p.POSITIONAL_ONLY:
            raise FunctionError("parameter '%s' of %s is positional-only, but inputs are passed by name: remove "
                                "the '/'" % (p.name, name))
        check_input_name(p.name, name)
    return parameters


def string_code(text: str, language: str = "python") -> Code:
    """The ``Code`` of source text.  Raises ``FunctionError`` if it is not valid in this Python."""
    if not isinstance(text, str) or not text.strip():
        raise FunctionError("there is no code: give the source text as a string")
    if language == "bash":
        return Code(language, text.rstrip("\n") + "\n", "the command", "shell")
    if language != "python":
        raise FunctionError("code in the language %r cannot be run; one of python, bash" % language)
    return _string_python(text.rstrip("\n") + "\n", "the code")


def _string_python(text: str, name: str) -> Code:
    kind, node = code_kind(text, name)
    if kind in ("function", "lambda"):
        if kind == "function":
            name = node.name
        arguments = node.args
        parameters = _check_parameters(_parameters(arguments), name)
        return Code("python", text, name, kind, parameters, _all_free(text))
    return Code("python", text, name, kind, None, _all_free(text))


def _parameters(arguments: ast.arguments) -> _t.Iterator[inspect.Parameter]:
    """The parameters as ``inspect`` has them; a default is only known to be there."""
    P = inspect.Parameter
    positional = arguments.posonlyargs + arguments.args
    first_default = len(positional) - len(arguments.defaults)
    for i, arg in enumerate(positional):
        kind = P.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else P.POSITIONAL_OR_KEYWORD
        yield P(arg.arg, kind, default=P.empty if i < first_default else ...)
    if arguments.vararg:
        yield P(arguments.vararg.arg, P.VAR_POSITIONAL)
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        yield P(arg.arg, P.KEYWORD_ONLY, default=P.empty if default is None else ...)
    if arguments.kwarg:
        yield P(arguments.kwarg.arg, P.VAR_KEYWORD)


def _all_free(text: str) -> _t.FrozenSet[str]:
    names = free_names(text)
    return names.now | names.later


def _missing_sentence(code: Code, missing: _t.List[str]) -> str:
    name, more = missing[0], ""
    if len(missing) > 1:
        more = " (the same for %s)" % ", ".join("'%s'" % other for other in missing[1:])
    if code.function is None:
        return "%s uses the name '%s'%s, which is not defined in it: define it, or pass it as an input" % (
            code.name, name, more)
    owner = code.name if code.kind == "function" else "f"
    cells = dict(zip(code.function.__code__.co_freevars, code.function.__closure__ or ()))
    try:
        value = cells[name].cell_contents if name in cells else code.function.__globals__[name]
    except (KeyError, ValueError):
        return "%s uses the name '%s'%s, which is not defined anywhere: define it inside" % (code.name, name, more)
    where = "a variable of the function around it" if name in cells else "defined outside of it"
    share = "set %s.globals.%s = %s" % (owner, name, name)
    module = getattr(value, "__module__", None)
    if inspect.ismodule(value):
        text = "import %s" % value.__name__ + (" as %s" % name if value.__name__ != name else "")
        cure = "write '%s' inside it (or, for a module of your own, set %s.modules.%s = %s)" % (text, owner, name, name)
        where = "imported outside of it"
    elif callable(value) and isinstance(module, str) and module != code.function.__module__:
        original = getattr(value, "__name__", name)
        text = "from %s import %s" % (module, original) + (" as %s" % name if original != name else "")
        cure = "write '%s' inside it, or %s" % (text, share)
    elif callable(value):
        cure = share + ", or define it inside"
    else:
        cure = share + ", or make it a parameter"
    return "%s uses '%s', %s%s, which does not exist where it runs: %s" % (code.name, name, where, more, cure)


# --- recipes --------------------------------------------------------------------------------------------

_EMPTY: _t.Mapping = types.MappingProxyType({})


def build_recipe(code: Code, arguments: _t.Mapping[str, object], celltypes: _t.Mapping[str, str] = _EMPTY,
                 modules: _t.Mapping[str, object] = _EMPTY, globals_: _t.Mapping[str, object] = _EMPTY):
    """(``Recipe``, {checksum: bytes}) of ``code`` called with ``arguments`` (what ``Code.bind`` gives).

    An argument is a value, a ``Checksum`` or 64 hex digits (the checksum of the input), or None.  Raises
    ``FunctionError`` if the code cannot run in a sandbox, ``CelltypeError`` if an argument does not fit.
    """
    around = _surroundings(code, modules, globals_) if modules or globals_ else NOTHING
    if code.free and not code.free <= around.names:
        code.check(around.names if code.parameters is not None else around.names | set(arguments))
    if celltypes:
        _check_celltypes(code, celltypes)
    pins = {"code": code.pin}
    buffers = {code.checksum: code.buffer}
    formats = {}
    for name, value in arguments.items():
        celltype = celltypes.get(name, "mixed")
        first, second = _PINS.get(celltype) or (celltype, None)
        if value is None:
            checksum = None
        elif isinstance(value, str) and len(value) == 64 and is_checksum(value):
            checksum = Checksum(value)
        else:
            checksum = _add_buffer(buffers, value, celltype, name, code)
        pins[name] = (first, second, checksum)
        if celltype == "folder" or celltype == "deepfolder":
            formats[name] = {"celltype": celltype, "filesystem": {"mode": "directory"}}
    if around is not NOTHING:
        for name in around.pins:
            if name in arguments:
                raise FunctionError("%s has a parameter and a module that are both called '%s': rename one" % (
                    code.name, name))
        pins.update(around.pins)
        buffers.update(around.buffers)
    output = ("result", celltypes.get("result", "mixed"), None)
    return Recipe(code.language, pins, output, {"__format__": formats} if formats else {}), buffers


def _add_buffer(buffers, value, celltype, name, code) -> Checksum:
    try:
        if celltype in DEEP:
            data, leaves = pack_deep(value, celltype)
            buffers.update(leaves)
        else:
            data = serialize(value, celltype)
    except CelltypeError as exc:
        raise CelltypeError("input '%s' of %s: %s" % (name, code.name, exc)) from None
    checksum = Checksum.of(data)
    buffers[checksum] = data
    return checksum


def _check_celltypes(code: Code, celltypes: _t.Mapping[str, str]) -> None:
    for name, celltype in celltypes.items():
        if celltype not in CELLTYPES:
            raise FunctionError("celltype of '%s' of %s is %r; one of %s" % (
                name, code.name, celltype, ", ".join(sorted(CELLTYPES - _REFUSED))))
        if celltype in _REFUSED or (celltype == "module" and (name == "result" or code.parameters is not None)):
            raise FunctionError("'%s' of %s cannot have the celltype '%s': use 'text'%s" % (
                name, code.name, celltype, ", or .modules for a module" if celltype == "module" else ""))
        if code.parameters is not None and name != "result" and name not in code.names:
            raise FunctionError("%s has a celltype for '%s', which is not one of its parameters" % (code.name, name))


def _surroundings(code: Code, modules, globals_) -> Surroundings:
    """``surround``, remembered for the latest call as long as nothing in it can have changed."""
    known = code.__dict__.get("_around")
    if known is None or not known.is_for(modules, globals_):
        known = code.__dict__["_around"] = surround(code.name, modules, globals_)
    return known
