"""YAML files as values that know where they stand.

``load(path)`` gives a ``Node``: a value, and the file and line to name when it is wrong.  The functions below
it (``text``, ``choice``, ``read`` ...) turn nodes into plain values, or raise ``ConfigurationError`` with one
sentence that names the place, the offending word and, where words can be compared, the nearest valid one.

Two liberties: a line that holds nothing but ``...`` counts as a comment, since documents use it for "and so
on"; and dates are text.  PyYAML is imported by the first file that exists: it takes 10 ms, which a run without
configuration need not pay.
"""
import os

from .errors import ConfigurationError

_MAX_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + word for word in ("str", "timestamp", "value", "merge")}
_TAGS = {"scalar": _TEXT_TAGS | {_TAG + word for word in ("null", "bool", "int", "float")},
         "sequence": {_TAG + "seq"}, "mapping": {_TAG + "map"}}
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_NAME = _LETTERS + "@_.~-"              # what Seamless 1.x accepts in a storage path
_HOST = _LETTERS + "@_.:%[]-"           # names, addresses of both families, user@host


class Node:
    """A value and its place.

    ``value`` is None, a bool, int, float or str, a list of nodes, or a dict of nodes by key; ``text`` is a scalar as it
    was written (for YAML ``12:00:00`` is a number, for people it is a time); ``file`` is "" for what no file says.
    The line of a value in a mapping is that of its key.
    """
    __slots__ = ("value", "file", "line", "text")

    def __init__(self, value, file="", line=0, text=None):
        self.value, self.file, self.line = value, file, line
        self.text = text if text is not None else value if isinstance(value, str) else ""

    @property
    def where(self) -> str:
        """``FILE:LINE``, or as much of it as is known."""
        return "%s:%d" % (self.file, self.line) if self.line else self.file

    def error(self, message: str) -> ConfigurationError:
        """The exception that says ``message`` about this place."""
        return ConfigurationError("%s: %s" % (self.where, message) if self.where else message)

    def must(self, key, rest: str) -> ConfigurationError:
        """The exception that says that this, the value of ``key``, "must" be or hold something else."""
        return self.error("%r is %s, and must %s" % (key, self.shown(), rest))

    def shown(self) -> str:
        """The value as a message shows it."""
        if self.value is None:
            return "empty"
        if isinstance(self.value, (list, dict)):
            return "a mapping" if isinstance(self.value, dict) else "a list"
        return repr(self.value) if isinstance(self.value, str) else self.text or str(self.value)

    def plain(self):
        """The value without places, to hand on to others."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value

    @classmethod
    def of(cls, value, file: str) -> "Node":
        """The node for a ``value`` that another format (JSON) gave; ``file`` says from where."""
        if isinstance(value, list):
            value = [cls.of(item, file) for item in value]
        elif isinstance(value, dict):
            value = {key: cls.of(item, file) for key, item in value.items()}
        return cls(value, file)


# --- files to nodes

def load(path: str):
    """The content of the YAML file ``path`` as a ``Node`` (of value None if it is empty); None if there is no file.

    Raises ``ConfigurationError`` for what cannot be read or is not one YAML document.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigurationError("%s: cannot be read: %s" % (path, exc.strerror)) from None
    if len(data) > _MAX_BYTES:
        raise ConfigurationError("%s: the file is larger than 1 MB, which no configuration is" % path)
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise Node(None, path, line).error("the file is not UTF-8 text; save it as UTF-8") from None
    if "..." in content:
        content = "\n".join("" if line.strip() == "..." else line for line in content.split("\n"))
    try:
        import yaml
    except ImportError:
        raise ConfigurationError("%s: cannot be read without PyYAML; install it: pip install PyYAML" % path) from None
    loader_class = yaml.SafeLoader if _may_be_deep(content) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        loader = loader_class(content)
        root = loader.get_single_node()
        return Node(None, path, 1) if root is None else _Reader(path, loader).node(root)
    except yaml.YAMLError as exc:
        raise _syntax_error(yaml, path, content, exc) from None
    except RecursionError:
        raise ConfigurationError("%s: the file is nested too deeply" % path) from None


def _may_be_deep(content) -> bool:
    """True if the nesting might overflow the stack of libyaml, which then kills the process."""
    return (content.count("[") + content.count("{") > 2000
            or any(line.count("- ") + line.count("? ") > 200 for line in content.split("\n")))


