"""The user's Python code as text: parsed, compiled, and told apart into function, lambda, expression or block.

This is all that the side which runs code needs to know of it; where the text comes from is in ``source``.
"""
import __future__
import ast
import threading
import typing as _t
import warnings

from .errors import FunctionError

#: User code is compiled so that annotations are not evaluated: they may name what the sandbox does not have.
ANNOTATIONS = __future__.annotations.compiler_flag

_quiet = threading.Lock()       # catch_warnings changes a list that all threads share


def compile_user(source, filename: str, mode: str = "exec", flags: int = ANNOTATIONS):
    """``compile`` for text (or a syntax tree) of the user: our own future imports do not count."""
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")         # they were shown when the user's own file was compiled
        return compile(source, filename, mode, flags, dont_inherit=True)


def parse_user(text: str) -> ast.Module:
    """The syntax tree of ``text``.  Raises ``SyntaxError``, also for what ``ast.parse`` calls ``ValueError``."""
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except ValueError as exc:           # a NUL character
        raise SyntaxError(str(exc)) from None


def code_kind(text: str, name: str) -> _t.Tuple[str, _t.Any]:
    """(kind, syntax node) of Python code: "function" for exactly one ``def``, "lambda", "expression" or "block".

    Raises ``FunctionError`` if it does not parse or is an async function.
    """
    try:
        body = parse_user(text).body
    except SyntaxError as exc:
        raise FunctionError("%s is not valid Python (line %s: %s)" % (name, exc.lineno, exc.msg)) from None
    node = body[0] if len(body) == 1 else None
    if isinstance(node, ast.FunctionDef):
        return "function", node
    if isinstance(node, ast.AsyncFunctionDef):
        raise FunctionError("%s is an async function, whose result only an event loop can make: define it with "
                            "'def'" % node.name)
    if isinstance(node, ast.Expr):
        return ("lambda", node.value) if isinstance(node.value, ast.Lambda) else ("expression", node.value)
    return "block", None
