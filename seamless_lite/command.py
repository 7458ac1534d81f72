"""From a command line to a ``Plan``: the recipe that is hashed, its inputs, and where the results go.

    words --join--> text --bashparse--> simple commands --typing--> files, directories, values
    files, directories --mapping--> pins;  text with mapped names + header --> code;  pins + code --> Recipe

The rules are those of Seamless 1.x (compat/bash.md sections 1 to 5), so that a command has the same
identity here and there.  Commands that Seamless corrupts are done right instead: ``< file``, absolute
targets, file names that need quoting, ``--primary``.
"""
import os
import re
import typing as _t

from .bashparse import Command, Parsed, Redirect, Word, parse
from .celltypes import plain_dumps
from .checksum import Checksum
from .errors import SeamlessError, UsageError
from .inputs import Inputs, check_text, readable, split_compression, wait_for_future
from .script import STDOUT, Target, code_text, quote
from .transformation import Recipe

#: First words that are never looked up as programs.
BUILTINS = frozenset(("cd", "echo", "eval", "exec", "export", "set", "source", ".", ":", "[", "test"))
SYSTEM_FOLDERS = ("/bin", "/sbin", "/usr")
#: Programs that run another one, and what may stand between the two: options, settings, numbers, signals.
WRAPPERS = frozenset(("env", "timeout", "nice", "nohup", "xargs", "stdbuf", "setsid", "time"))
_WRAPPER_ARGUMENT = re.compile(r"[^\w./].*|[^/]*=.*|[0-9.]+[smhd]?|[A-Z]+|\w", re.DOTALL)
LARGE_FILES, LARGE_BYTES = 100, 10**7       # a folder beyond these is hardly meant by a lone "."
RESERVED_PINS = frozenset(("code", "bashcode", "pins_", "RESULT"))
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")



class Options(_t.NamedTuple):
    """What the options of ``seamless-run`` say about the command.  Paths are relative to ``cwd``.

    ``workdir``: the root of pin names (default ``cwd``); ``mapping``: "literal", "strip" or "extension";
    ``check_suffixed``/``check_bare``: argument rules 1 and 2; ``captures``: "SERVER[:LOCAL]" each;
    ``maker``: path -> what names the result of a queued command that will be there, or None.
    """
    cwd: str
    workdir: _t.Optional[str] = None
    mapping: str = "literal"
    check_suffixed: bool = True
    check_bare: bool = True
    command_is_string: bool = False
    captures: _t.Sequence[str] = ()
    inputs: _t.Sequence[str] = ()
    input_files: _t.Sequence[str] = ()
    variables: _t.Sequence[str] = ()
    metavars: _t.Sequence[str] = ()
    prologue: _t.Sequence[str] = ()
    primary: int = 1
    search_path: str = "/usr/bin:/bin"
    maker: _t.Callable[[str], _t.Optional[str]] = lambda path: None


class Plan(_t.NamedTuple):
    """All that is needed to run the command.  ``code`` is the script whose checksum is the pin ``code``."""
    text: str
    code: str
    recipe: Recipe
    metavars: _t.Mapping[str, str]
    inputs: Inputs
    targets: _t.Sequence[Target]
    missed: _t.Sequence[str]            # words that name files here, but none where the command runs
    earlier: _t.Optional[Recipe] = None     # what the recipe was before the results were here, if that differs
    futures: _t.Mapping[str, str] = {}      # pin, whose checksum is a stand-in -> what names the result that it will be

    def check_pins(self) -> None:
        """Raise ``SeamlessError`` if an input would lie outside the folder in which the command runs."""
        for name in self.recipe.extra.get("__format__", ()):
            if name.startswith("/") or name.split("/")[0] == "..":
                raise SeamlessError("the input '%s' lies outside the working directory; name a common parent with "
                                    "-w DIR, or drop the folders of all inputs with -ms" % name)