class _Reader:
    """Turns what PyYAML composed into nodes.  ``values`` remembers what each anchor stands for."""
    BUSY = object()

    def __init__(self, path, loader):
        self.path = path
        self.loader = loader
        self.values = {}

    def node(self, raw, line=None) -> Node:
        line = line or raw.start_mark.line + 1
        return Node(self.value(raw, line), self.path, line, raw.value if raw.id == "scalar" else "")

    def error(self, line, message):
        return Node(None, self.path, line).error(message)

    def value(self, raw, line):
        if raw.tag not in _TAGS[raw.id]:
            raise self.error(raw.start_mark.line + 1, "the tag %r means nothing here; remove it" % raw.tag)
        found = self.values.get(id(raw))
        if found is self.BUSY:
            raise self.error(line, "an alias stands inside of what it stands for; write the value out")
        if found is None:
            self.values[id(raw)] = self.BUSY
            found = self.values[id(raw)] = getattr(self, raw.id)(raw)
        return found

    def scalar(self, raw):
        if raw.tag in _TEXT_TAGS:
            return None if raw.value == "..." and raw.style is None else raw.value
        try:
            return self.loader.construct_object(raw)
        except (ValueError, KeyError):       # '!!int four', '0b_': it is text, and refused as such
            return raw.value

    def sequence(self, raw):
        return [self.node(item) for item in raw.value]

    def mapping(self, raw):
        merged, items = {}, {}
        for key, value in raw.value:
            line = key.start_mark.line + 1
            if key.tag == _TAG + "merge":
                for source in value.value if value.id == "sequence" else [value]:
                    if source.id != "mapping":
                        raise self.error(line, "'<<' must name a mapping, or a list of mappings")
                    for name, node in self.value(source, line).items():
                        merged.setdefault(name, node)
            elif key.id != "scalar" or not key.value:
                raise self.error(line, "a key must be one word before the ':'")
            elif key.value in items:
                raise self.error(line, "the key %r stands here a second time, after line %d; remove one of them"
                                 % (key.value, items[key.value].line))
            else:
                items[key.value] = self.node(value, line)
        return {**merged, **items}


#: What the parser says, what we say, and whether it noticed late: then the place is where it began.
_PROBLEMS = (
    ("'\\t'", "a tab indents the line; use spaces", False),
    ("mapping values are not allowed here", "the ': ' in this line does not fit: the line above may lack its ':', this "
     "one may be indented too far, or its value may need quotes", False),
    ("expected <block end>", "the line is not indented like the lines that it belongs to", False),
    ("found unexpected end of stream", "a quote is opened here and never closed", True),
    ("could not find expected ':'", "a ':' is missing after this word", True),
    ("<stream end>", "the file ends where something is missing, perhaps a closing bracket", False),
    ("but found another document", "a second document starts here; keep one, without '---' lines between", False))


def _syntax_error(yaml, path, content, exc) -> ConfigurationError:
    """One sentence for what the parser says; the Python parser is asked, since the texts of libyaml vary."""
    try:
        yaml.SafeLoader(content).get_single_node()
    except yaml.YAMLError as other:
        exc = other
    except RecursionError:      # then what libyaml says must do
        pass
    if isinstance(exc, yaml.reader.ReaderError):
        line = content.count("\n", 0, exc.position) + 1
        return Node(None, path, line).error("the file holds a control character; remove it")
    problem, mark = getattr(exc, "problem", None) or str(exc), getattr(exc, "problem_mark", None)
    for part, sentence, is_late in _PROBLEMS:
        if part in problem:
            mark = exc.context_mark if is_late else mark
            break
    else:
        sentence = "this is not YAML: %s; a value with special characters needs quotes" % problem
        if problem.startswith("found character"):
            sentence = "a value cannot start with%s; put it in quotes" % problem[15:].split(" that cannot")[0]
    return Node(None, path, mark.line + 1 if mark is not None else 0).error(sentence)


# --- nodes to values.  All take the key that the value stands under, for the message.

def nearest(word, choices) -> str:
    """``: did you mean 'x'?`` if one of ``choices`` resembles ``word``, else ""."""
    import difflib      # only errors need it
    lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), lower, 1, 0.5)
    return ": did you mean %r?" % lower[found[0]] if found else ""


def listed(words) -> str:
    """The words with commas."""
    return ", ".join(words) or "none"


def null_or(check):
    """A check that lets an empty value pass as None."""
    return lambda key, node: None if node.value is None else check(key, node)


