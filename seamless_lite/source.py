"""The source text of functions and classes, and the names that a piece of source needs from outside.

The text of a function is what is hashed (compat/identity.md 4.1): its source, dedented, without decorators.
Where that recipe breaks a function (decorators of several lines, form feeds, strings that reach further left
than the function) the text is corrected here; Seamless 1.x cannot run those at all.
"""
import ast
import builtins
import dis
import inspect
import re
import textwrap
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


# --- the text ---------------------------------------------------------------------------------------

def definition(thing) -> str:
    """The dedented source of a function or class, decorators included.  Raises ``FunctionError``."""
    name = thing.__name__
    try:
        text = textwrap.dedent(inspect.getsource(thing))
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
    if getattr(tree.body[0], "name", None) != own:
        raise FunctionError("the source that Python finds for '%s' is not its own: has the file changed since it "
                            "was imported?  Import it again" % name)
    return text


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
        lines, _ = inspect.findsource(function)
        text = "".join(lines)
        tree = parse_user(text)
    except (OSError, TypeError, SyntaxError, IndexError):
        raise FunctionError("the source of a lambda cannot be found: write it as a function with 'def', in a file "
                            "or a notebook, or give its source text instead") from None
    number = function.__code__.co_firstlineno
    found = {ast.get_source_segment(text, node) for node in ast.walk(tree)
             if isinstance(node, ast.Lambda) and node.lineno == number}
    if len(found) > 1:
        found = {segment for segment in found if _same_code(segment, function.__code__)}
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
    def essence(c):
        return c.co_code, c.co_varnames, c.co_names, [value for value in c.co_consts if not inspect.iscode(value)]
    return essence(other) == essence(code)


def _dedent_by_first_line(text: str) -> str:
    # A string inside the function may have lines further left than the function; they stay as they are.
    indent = re.match(r"[ \t]*", text).group()
    return re.sub(r"(?m)^" + indent, "", text) if indent else text


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
