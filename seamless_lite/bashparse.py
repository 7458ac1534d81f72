"""A parser for bash commands: which simple commands there are, their words, and where they redirect to.

``parse(text)`` reads the whole text once, by recursive descent over its characters, and keeps what
``seamless-run`` needs: the simple commands *at shell level* in textual order.  Commands in the bodies of
groups, loops, conditionals and functions count; of what is inside ``$(...)`` and ``<(...)`` only the words are kept.
Keywords, the word list of a loop, the patterns of a ``case``, ``[[ ]]`` and ``(( ))`` are not words of any command.

Spans are [start, end) offsets in characters.  What bash refuses is refused with a ``UsageError``, with few
exceptions, harmless because bash itself reads the command in the end: extended globs are taken everywhere
(``shopt -s extglob`` may be in force), what is inside ``[[ ]]`` need only be balanced, and a ``((`` that turns out to
be two groups may have a line end in any place.  Empty commands, NUL characters and more than ``MAX_DEPTH``
nested constructs are refused although bash would take them.
"""
import contextlib
import re
import typing as _t

from .bashwords import ASSIGNMENT, EMPTY_PARENTHESES, NAME, Scanner, Word, place
from .errors import UsageError


class Redirect(_t.NamedTuple):
    """``op`` is one of ``> >> >| >& &> &>> < <& <> << <<- <<<``; ``fd`` the number before it, if any.

    For a here-document the target is its delimiter.
    """
    op: str
    fd: _t.Optional[int]
    target: Word
    start: int
    end: int

    def is_output(self) -> bool:
        """Does it send something else than stderr to a file?  ``>&2``, ``2>&1``, ``>&-`` do not."""
        target = self.target.text
        if self.op == ">&" and (target == "-" or target.rstrip("-").isdigit()):
            return False
        return self.op in (">", ">>", ">|", ">&", "&>", "&>>") and self.fd != 2


class Command(_t.NamedTuple):
    """A simple command.  ``words`` has no assignments in it; ``words_before_redirect`` counts the words
    in front of the first redirection; commands with the same ``pipeline`` are joined by ``|``."""
    words: _t.Tuple[Word, ...]
    assignments: _t.Tuple[Word, ...]
    redirects: _t.Tuple[Redirect, ...]
    pipeline: int
    start: int
    end: int
    words_before_redirect: int


class Parsed(_t.NamedTuple):
    """The simple commands of a text.

    ``last`` is the index of the last simple command of the last list element (None if that has none);
    ``outer_redirects`` are those of a group or other compound command that ends the last list element;
    ``redirects`` are all that there are at shell level, in textual order.
    """
    commands: _t.Tuple[Command, ...]
    outer_redirects: _t.Tuple[Redirect, ...]
    last: _t.Optional[int]
    redirects: _t.Tuple[Redirect, ...]
    hidden: _t.Tuple[Word, ...] = ()        # words in substitutions, loop lists and [[ ]]; positions may be relative
    written: _t.FrozenSet[str] = frozenset()    # names that the text redirects output to, substitutions included

    def mentioned(self) -> _t.Iterator[Word]:
        """All words that may name a file which is read, wherever they stand; not the names of programs."""
        for command in self.commands:
            for number, word in enumerate(command.words):
                if number or "/" in word.text:
                    yield word
            yield from command.assignments
        yield from self.hidden

    @property
    def pipelines(self) -> _t.Tuple[_t.Tuple[int, ...], ...]:
        """The indices of the commands of each pipeline, in textual order.

        Two commands share a pipeline if nothing but ``|`` stands between them, or a group around one of them: in
        ``(a | b) > f`` a and b do, in ``(a; b) | c`` all do; in ``a | while b; do c; done`` no two do.
        """
        found: _t.Dict[int, _t.List[int]] = {}
        for index, command in enumerate(self.commands):
            found.setdefault(command.pipeline, []).append(index)
        return tuple(map(tuple, found.values()))

    def primary(self, number: int = 1) -> _t.Tuple[Command, ...]:
        """The ``number``-th command (from 1; only those with words count), then the rest of its pipeline.

        Empty if ``number`` is 1 and no command has words.  Raises ``UsageError`` if there are too few.
        """
        named = [command for command in self.commands if command.words]
        if number == 1 and not named:
            return ()
        if not 1 <= number <= len(named):
            raise UsageError("there is no command number %d: the command line has %d" % (number, len(named)))
        first = named[number - 1]
        return (first,) + tuple(command for command in named
                                if command.pipeline == first.pipeline and command is not first)

    def output_redirects(self) -> _t.Tuple[Redirect, ...]:
        """The redirections of stdout (or of another descriptor but stderr) to files, of the last command and
        of the outermost group around it."""
        redirects = self.commands[self.last].redirects if self.last is not None else ()
        return tuple(redirect for redirect in redirects + self.outer_redirects if redirect.is_output())

    def input_redirects(self) -> _t.Tuple[Redirect, ...]:
        """All ``< file`` at shell level, those of groups and loops included."""
        return tuple(redirect for redirect in self.redirects if redirect.op == "<")