def text(key, node) -> str:
    """Non-blank text without control characters."""
    value = node.value
    if value is None:
        raise node.error("%r has no value; write one after the ':'" % key)
    if isinstance(value, (bool, int, float)):
        raise node.error("%r is %s, which YAML takes for a %s; put it in quotes"
                         % (key, node.shown(), "truth value" if isinstance(value, bool) else "number"))
    if not isinstance(value, str):
        raise node.must(key, "be text")
    if not value.strip() or not value.isprintable():
        raise node.must(key, "be text that can be seen")
    return value.strip()


def text_or_number(key, node) -> str:
    """Text, or a number as it is written: ``walltime: 12:00:00``, ``memory: 16GB``."""
    if isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.text or str(node.value)
    return text(key, node)


def boolean(key, node) -> bool:
    """``true`` or ``false``."""
    if not isinstance(node.value, bool):
        raise node.must(key, "be true or false" + nearest(node.text, ("true", "false")))
    return node.value


def whole(key, node, most=None) -> int:
    """A whole number of at least 1 (and at most ``most``)."""
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
        raise node.must(key, "be a whole number " + ("from 1 to %d" % most if most else "of at least 1"))
    return value


def port(key, node) -> int:
    """A TCP port."""
    return whole(key, node, 65535)


def choice(*choices):
    """A check for one of ``choices``."""
    def check(key, node):
        if node.value not in choices:
            raise node.must(key, "be one of %s%s" % (listed(choices), nearest(node.text, choices)))
        return node.value
    return check


def member(key, node, choices, whose) -> str:
    """One of the names in ``choices``, which a message calls ``whose`` ("the clusters")."""
    word = text(key, node)
    if word not in choices:
        raise node.error("%r is %r, and %s are %s%s" % (key, word, whose, listed(choices), nearest(word, choices)))
    return word


def name(key, node) -> str:
    """A name that becomes a folder: of a cluster, project, stage."""
    word = text(key, node)
    bad = word.strip(_NAME)
    if bad:
        raise node.error("%r is %r, with a %r in it; a name consists of letters, digits and @ _ . ~ -"
                         % (key, word, bad[0]))
    if word in (".", ".."):
        raise node.error("%r is %r, which is no name for a folder" % (key, word))
    for mark in ("--", "STAGE-"):
        if mark in word:
            raise node.error("%r is %r, and a name must not contain %r" % (key, word, mark))
    return word


def path_name(key, node) -> str:
    """A name of several parts with ``/`` between them; "" for none."""
    if node.value == "":
        return ""
    return "/".join(name(key, Node(part, node.file, node.line)) for part in text(key, node).split("/"))


def host(key, node) -> str:
    """A host name or address, also ``user@host``; not something that ssh would take for an option."""
    word = text(key, node)
    if word.strip(_HOST) or word.startswith("-"):
        raise node.error("%r is %r, which is not the name or the address of a host" % (key, word))
    return word


def mapping(key, node) -> dict:
    """A mapping, as nodes by key; an empty value is an empty mapping."""
    if not isinstance(node.value, (dict, type(None))):
        raise node.must(key, "be a mapping: lines like 'key: value', indented below it")
    return node.value or {}


def lines(key, node) -> tuple:
    """Lines of text: a list of them, or one text of one or more lines."""
    found = []
    for item in node.value if isinstance(node.value, list) else [node]:
        found += item.value.splitlines() if isinstance(item.value, str) else [text_or_number(key, item)]
    return tuple(found)


def raw(key, node) -> Node:
    """The node itself, to be looked at later, also when it is empty."""
    return node


def read(what, node, checks, dashes=False) -> dict:
    """The values of the mapping ``node``, each checked by ``checks[key]``; an empty value is None.

    ``what`` is what the mapping is called in messages; with ``dashes`` a key may have ``-`` for ``_``.
    """
    values = {}
    for written, child in mapping(what, node).items():
        key = written.replace("-", "_") if dashes else written
        check = checks.get(key)
        if check is None:
            raise child.error("unknown key %r in %r%s" % (
                written, what, nearest(key, checks) or "; its keys are " + listed(checks)))
        if key in values:
            raise child.error("the key %r stands in %r a second time; remove one of them" % (key, what))
        values[key] = None if child.value is None and check is not raw else check(written, child)
    return values


def expand(path: str, home: str, folder: str = "") -> str:
    """``path`` as an absolute path: ``~`` is ``home``; a relative path starts at ``folder``, else where we are."""
    if path == "~" or path.startswith("~/"):
        path = home.rstrip("/") + path[1:]
    elif path.startswith("~"):
        path = os.path.expanduser(path)
    path = os.path.abspath(os.path.join(folder, path))
    return path[1:] if path.startswith("//") else path         # POSIX keeps two slashes, SQLite takes them for a host