def build(words: _t.Sequence[str], options: Options, say: _t.Callable[[str], None] = lambda text: None) -> Plan:
    """The plan for a command line, given as one text (``options.command_is_string``) or as words.

    Waits for inputs that another command is making (``say`` is told).  Raises ``UsageError``, or ``SeamlessError``
    if an argument is not what the rules demand.
    """
    text = join_words(words, options)
    builder = _Builder(text, parse(text), options, say)
    plan = builder.plan()
    results = _names(target.server for target in plan.targets)
    if not any(name is not None and os.path.normpath(word) in results for word, name in builder.names.items()):
        return plan
    earlier = _Builder(text, builder.parsed, options, lambda text: None)
    earlier.inputs, earlier.absent = plan.inputs, results
    try:
        return plan._replace(earlier=earlier.plan().recipe)
    except SeamlessError:                   # it could not have run without them
        return plan


def join_words(words: _t.Sequence[str], options: Options) -> str:
    """The command as one text.  Words are joined as they are, but the name of an existing file is kept whole."""
    if options.command_is_string:
        if len(words) != 1:
            raise UsageError("-c takes the whole command as one word, not %d words; put it in quotes" % len(words))
        text = words[0]
    else:
        text = " ".join(quote(word) if quote(word) != word and _is_input(os.path.join(options.cwd, word)) else word
                        for word in words)
    if not text.strip():
        raise UsageError("the command is empty; give it after the options")
    return text


def assignments(texts: _t.Sequence[str], option: str) -> _t.Dict[str, str]:
    """NAME=VALUE texts as a dict.  Raises ``UsageError``."""
    values: _t.Dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.match(name):
            raise UsageError("%s %s: it takes NAME=VALUE, where NAME is letters, digits and _" % (option, text))
        if values.setdefault(name, value) != value:
            raise UsageError("%s %s: %s was already given as '%s'" % (option, text, name, values[name]))
        check_text(value, "the value of %s %s" % (option, name))
    return values


def suffix(path: str) -> str:
    """The extension of the last part of ``path``, with its dot; a leading dot does not make one."""
    name = os.path.basename(path.rstrip("/"))
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""