def parse(text: str) -> Parsed:
    """Parse a bash command.  Raises ``UsageError``, one sentence with the column (from 1), for a broken one."""
    if "\0" in text:
        raise UsageError("the command has a NUL character at %s" % place(text, text.index("\0")))
    parser = _Parser(text)
    element = parser.list()
    if parser.char() != "\0":
        parser.unexpected()
    if element is None:
        raise UsageError("the command is empty")
    first, outer = element
    return parser.parsed(outer, len(parser.commands) - 1 if len(parser.commands) > first else None)


def _either(names: str) -> str:
    """A pattern for any of the names; the characters of one may be parted by a backslash and a line end."""
    return "|".join(r"(?:\\\n)*".join(map(re.escape, name)) for name in names.split())


_COMPOUNDS = frozenset("if for while until case select { [[".split())
_CLOSERS = frozenset("then else elif fi do done esac } in ]]".split())
_KEYWORDS = _COMPOUNDS | _CLOSERS | frozenset("! time function coproc -p --".split())       # the last two: of time
_KEYWORD = re.compile(r"((?:[a-z{}[\]!-]|\\\n)+)(?=[ \t\n;&|()\0]|[<>](?!\())")
_CONTROL = re.compile(r"%s|&(?!(?:\\\n)*>)" % _either(";;& ;; ;& ; && || |& |"))
_REDIRECT = re.compile(r"(?:([0-9]+)|\{%s(?:\[[^\]\s]*\])?\})?(%s|[<>](?!\())|(%s)" % (
    NAME, _either("<<< <<- << <& <> >> >& >|"), _either("&>> &>")))
#: After these a word like ``a=(1 2)`` is an assignment too.
_DECLARATIONS = frozenset("alias declare eval export let local readonly typeset".split())


