"""The words of a bash command: quotes, escapes, expansions.

``Scanner`` holds a text and a position in it.  It reads words; what is inside ``$(...)`` and ``<(...)`` is a command
again, so the parser of commands (bashparse) extends this class.  The inside of backquotes is only looked at
by bash when it runs, and so is arithmetic.
"""
import re
import typing as _t

from .errors import UsageError

#: How deep groups, loops and expansions may nest: far from Python's own limit of 1000 calls.
MAX_DEPTH = 50

NAME = "[A-Za-z_][A-Za-z0-9_]*"
_VARIABLE = re.compile(NAME)
ASSIGNMENT = re.compile(NAME + r"(?:\[.*\])?\+?=", re.DOTALL)
_PARAMETER = re.compile(NAME + r"|[0-9@*#?$!-]")
_BLANKS = re.compile(r"(?:[ \t]|\\\n)*(?:#[^\n\0]*)?")
_PLAIN = re.compile(r"""[^ \t\n;&|<>()\\'"`$?*+@![\]\0]*""")                # what means nothing in a word,
_PLAIN_QUOTED = re.compile(r'[^"\\`$\0]*')                                  # in double quotes,
_PLAIN_BRACKETED = re.compile(r"""[^()[\]{}\\'"`$\0]*""")                   # and in brackets
_QUOTES_AND_EXPANSIONS = frozenset("\\'\"`$")
_SINGLE_QUOTED = re.compile(r"'[^']*'")
_ANSI_QUOTED = re.compile(r"\$'[^'\\]*(?:\\.[^'\\]*)*'", re.DOTALL)
_BACKQUOTED = re.compile(r"`[^`\\]*(?:\\.[^`\\]*)*`", re.DOTALL)
EMPTY_PARENTHESES = re.compile(r"\((?:[ \t]|\\\n)*\)")
_TOKEN = re.compile(r"\$?['\"]|`|[$<>]?[({[]{1,2}|[;&|<>]+|[^ \t\n;&|<>()\0]{1,20}|.", re.DOTALL)
_ANSI_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|([0-7]{1,3})|c(.)|(.))", re.DOTALL)
_ANSI_LETTERS = dict(zip("abeEfnrtv\\'\"?", "\a\b\x1b\x1b\f\n\r\t\v\\'\"?"))


class Word(_t.NamedTuple):
    """``text`` is without quotes; an expansion stays in it as written, and then ``literal`` is False.

    ``quoted``: some of it was quoted or escaped; ``glob``: it has an unquoted ``*``, ``?``, ``[...]`` or
    extended glob (which is still ``literal``).  Brace and tilde expansions are plain text here.
    """
    text: str
    start: int
    end: int
    quoted: bool = False
    literal: bool = True
    glob: bool = False


def place(text: str, pos: int) -> str:
    """The position for people: "column 7", or "line 2, column 7"."""
    line = text.count("\n", 0, pos)
    column = "column %d" % (pos - text.rfind("\n", 0, pos))
    return "line %d, %s" % (line + 1, column) if line else column


def _ansi_c(text: str) -> str:
    """What ``$'text'`` stands for.  ``\\xc3\\xa9`` is one character, so bytes are put together at the end."""
    def replace(match):
        hexa, short, long, octal, control, letter = match.groups()
        if letter:
            return _ANSI_LETTERS.get(letter, match.group())
        if short or long:
            number = int(short or long, 16)
            return match.group() if 0xd800 <= number < 0xe000 or number > 0x10ffff else chr(number)
        byte = ord(control) & 31 if control else int(hexa, 16) if hexa else int(octal, 8) & 255
        return chr(byte) if byte < 128 else chr(0xdc00 + byte)

    text = _ANSI_ESCAPE.sub(replace, text).partition("\0")[0]
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