class _Builder:
    """Collects pins, replacements in the text, and inputs, word by word."""

    def __init__(self, text: str, parsed: Parsed, options: Options, say):
        self.text, self.parsed, self.options, self.say = text, parsed, options, say
        self.cwd = os.path.realpath(options.cwd)
        self.root = os.path.realpath(os.path.join(self.cwd, os.path.expanduser(options.workdir or "")))
        self.inputs = Inputs()
        self.pins: _t.Dict[str, _t.Tuple[str, None, Checksum]] = {}
        self.formats: _t.Dict[str, dict] = {}
        self.sources: _t.Dict[str, str] = {}
        self.names: _t.Dict[str, _t.Optional[str]] = {}      # word -> pin name; None for a value
        self.edits: _t.List[_t.Tuple[int, int, str]] = []
        self.executables: _t.List[_t.Tuple[int, str]] = []   # position of the word, name where the command runs
        self.typed: _t.Set[Word] = set()                     # the words that were looked at
        self.absent: _t.Set[str] = set()                     # words that count as not being files here
        self.counter = 0
        self.futures: _t.Dict[str, str] = {}

    # --- words to pins --------------------------------------------------------------------------------

    def add_words(self) -> None:
        """Type the words of the primary pipeline, those of the primary command first."""
        number = 0
        for command in self.parsed.primary(self.options.primary):
            script = self.find_script(command)
            for position, word in enumerate(command.words[:command.words_before_redirect]):
                number += 1
                self.typed.add(word)
                if not word.literal:
                    continue                # its value is known only where the command runs
                if word is script:
                    self.add_script(word)
                    continue
                program = self.find_program(word) if position == 0 else None
                if program is None:
                    self.replace(word, self.type_word(word, number))
                elif program:
                    name = self.add_input(program, word.text)
                    if name is not None:
                        self.executables.append((word.start, name))
                    self.replace(word, name)

    def find_program(self, word: Word) -> _t.Optional[str]:
        """The path of a program that is an input; "" for one that is not; None if ``word`` is not a program."""
        text = word.text
        if text in BUILTINS:
            return ""
        if "/" in text:
            if os.path.isabs(text) and os.path.dirname(text).endswith(SYSTEM_FOLDERS):
                return ""
        else:
            for folder in self.options.search_path.split(os.pathsep):
                path = os.path.join(self.cwd, folder, text)
                if os.path.isfile(path) and os.access(path, os.X_OK):
                    inside = not os.path.dirname(path).endswith(SYSTEM_FOLDERS) and self.relative(path) is not None
                    return path if inside else ""
        path = self.locate(word)
        return path if os.path.isfile(path) or self.options.maker(path) else None

    def all_executables(self) -> _t.List[str]:
        """What is made executable, in textual order and as often as it is run (as in Seamless); beyond the primary
        pipeline these are inputs under their own name."""
        found = list(self.executables)
        for command in self.parsed.commands:
            word = command.words[0] if command.words and command.words_before_redirect else None
            if word is not None and word not in self.typed and word.literal and os.path.normpath(word.text) in self.pins \
                    and self.find_program(word):
                found.append((word.start, word.text))
        return [name for _, name in sorted(found)]

    def find_script(self, command: Command) -> _t.Optional[Word]:
        """The local script that a word such as ``timeout`` runs: the third word of ``timeout 5 ./s.sh``."""
        words = command.words[:command.words_before_redirect]
        if not words or os.path.basename(words[0].text) not in WRAPPERS:
            return None
        for word in words[1:]:
            if word.text not in WRAPPERS and not _WRAPPER_ARGUMENT.fullmatch(word.text):
                path = self.locate(word)
                is_script = word.literal and "/" in word.text and os.path.isfile(path) and os.access(path, os.X_OK)
                return word if is_script else None
        return None

    def add_script(self, word: Word) -> None:
        """An input that is run under a name with a slash in it, since it is not on PATH."""
        name = self.add_input(self.locate(word), word.text)
        if name is not None:
            if all(name != other for _, other in self.executables):
                self.executables.append((word.start, name))
            self.replace(word, name if "/" in name else "./" + name)

    def locate(self, word: Word) -> str:
        path = os.path.join(self.cwd, word.text)
        if word.text.startswith("~") and not word.quoted and not os.path.exists(path):
            path = os.path.join(self.cwd, os.path.expanduser(word.text))
        return path

    def wait(self, path: str) -> None:
        """Wait for an input that another command is making now; one that is queued is only named."""
        if not self.options.maker(path):
            wait_for_future(path, self.say)

    def type_word(self, word: Word, number: int) -> _t.Optional[str]:
        """The name of the pin that ``word`` stands for; None if it is a value.  Raises ``SeamlessError``."""
        text = word.text
        if text in self.names:
            return self.names[text]
        if not text or _is_system(text):
            return None
        path = self.locate(word)
        if os.path.normpath(text) in self.absent:
            if self.options.check_suffixed and (text.endswith("/") or suffix(text)):
                raise SeamlessError("'%s' must exist" % text)
            return None
        self.wait(path)
        name = None
        if self.inputs.has_sidecar(path) or self.options.maker(path):
            name = self.add_input(path, text)
        else:
            self.check_rules(text, path, number, word.glob)
            if not _is_float(text):
                name = self.add_input(path, text)
            if text == "." and name is not None:
                self.describe_dot()
        self.names[text] = name
        return name

    def check_rules(self, text: str, path: str, number: int, is_pattern: bool) -> None:
        """The three rules that catch mistyped and forgotten files."""
        argument = "argument #%d '%s'" % (number, text)
        if text.endswith("/"):
            if self.options.check_suffixed and not os.path.isdir(path):
                raise SeamlessError("%s ends in '/', but is not a directory here; if it is none, add -g1" % argument)
        elif suffix(text):
            if not self.options.check_suffixed or _is_float(text):
                return
            if os.path.isdir(path):
                raise SeamlessError("%s is a directory, but has an extension like a file; add -g1 if that is meant, or "
                                    "write '%s/'" % (argument, text))
            if not os.path.exists(path):
                cure = ("patterns are not expanded inside the command; name the files, or leave out -c and the quotes"
                        if is_pattern else "add -g1 if it is not a file that the command reads")
                raise SeamlessError("%s has an extension like a file, but does not exist: %s" % (argument, cure))
        elif number > 1 and self.options.check_bare and os.path.isfile(path):
            raise SeamlessError("%s has no extension, but is a file here: add -g2 to make it an input, or rename it"
                                % argument)

    def add_input(self, path: str, text: str) -> _t.Optional[str]:
        """Make the file or directory ``path`` a pin; its name, or None if there is nothing there."""
        maker = self.options.maker(path)
        found = (False, Checksum.of(maker.encode("utf-8"))) if maker else self.inputs.add(path, text)
        if found is None:
            return None
        is_directory, checksum = found
        name = self.map_name(path, text, is_directory)
        check_text(name, "the file name '%s'" % readable(name))
        dropped = self.inputs.dropped.pop(path, None)
        if dropped:
            more = " (one of %d)" % len(dropped) if len(dropped) > 1 else ""
            self.say("'%s' is a link to a directory%s and is left out of the input '%s'; put the directory itself there"
                     % (readable(os.path.join(text, dropped[0])), more, readable(text)))
        if name in RESERVED_PINS or name.startswith(("__", "META__")):
            raise SeamlessError("an input cannot be called '%s' where the command runs; rename it, or use -mx" % name)
        pin = ("mixed" if is_directory else "bytes", None, checksum)
        if self.pins.setdefault(name, pin) != pin:
            raise SeamlessError("'%s' and '%s' would both be called '%s' where the command runs; choose another "
                                "mapping of names (-ms, -mx or neither)" % (self.sources[name], text, name))
        self.sources[name] = text
        if maker:
            self.futures[name] = maker
        if is_directory:
            self.formats[name] = {"celltype": "deepfolder", "filesystem": {"mode": "directory", "optional": True}}
        else:
            self.formats[name] = {"filesystem": {"mode": "file", "optional": True}}
        return name

    def describe_dot(self) -> None:
        """Say what a lone ``.`` means, if it is expensive."""
        files = [file for file in self.inputs.files.values() if os.path.exists(file)]
        size = sum(map(os.path.getsize, files))
        if len(files) > LARGE_FILES or size > LARGE_BYTES:
            self.say("the word '.' makes this whole folder an input (%d files, %d MB); if a pattern is meant, write it "
                     "as part of a longer word, as in 'grep -e. a.txt'" % (len(files), size // 10**6))

    def map_name(self, path: str, text: str, is_directory: bool) -> str:
        """The name of the input where the command runs.  Raises ``SeamlessError``."""
        if self.options.mapping == "strip":
            return os.path.basename(os.path.normpath(path))
        name = self.relative(path)
        if self.options.mapping == "extension":
            if is_directory and not os.path.isabs(text):
                return text
            if not is_directory:
                self.counter += 1
                base, packed = split_compression(path)
                return "file%d%s%s" % (self.counter, suffix(base), packed)
        if name is None:
            raise SeamlessError("the input '%s' lies outside the working directory %s; name a common parent with "
                                "-w DIR, or drop the folders of all inputs with -ms" % (text, self.root))
        return name

    def relative(self, path: str) -> _t.Optional[str]:
        """``path`` relative to the root of pin names, or None.  ``x/../../y`` passes, as in Seamless."""
        for candidate in (path, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))):
            if (candidate + "/").startswith(self.root.rstrip("/") + "/"):
                return os.path.relpath(candidate, self.root)
        return None

    def replace(self, word: Word, name: _t.Optional[str]) -> None:
        if name is not None and name != word.text:
            self.edits.append((word.start, word.end, quote("./" + name if name.startswith("-") else name)))

    def add_redirected_inputs(self) -> None:
        """``< file`` reads a file: it is an input, without rules."""
        for redirect in self.parsed.input_redirects():
            word = redirect.target
            path = self.locate(word)
            if word.literal and not _is_system(word.text) and (os.path.isfile(path) or self.options.maker(path)):
                self.wait(path)
                self.replace(word, self.add_input(path, word.text))

    def add_extra_inputs(self) -> None:
        """``-i PATH`` and the lines of ``-I FILE``."""
        self.counter = 0                    # as in Seamless: names collide unless the files are the same
        extra = [(path, "-i " + path) for path in self.options.inputs]
        for name in self.options.input_files:
            try:
                with open(os.path.join(self.cwd, os.path.expanduser(name)), encoding="utf-8",
                          errors="surrogateescape") as file:
                    lines = [line.strip() for line in file]
            except OSError as exc:
                raise UsageError("-I %s: the file cannot be read: %s" % (name, exc.strerror)) from exc
            extra += [(os.path.join(os.path.dirname(name), line), "'%s' in %s" % (line, name))
                      for line in lines if line]
        for path, what in extra:
            if not path:
                raise UsageError("-i '' names no input: the word is empty; is a variable of your shell unset?")
            full = os.path.join(self.cwd, os.path.expanduser(path))
            self.wait(full)
            if self.add_input(full, path) is None:
                raise SeamlessError("the input %s does not exist" % what)

    # --- targets --------------------------------------------------------------------------------------

    def targets(self) -> _t.List[Target]:
        """Captures first, then the redirection of the last command."""
        targets: _t.Dict[str, Target] = {}
        locals_: _t.Dict[str, str] = {}
        for capture in self.options.captures:
            server, _, local = capture.partition(":")
            server = server.rstrip("/") if len(server) > 1 else server
            if not server and not local:
                raise UsageError("--capture '%s': it takes SERVER, SERVER:LOCAL, or :LOCAL for the output" % capture)
            server = _check_target(server or STDOUT, "--capture " + capture)
            targets[server] = Target(server, os.path.expanduser(local) or server)
            if local:
                locals_[server] = targets[server].local
        redirects = [redirect for redirect in self.parsed.output_redirects()
                     if not redirect.target.text.startswith("/dev/")]
        if len(redirects) > 1:
            raise SeamlessError("the last command has several output redirections, '%s' and '%s': keep one, and name "
                                "the other file with --capture" % (redirects[0].target.text, redirects[1].target.text))
        for redirect in redirects:
            target = self.redirect_target(redirect)
            if target is not None:          # a local name that was given with --capture stays
                targets[target.server] = target._replace(local=locals_.get(target.server, target.local))
        return list(targets.values())

    def redirect_target(self, redirect: Redirect) -> _t.Optional[Target]:
        word = redirect.target
        if not word.literal:
            if self.options.captures:
                return None                 # the user has said what the results are
            raise SeamlessError("the name of the output file, %s, is known only where the command runs; use a fixed "
                                "name, or list the files with --capture" % self.text[word.start:word.end])
        server = word.text
        if server.startswith("~") and not word.quoted:
            server = os.path.expanduser(server)
        folder = os.path.join(self.cwd, os.path.dirname(server))
        if os.path.isabs(server) or ".." in server.split("/") and os.path.isdir(folder):
            server = os.path.relpath(os.path.join(os.path.realpath(folder), os.path.basename(server)), self.cwd)
            self.edits.append((word.start, word.end, quote(server)))
        _check_target(server, "> " + word.text)
        return Target(server, server, redirect.op == ">>")

    # --- the result -----------------------------------------------------------------------------------

    def command(self) -> str:
        """The text with mapped names, after the prologue."""
        text = self.text
        for start, end, new in sorted(set(self.edits), reverse=True):
            text = text[:start] + new + text[end:]
        return "; ".join([*self.options.prologue, text])

    def missed(self, targets: _t.Sequence[Target]) -> _t.List[str]:
        """Words, and matches of patterns, that name files here, but none where the command runs."""
        made = {os.path.normpath(name) for name in [*(target.server for target in targets), *self.parsed.written]}
        there = made | {os.path.normpath(name) for name in self.pins}
        found: _t.Dict[str, None] = {}
        for word in self.parsed.mentioned():
            if not word.literal or word in self.typed and not word.glob:
                continue
            for text in self.matches(word):
                path = os.path.join(self.cwd, text)
                name = self.relative(path) if os.path.isabs(text) else os.path.normpath(text)
                if name in (None, ".", "..") or name in _names(made) or there & {".", *_names([name])}:
                    continue
                if _is_input(path) and not _is_float(text):
                    found[text] = None
        return list(found)

    def matches(self, word: Word) -> _t.List[str]:
        """The names that ``word`` may stand for: matches of a pattern, what follows the ``=`` in ``--file=a.txt``."""
        if word.glob:
            import glob                     # patterns in commands are rare
            folder = os.path.join(self.cwd, "")
            paths = glob.glob(glob.escape(folder) + word.text)
            return sorted(path[len(folder):] for path in paths)
        return [text for text in (word.text, word.text.partition("=")[2]) if text]

    def plan(self) -> Plan:
        self.add_words()
        self.add_redirected_inputs()
        self.add_extra_inputs()
        targets = self.targets()
        metavars = assignments(self.options.metavars, "--metavar")
        for name in metavars:
            if name.startswith("META__"):
                raise UsageError("--metavar %s: the name must not begin with META__" % name)
        code = code_text(self.command(), targets, self.all_executables(), sorted(metavars))
        check_text(code, "the command '%s'" % readable(self.text))
        data = code.encode("utf-8")
        self.inputs.buffers[Checksum.of(data)] = data
        pins: _t.Dict[str, _t.Tuple[str, None, Checksum]] = dict(self.pins, code=("text", None, Checksum.of(data)))
        for name, value in assignments(self.options.variables, "--var").items():
            if name in pins or name in RESERVED_PINS or name.startswith(("__", "META__")):
                raise UsageError("--var %s: that name is taken; choose another one" % name)
            data = plain_dumps(value)
            self.inputs.buffers[Checksum.of(data)] = data
            pins[name] = ("str", None, Checksum.of(data))
        output = ("result", "deepfolder" if targets else "bytes", None)
        recipe = Recipe("bash", pins, output, {"__format__": self.formats} if self.formats else {})
        return Plan(self.text, code, recipe, metavars, self.inputs, targets, self.missed(targets),
                    futures=self.futures)


def _check_target(server: str, what: str) -> str:
    if os.path.isabs(server) or os.path.normpath(server).split("/")[0] == ".." or os.path.normpath(server) == ".":
        raise UsageError("%s: a command writes its results below the folder in which it runs; use a relative name, and "
                         "--capture NAME:LOCAL to have the result elsewhere" % what)
    return server


def _names(paths: _t.Iterable[str]) -> _t.Set[str]:
    """Relative paths and all folders above them."""
    found = set()
    for path in map(os.path.normpath, paths):
        while path and path != os.path.dirname(path):
            found.add(path)
            path = os.path.dirname(path)
    return found


def _is_system(text: str) -> bool:
    """Such a name means the same, or nothing lasting, wherever a command runs; /dev/shm holds files."""
    return text.startswith(("/dev/", "/proc/")) and not text.startswith("/dev/shm/")


def _is_input(path: str) -> bool:
    return os.path.exists(path) or os.path.exists(path.rstrip("/") + ".CHECKSUM")


def _is_float(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False