class _Parser(Scanner):
    """One parse.  Methods leave ``pos`` in front of the next token."""

    def __init__(self, text: str):
        super().__init__(text)
        self.commands: _t.List[Command] = []
        self.redirects: _t.List[Redirect] = []
        self.hidden: _t.List[Word] = []
        self.written: _t.Set[str] = set()
        self.pipelines = 0
        self.after_redirect = -1                        # a position where bash knows no keywords,
        self.plain_time = -1                            # and one where only "time" is none: the start of a $(
        self.keyword_start = self.keyword_end = -1      # the last keyword() is remembered: it is asked for a lot
        self.keyword_here: _t.Optional[str] = None

    def parsed(self, outer: _t.Tuple[Redirect, ...], last: _t.Optional[int]) -> Parsed:
        for text in self.backquoted.values():
            with contextlib.suppress(UsageError):       # bash will say so if it comes that far
                self.hide(parse(text))
        return Parsed(tuple(self.commands), outer, last, tuple(self.redirects), tuple(self.hidden),
                      frozenset(self.written))

    def hide(self, inner: Parsed):
        """Keep the words of a substitution."""
        self.hidden += inner.mentioned()
        self.hidden += [redirect.target for redirect in inner.input_redirects()]
        self.written |= inner.written

    def keyword(self) -> _t.Optional[str]:
        """The reserved word here, or None."""
        if self.pos != self.keyword_start:
            match = _KEYWORD.match(self.text, self.pos)
            word = match.group(1).replace("\\\n", "") if match and self.pos != self.after_redirect else None
            self.keyword_start = self.pos
            self.keyword_end = match.end() if match else self.pos
            self.keyword_here = word if word in _KEYWORDS else None
        return self.keyword_here

    def take(self, keyword: str) -> bool:
        """Go over ``keyword`` if it stands here."""
        found = self.keyword() == keyword
        if found:
            self.advance(self.keyword_end)
        return found

    def take_control(self, *operators: str) -> str:
        """Go over a control operator if it is one of these, and return it, else ""."""
        match = _CONTROL.match(self.text, self.pos)
        operator = match.group().replace("\\\n", "") if match else ""
        if operator not in operators:
            return ""
        self.advance(match.end())
        return operator

    def expect(self, keyword: str):
        if not self.take(keyword):
            self.unexpected()

    def expect_char(self, char: str):
        if self.char() != char:
            self.unexpected()
        self.advance(self.pos + 1)

    def expect_word(self):
        if not self.word():
            self.unexpected()
        self.advance(self.pos)

    # --- lists, pipelines, commands

    def list(self) -> _t.Optional[tuple]:
        """Commands, until something that cannot start one.

        Returns None if there are none, else for the last element the index of its first simple command
        and the redirects of the compound command at its end.
        """
        element = None
        self.newlines()
        while self.at_command():
            element = self.pipeline()
            operator = self.take_control("&&", "||", ";", "&")
            if not (self.newlines() or operator):
                break
            if operator in ("&&", "||") and not self.at_command():
                self.unexpected()
        return element

    def commands_end(self, pos: int) -> int:
        outside = self.commands, self.redirects
        self.commands, self.redirects = [], []
        self.advance(pos)
        self.plain_time = self.pos
        self.list()
        self.hide(Parsed(tuple(self.commands), (), None, tuple(self.redirects)))
        self.commands, self.redirects = outside
        return self.pos

    def body(self):
        """A list that must not be empty."""
        if self.list() is None:
            self.unexpected()

    def block(self, *closers: str):
        """For each closer a body, and then that keyword or parenthesis."""
        for closer in closers:
            self.body()
            self.expect_char(closer) if closer == ")" else self.expect(closer)

    def at_command(self) -> bool:
        char = self.char()
        if char in ";|)\n\0" or char == "&" and not _REDIRECT.match(self.text, self.pos):
            return False
        return self.keyword() not in _CLOSERS

    def at_compound(self) -> bool:
        return self.char() == "(" or self.keyword() in _COMPOUNDS

    def pipeline(self) -> tuple:
        """``[time] [!] command | command ...``; returns as ``list`` does."""
        first = len(self.commands)
        self.pipelines += 1
        pipeline = self.pipelines
        while self.keyword() == "!" or self.keyword() == "time" and self.pos != self.plain_time:
            if self.take("time"):
                self.take("-p")
                self.take("--")
            self.take("!")
            if self.char() in ";\n\0":                  # "time" and "!" may stand alone
                return first, ()
        groups: _t.List[slice] = []
        bars = 0
        while True:
            start, is_group = len(self.commands), self.char() == "(" or self.keyword() == "{"
            redirects = self.command(pipeline)
            if is_group:
                groups.append(slice(start, len(self.commands)))
            if not self.take_control("|", "|&"):
                break
            bars += 1
            self.newlines()
            if self.keyword() == "!":
                self.unexpected()
        if bars and not self.open:                      # as in Seamless: a group in a pipeline belongs to it
            for group in groups:
                self.commands[group] = [command._replace(pipeline=pipeline) for command in self.commands[group]]
        return first, redirects

    def command(self, pipeline: int) -> _t.Tuple[Redirect, ...]:
        """One command; returns the redirects of a compound command."""
        if not self.at_command():
            self.unexpected()
        if self.at_compound():
            return self.compound()
        if self.take("function"):
            self.expect_word()
            empty = EMPTY_PARENTHESES.match(self.text, self.pos)
            self.pos = empty.end() if empty else self.pos
            return self.function_body()
        if self.take("coproc"):
            return self.coproc(pipeline)
        return self.simple(pipeline)

    def coproc(self, pipeline: int) -> _t.Tuple[Redirect, ...]:
        """What follows ``coproc``: a command; a compound one may have a name in front of it."""
        if not self.at_command() or self.keyword() in ("!", "function", "coproc"):
            self.unexpected()
        start = self.pos
        if not self.at_compound() and self.word():
            self.advance(self.pos)
        if self.at_compound():
            return self.compound()
        self.pos = start
        return self.simple(pipeline)

    def function_body(self) -> _t.Tuple[Redirect, ...]:
        self.newlines()
        if not self.at_compound():
            self.unexpected()
        self.compound()
        return ()                                       # its redirects are for when it is called

    def simple(self, pipeline: int) -> _t.Tuple[Redirect, ...]:
        """A simple command, or a function definition ``name() body``."""
        start = end = self.pos
        words, assignments, redirects = [], [], []
        before_redirect = None
        role = "first"
        while True:
            redirect = self.redirect()
            word = None if redirect else self.word(role)
            if redirect:
                redirects.append(redirect)
                before_redirect = len(words) if before_redirect is None else before_redirect
                if words or assignments:
                    role = ""                           # bash knows no a=(1 2) any more
            elif not word:
                break
            elif not words and ASSIGNMENT.match(self.text, word.start, word.end):
                assignments.append(word)
            else:
                words.append(word)
            end = self.pos
            self.advance(end)
            if word and len(words) == 1:
                role = "declared" if self.text[word.start:word.end] in _DECLARATIONS else ""
                if self.char() == "(" and not assignments and not redirects:
                    self.advance(self.pos + 1)
                    self.expect_char(")")
                    return self.function_body()
        self.commands.append(Command(
            tuple(words), tuple(assignments), tuple(redirects), pipeline, start, end,
            len(words) if before_redirect is None else before_redirect))
        return ()

    # --- redirections

    def redirect(self) -> _t.Optional[Redirect]:
        """The redirection here, or None."""
        match = _REDIRECT.match(self.text, self.pos)
        if not match:
            return None
        start = self.pos
        op = (match.group(2) or match.group(3)).replace("\\\n", "")
        self.advance(match.end())
        duplication = op in (">&", "<&")
        following = _REDIRECT.match(self.text, self.pos)
        target: _t.Optional[Word] = None
        if duplication and self.char() == "-":          # a token: >&-x closes, and x is a word
            target = Word("-", self.pos, self.pos + 1)
            self.pos += 1
        elif not following or duplication and following.group(1):   # >&1>f are two, >1>f is nothing
            target = self.word()
        if not target:
            self.fail("nothing after the %s" % op, start)
        redirect = Redirect(op, int(match.group(1)) if match.group(1) else None, target, start, self.pos)
        self.redirects.append(redirect)
        if redirect.is_output() or op in ("<>", ">", ">>"):
            self.written.add(target.text)
        if op in ("<<", "<<-"):
            self.heredocs.append((target, op == "<<-"))
        return redirect

    # --- compound commands

    def compound(self) -> _t.Tuple[Redirect, ...]:
        """A compound command; returns its redirects."""
        self.nested(self.pos, self.compound_body)
        redirects = []
        while True:
            redirect = self.redirect()
            if not redirect:
                return tuple(redirects)
            redirects.append(redirect)
            self.advance(self.pos)
            self.after_redirect = self.pos

    def compound_body(self):
        arithmetic = self.arithmetic_end()
        if arithmetic:
            self.advance(arithmetic)
        elif self.char() == "(":
            self.advance(self.pos + 1)
            self.block(")")
        elif self.take("{"):
            self.block("}")
        elif self.take("while") or self.take("until"):
            self.block("do", "done")
        elif self.take("if"):
            self.conditional()
        elif self.take("for"):
            self.loop(self.arithmetic_end())
        elif self.take("select"):
            self.loop(None)
        elif self.take("case"):
            self.case()
        else:
            self.expect("[[")
            self.test()

    def arithmetic_end(self) -> _t.Optional[int]:
        """The end of the ``((...))`` here; None if there is none, or only a group in a group."""
        if not self.text.startswith("((", self.pos):
            return None
        inner = self.bracketed(self.pos + 1, self.pos + 2, "(", ")")
        return inner + 1 if self.text[inner] == ")" else None

    def conditional(self):
        """What follows ``if``."""
        more = True
        while more:
            self.block("then")
            self.body()
            more = self.take("elif")
        if self.take("else"):
            self.body()
        self.expect("fi")

    def loop(self, arithmetic: _t.Optional[int]):
        """What follows ``for`` or ``select``: a name and words, or ``((...))`` that ends at ``arithmetic``."""
        if arithmetic:
            if self.text.count(";", self.pos, arithmetic) < 2:
                self.fail("less than two ; in the ((", self.pos)
            self.advance(arithmetic)
        else:
            self.expect_word()
        separated = self.newlines()
        if not arithmetic and self.take("in"):
            word = self.word()
            while word:
                self.hidden.append(word)
                self.advance(self.pos)
                word = self.word()
            if not self.take_control(";") and self.char() != "\n":
                self.unexpected()
            separated = True
        elif not separated:
            separated = self.take_control(";") or arithmetic
        self.newlines()
        if separated and self.take("{"):
            self.block("}")
        else:
            self.expect("do")
            self.block("done")

    def case(self):
        """What follows ``case``."""
        self.expect_word()
        self.newlines()
        self.expect("in")
        self.newlines()
        while not self.take("esac"):
            if self.char() == "(":
                self.advance(self.pos + 1)
            self.expect_word()
            while self.take_control("|"):
                self.expect_word()
            self.expect_char(")")
            self.list()
            if not self.take_control(";;", ";&", ";;&"):
                return self.expect("esac")
            self.newlines()

    def test(self):
        """What follows ``[[``: words and operators up to ``]]``; whether they make sense is left to bash."""
        depth, regex = 0, False
        self.newlines()
        while depth or not self.take("]]"):
            start = self.pos
            word = self.word("regex" if regex else "")
            if word:
                self.hidden.append(word)
                self.advance(self.pos)
            elif self.char() == "(":
                depth += 1
                self.advance(self.pos + 1)
            elif self.char() in "<>" or depth and self.char() == ")":
                depth -= self.char() == ")"
                self.advance(self.pos + 1)
            elif not self.take_control("&&", "||"):
                self.unexpected()
            regex = self.text[start:self.pos].rstrip() == "=~"
            self.newlines()

