"""The source text of functions and classes, and the names that a piece of source needs from outside.

The text of a function is what is hashed (compat/identity.md 4.1): its source, dedented, without decorators.
Where that recipe breaks a function (decorators of several lines, form feeds, strings that reach further left
than the function) the text is corrected here; Seamless 1.x cannot run those at all.

What Python takes for the source of a function may be another text by now; it is compiled again to see that.
"""
import ast
import builtins
import dis
import functools
import importlib.machinery
import inspect
import linecache
import os
import re
import sys
import textwrap
import time
import types
import typing as _t

from .errors import FunctionError
from .usercode import compile_user, parse_user

#: Names that need no definition.
KNOWN = (frozenset(dir(builtins)) - {"display", "get_ipython", "__IPYTHON__"}) | {
    "__name__", "__doc__", "__package__", "__builtins__", "__spec__", "__loader__", "__annotations__", "__module__",
    "__qualname__"}
#: What ``str.splitlines`` takes for the end of a line and Python does not.
_ODD_BREAK = re.compile("[\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
#: A file written before this cannot have changed under the program.
_BEGIN = time.time()


# --- the text ---------------------------------------------------------------------------------------

def definition(thing) -> str:
    """The dedented source of a function or class, decorators included.  Raises ``FunctionError``."""
    name = thing.__name__
    try:
        text = textwrap.dedent(_source(thing))
    except (OSError, TypeError, IndentationError, SyntaxError):
        raise FunctionError("the source of '%s' cannot be found (was it typed in a console, or made with exec?): "
                            "put it in a file or a notebook, or give its source text instead" % name) from None
    except Exception as exc:            # the tokenizer's own errors differ between versions
        raise FunctionError("the source of '%s' cannot be read (%s): put it in a file" % (name, exc)) from None
    try:
        tree = parse_user(text)
    except SyntaxError:
        text = _dedent_by_first_line(text)
        try:
            tree = parse_user(text)
        except SyntaxError:
            raise FunctionError("the source of '%s' cannot be cut out of its file: define it at the left margin, "
                                "on lines of its own" % name) from None
    own = thing.__code__.co_name if inspect.isfunction(thing) else name         # __name__ may have been set
    if getattr(tree.body[0], "name", None) != own or (inspect.isfunction(thing) and _has_changed(thing)):
        raise FunctionError("the source that Python finds for '%s' is not its own: has the file changed since it "
                            "was imported?  Import it again" % name)
    return text


def _source(thing) -> str:
    text = _command_text(thing)
    if text is None:
        return inspect.getsource(thing)
    lines = [line + "\n" for line in text.split("\n")]
    return "".join(inspect.getblock(lines[thing.__code__.co_firstlineno - 1:]))


def undecorated(text: str) -> str:
    """``text``, the source of one function, as identity.md 4.1 has it: no decorators, one newline at the end."""
    node = parse_user(text).body[0]
    cut = max((d.end_lineno or 0 for d in node.decorator_list), default=0)
    exact = "\n".join(text.split("\n")[cut:])
    if not _ODD_BREAK.search(exact):
        return exact.rstrip("\n") + "\n"
    plain = "\n".join(exact.splitlines()).rstrip("\n") + "\n"       # what Seamless 1.x makes of form feeds
    try:
        same = ast.dump(parse_user(plain)) == ast.dump(parse_user(exact))
    except SyntaxError:
        same = False
    return plain if same else exact.rstrip("\n") + "\n"


def lambda_text(function) -> str:
    """The text of a lambda, from the word ``lambda`` on.  Raises ``FunctionError``."""
    try:
        text = _command_text(function) or "".join(inspect.findsource(function)[0])
        tree = parse_user(text)
    except (OSError, TypeError, SyntaxError, IndexError):
        raise FunctionError("the source of a lambda cannot be found: write it as a function with 'def', in a file "
                            "or a notebook, or give its source text instead") from None
    number = function.__code__.co_firstlineno
    found = {ast.get_source_segment(text, node) for node in ast.walk(tree)
             if isinstance(node, ast.Lambda) and node.lineno == number}
    if len(found) > 1:
        found = {segment for segment in found if _same_code(segment, function.__code__)}
    if _has_changed(function):
        raise FunctionError("line %d is not the source of the lambda any more: import its file again" % number)
    if len(found) != 1:
        raise FunctionError("there are several lambdas on line %d, or its text cannot be found: give the lambda a "
                            "line of its own, or write it as a function with 'def'" % number)
    segment = found.pop()
    if "\n" in segment:
        raise FunctionError("the lambda on line %d is spread over several lines: write it as a function with 'def'"
                            % number)
    return segment + "\n"


def _same_code(segment, code) -> bool:
    try:
        other = compile_user(segment, "<lambda>", "eval").co_consts[0]
    except SyntaxError:
        return False
    return _essence(other) == _essence(code)


def _dedent_by_first_line(text: str) -> str:
    # A string inside the function may have lines further left than the function; they stay as they are.
    indent = re.match(r"[ \t]*", text).group()
    return re.sub(r"(?m)^" + indent, "", text) if indent else text


# --- is it the right text? ----------------------------------------------------------------------------

def _command_text(thing) -> _t.Optional[str]:
    """The text after ``python -c``, if the function was defined there; None if it comes from a file or a notebook.

    Raises ``OSError`` if it was defined somewhere else that has no name, as by ``exec``.
    """
    code = getattr(thing, "__code__", None)
    if code is None or code.co_filename != "<string>" or hasattr(sys.modules.get("__main__"), "__file__"):
        return None
    candidates = ["".join(linecache.getlines("<string>"))]          # from 3.13 on Python keeps the text itself
    for word in _command_line():
        candidates += [word, word.partition("c")[2]]                # "-c", text; or both in one word
    for text in candidates:
        if _contains(text, code):
            return text
    raise OSError("no text is known for this function")


def _command_line() -> _t.List[str]:
    """The words with which this Python was started; none if the system does not tell."""
    words = getattr(sys, "orig_argv", None)
    if words is None:                       # before 3.10
        try:
            with open("/proc/self/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")]
        except OSError:
            words = []
    return words[1:]