class Scanner:
    """A text, which ends in a NUL as a sentinel, and a position in it.

    Methods that take a position return the end of what starts there, and leave ``pos`` alone; the others start at
    ``pos`` and move it.
    """

    def __init__(self, text: str):
        self.text = text + "\0"
        self.pos = 0
        self.open: _t.List[int] = []                    # where the constructs that we are in start
        self.ends: _t.Dict[int, int] = {}               # of substitutions; what follows (( may be read twice
        self.substitutions = 0                          # how many $( and <( we are in
        self.heredocs: _t.List[_t.Tuple[Word, bool]] = []   # delimiter, with tabs?; they start at the next line
        self.backquoted: _t.Dict[int, str] = {}         # where backquotes open -> the command in them

    def commands_end(self, pos: int) -> int:
        """Read commands from ``pos`` up to a token that cannot start one, and return where that is.  May move ``pos``."""
        raise NotImplementedError

    def fail(self, what: str, pos: int):
        raise UsageError("the command has %s at %s" % (what, place(self.text, pos)))

    def unclosed(self, pos: int):
        self.fail("an unclosed %s" % _TOKEN.match(self.text, pos).group(), pos)

    def unexpected(self, pos: _t.Optional[int] = None):
        """Fail at the token that stands here, or at ``pos``."""
        pos = self.pos if pos is None else pos
        if self.text[pos] != "\0":
            self.fail("an unexpected %s" % _TOKEN.match(self.text, pos).group().replace("\n", "line end"), pos)
        if self.open:
            self.unclosed(self.open[-1])
        self.fail("an end that comes too early", pos)

    def char(self) -> str:
        return self.text[self.pos]

    def advance(self, end: int):
        """Go to ``end``, and over blanks and a comment."""
        self.pos = _BLANKS.match(self.text, end).end()

    def newlines(self) -> bool:
        """Skip blanks and line ends, and the here-documents that start after one.  Was there a line end?"""
        self.advance(self.pos)
        start = self.pos
        while self.char() == "\n":
            self.pos += 1
            for delimiter, tabs in self.heredocs:
                self.pos = self.heredoc_end(delimiter, tabs)
            self.heredocs = []
            self.advance(self.pos)
        return self.pos > start

    def heredoc_end(self, delimiter: Word, strip_tabs: bool) -> int:
        """The end of the here-document whose body starts here; the end of the text closes one too."""
        pos, end = self.pos, len(self.text) - 1
        while pos < end:
            start, line, joined = pos, "", True
            while joined and pos < end:
                stop = self.text.find("\n", pos, end)
                stop = end if stop < 0 else stop
                line += self.text[pos:stop]
                pos = min(stop + 1, end)
                joined = not delimiter.quoted and (len(line) - len(line.rstrip("\\"))) % 2 == 1
                line = line[:-1] if joined else line
            tabs = len(line) - len(line.lstrip("\t")) if strip_tabs else 0
            if line[tabs:] == delimiter.text:
                return pos
            if self.substitutions and line.startswith(delimiter.text + ")", tabs):
                return start + tabs + len(delimiter.text)   # $(cat <<E ... E)
        return end

    def nested(self, start: int, method, *args):
        """Call ``method`` for a construct that opens at ``start``."""
        if len(self.open) >= MAX_DEPTH:
            self.fail("more than %d constructs inside each other" % MAX_DEPTH, start)
        self.open.append(start)
        result = method(*args)
        self.open.pop()
        return result

    def word(self, role: str = "") -> _t.Optional[Word]:
        """The word here, or None.

        ``role`` is "first" where a command or its assignments may be: ``a[b c]=d``, ``a=(1 2)``; "declared" where
        only the latter may be; "element" in such an array: ``[b c]=d``; "regex" for one that may hold ``(a|b c)``.
        """
        text, start, pos = self.text, self.pos, self.pos
        parts: _t.List[str] = []
        quoted = glob = bracket = False
        literal = True
        while True:
            end = _PLAIN.match(text, pos).end()
            if end > pos:
                parts.append(text[pos:end])
                pos = end
            char, end = text[pos], pos + 1
            if char in " \t\n;&)\0" or char == "|" and role != "regex":
                break
            if char in _QUOTES_AND_EXPANSIONS:
                piece, whole, end = self.piece(pos)
                parts.append(piece)
                quoted = quoted or text[end - 1] in "'\"" or char == "\\" and piece != ""
                literal = literal and whole
                pos = end
                continue
            if char in "<>":
                if text[end] != "(":
                    break
                end = self.nested(pos, self.substitution_end, end)
                literal = False
            elif char == "(":
                if role == "regex":
                    end = self.bracketed(pos, end, "(", ")")
                elif role in ("first", "declared") and ASSIGNMENT.fullmatch(text, start, pos):
                    end = self.nested(pos, self.array_end, end)
                    literal = False
                else:
                    break
            elif char == "[":
                bracket = True
                if role == "element" and pos == start or role == "first" and _VARIABLE.fullmatch(text, start, pos):
                    end = self.bracketed(pos, end, "[", "]")
            elif char == "]":
                glob = glob or bracket
            elif text[end] == "(" and role != "regex" and not EMPTY_PARENTHESES.match(text, end):
                end = self.bracketed(end, end + 1, "(", ")")
                glob = True
            else:
                glob = glob or char in "*?"
            parts.append(text[pos:end])
            pos = end
        self.pos = pos
        return Word("".join(parts), start, pos, quoted, literal, glob) if pos > start else None

    def piece(self, pos: int) -> _t.Tuple[str, bool, int]:
        """The quoted text or expansion at ``pos``: its text, whether it is literal, its end."""
        text, char = self.text, self.text[pos]
        if char == "\\":
            end = min(pos + 2, len(text) - 1)
            return "" if text[pos + 1] == "\n" else text[pos + 1:end] or char, True, end
        if char == '"':
            return self.double_quoted(pos)
        if char == "$":
            if text[pos + 1] == '"':
                return self.double_quoted(pos + 1)
            if text[pos + 1] != "'":
                end = self.expansion_end(pos)
                return text[pos:end], end == pos + 1, end
        pattern = _SINGLE_QUOTED if char == "'" else _BACKQUOTED if char == "`" else _ANSI_QUOTED
        match = pattern.match(text, pos)
        if not match:
            self.unclosed(pos)
        end = match.end()
        if char == "`":
            self.backquoted[pos] = re.sub(r"\\([\\`$])", r"\1", match.group()[1:-1])
            return match.group(), False, end
        return text[pos + 1:end - 1] if char == "'" else _ansi_c(text[pos + 2:end - 1]), True, end

    def double_quoted(self, pos: int) -> _t.Tuple[str, bool, int]:
        """The same for what stands between double quotes."""
        text, start, parts, literal = self.text, pos, [], True
        pos += 1
        while True:
            end = _PLAIN_QUOTED.match(text, pos).end()
            parts.append(text[pos:end])
            pos, char = end, text[end]
            if char == '"':
                return "".join(parts), literal, pos + 1
            if char == "\0" or char == "\\" and text[pos + 1] == "\0":
                self.unclosed(start)
            if char == "\\":
                end = pos + 2
                parts.append("" if text[pos + 1] == "\n" else text[pos + (text[pos + 1] in '$`"\\'):end])
            else:
                end = self.piece(pos)[2] if char == "`" else self.expansion_end(pos)
                parts.append(text[pos:end])
                literal = literal and end == pos + 1
            pos = end

    def expansion_end(self, pos: int) -> int:
        """The end of the expansion that the ``$`` at ``pos`` begins, or ``pos + 1`` if it begins none."""
        text, after = self.text, pos + 1
        while text.startswith("\\\n", after):
            after += 2
        if text.startswith("((", after):                # arithmetic or not, bash only counts parentheses here
            return self.nested(pos, self.bracketed, pos, after + 1, "(", ")")
        if text[after] == "(":
            return self.nested(pos, self.substitution_end, after)
        if text[after] == "{":
            return self.nested(pos, self.bracketed, pos, after + 1, "", "}")
        if text[after] == "[":
            return self.nested(pos, self.bracketed, pos, after + 1, "[", "]")
        match = _PARAMETER.match(text, after)
        return match.end() if match else pos + 1

    def bracketed(self, start: int, pos: int, opening: str, closing: str) -> int:
        """The end of what was opened at ``start``, reading from ``pos``: after the matching ``closing``."""
        depth = 1
        while depth:
            pos = _PLAIN_BRACKETED.match(self.text, pos).end()
            char = self.text[pos]
            if char == "\0":
                self.unclosed(start)
            depth += (char == opening) - (char == closing)
            pos = self.piece(pos)[2] if char in _QUOTES_AND_EXPANSIONS else pos + 1
        return pos

    def substitution_end(self, pos: int) -> int:
        """The end of ``$(...)``, ``<(...)`` or ``>(...)``; its parenthesis is at ``pos``."""
        if pos not in self.ends:
            outside = self.pos, self.heredocs
            self.heredocs = []
            self.substitutions += 1
            end = self.commands_end(pos + 1)
            if self.text[end] != ")":
                self.unexpected(end)
            self.substitutions -= 1
            self.ends[pos] = end + 1
            self.pos = outside[0]
            self.heredocs += outside[1]                 # $(cat <<E) may announce one whose body starts at the next line
        return self.ends[pos]

    def array_end(self, pos: int) -> int:
        """The end of the array literal whose elements start at ``pos``."""
        outside, self.pos = self.pos, pos
        self.newlines()
        while self.word("element"):
            self.newlines()
        if self.char() != ")":
            self.unexpected()
        end, self.pos = self.pos + 1, outside
        return end