def _has_changed(function) -> bool:
    """Whether the function's file was written to in our time and now has other code where the function was."""
    if type(function.__globals__.get("__loader__")) is not importlib.machinery.SourceFileLoader:
        return False                        # what other loaders compile need not be what the file says (pytest's assert)
    try:
        if os.stat(function.__code__.co_filename).st_mtime < _BEGIN:
            return False
        lines, _ = inspect.findsource(function)
    except OSError:
        return False
    return not _contains("".join(lines), function.__code__)


def _contains(text: str, code: types.CodeType) -> bool:
    """Whether the module ``text`` has a function with this code, on the same line."""
    same_place = _codes(text).get((code.co_name, code.co_firstlineno), ())
    return any(_essence(other) == _essence(code) for other in same_place)


@functools.lru_cache(maxsize=8)
def _codes(text: str) -> _t.Dict[_t.Tuple[str, int], _t.List[types.CodeType]]:
    """The code of all functions in a module text by name and line; nothing if it is no Python."""
    found: _t.Dict[_t.Tuple[str, int], _t.List[types.CodeType]] = {}
    try:
        todo = [compile_user(text, "<module>", "exec", 0)]
    except (SyntaxError, ValueError):       # the latter: a NUL, or half a surrogate pair
        return found
    while todo:
        code = todo.pop()
        found.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        todo.extend(filter(inspect.iscode, code.co_consts))
    return found


def _essence(code: types.CodeType) -> tuple:
    """What makes two code objects do the same."""
    constants = [_essence(value) if inspect.iscode(value) else (type(value), value) for value in code.co_consts]
    return code.co_code, code.co_varnames, code.co_names, code.co_freevars, constants


# --- names --------------------------------------------------------------------------------------------

class Names(_t.NamedTuple):
    """What a module text uses without defining it, ``now`` (when it is executed) or ``later`` (by its functions),
    and what it ``defines``."""
    now: _t.FrozenSet[str]
    later: _t.FrozenSet[str]
    defines: _t.FrozenSet[str]


def free_names(text: str) -> Names:
    """The names that ``text`` (a module, a function, an expression) needs from outside; builtins not counted."""
    tree = parse_user(text)
    now: _t.Set[str] = set()
    later: _t.Set[str] = set()
    defined: _t.Set[str] = set()
    _scan(compile_user(tree, "<names>"), True, now, later, defined)
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)):
        return Names(frozenset(), frozenset(), frozenset(defined))      # then nobody can know
    return Names(frozenset(now - defined) - KNOWN, frozenset(later - defined) - KNOWN, frozenset(defined))


def _scan(code: types.CodeType, at_once: bool, now, later, defined) -> None:
    """Add the global names that ``code`` loads to ``now`` or ``later``, and those it defines to ``defined``."""
    is_module = code.co_name == "<module>"
    loads, stores = set(), set()
    for instruction in dis.get_instructions(code):
        op, name = instruction.opname, instruction.argval
        if op in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            loads.add(name)
        elif op == "STORE_GLOBAL" or (op == "STORE_NAME" and is_module):
            defined.add(name)
        elif op == "STORE_NAME":
            stores.add(name)
    (now if at_once else later).update(loads - stores)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            runs_now = constant.co_name in _COMPREHENSIONS or not constant.co_flags & inspect.CO_OPTIMIZED
            _scan(constant, at_once and runs_now, now, later, defined)
