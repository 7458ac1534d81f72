"""The bash parser, against expectations written by hand and against bash itself."""
import os
import random
import re
import shutil
import subprocess

import pytest

from seamless_lite.bashparse import parse
from seamless_lite.bashwords import MAX_DEPTH
from seamless_lite.errors import UsageError

BASH = shutil.which("bash")


def bash_version():
    if BASH is None:
        return (0, 0)
    done = subprocess.run([BASH, "-c", "echo ${BASH_VERSINFO[0]} ${BASH_VERSINFO[1]}"], stdout=subprocess.PIPE, timeout=20)
    return tuple(map(int, done.stdout.split()))


needs_bash = pytest.mark.skipif(bash_version() < (5, 2), reason="older versions of bash check less, later")


def bash_accepts(text):
    """Whether ``bash -n`` takes it; None if it takes it with a complaint about what comes at run time."""
    done = subprocess.run([BASH, "-n", "-c", "--", text], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          env={"LC_ALL": "C.UTF-8"}, timeout=20)
    if done.returncode == 0 and (b"conditional" in done.stderr or b"unterminated here-document" in done.stderr):
        return None
    return done.returncode == 0


def we_accept(text):
    try:
        parse(text)
        return True
    except UsageError:
        return False


def words(text):
    return [[word.text for word in command.words] for command in parse(text).commands]


def targets(redirects):
    return [(redirect.op, redirect.target.text) for redirect in redirects]


# --- words

@pytest.mark.parametrize("text, expected", [
    ("cat a.txt  b.txt", [["cat", "a.txt", "b.txt"]]),
    ("cat 'é sp.txt' \"a b\" c\\ d", [["cat", "é sp.txt", "a b", "c d"]]),
    ("echo a'b'\"c\"\\d$'e'$\"f\"", [["echo", "abcdef"]]),
    ("echo '' \"\" $''", [["echo", "", "", ""]]),
    (r"""echo "\$x \\ \" \` \a" '\n'""", [["echo", r'$x \ " ` \a', r"\n"]]),
    (r"echo $'a\tb\'\x41\101\u00e9\xc3\xa9\\\q' $'\xff' $'a\0b'c", [["echo", "a\tb'AAéé\\\\q", "\udcff", "ac"]]),
    ("echo a\\\nb \"c\\\nd\" 'e\\\nf' \\\n g", [["echo", "ab", "cd", "e\\\nf", "g"]]),
    ("echo a#b # comment 'it", [["echo", "a#b"]]),
    ("A=1 B='x y' cat C=2", [["cat", "C=2"]]),
    ("x=1", [[]]),
    ("a=(1 2) b[i j]=3 cmd a=b", [["cmd", "a=b"]]),
    ("declare -A a=([x y]=1 [z]=2)", [["declare", "-A", "a=([x y]=1 [z]=2)"]]),
    ("echo $x ${y:-'}'} \"${z#\"}\"}\" $(ls | sort) `a b` $((1+(2))) $[3]",
     [["echo", "$x", "${y:-'}'}", "${z#\"}\"}", "$(ls | sort)", "`a b`", "$((1+(2)))", "$[3]"]]),
    ("diff <(sort a) >(cat) x<(y)", [["diff", "<(sort a)", ">(cat)", "x<(y)"]]),
    ("echo $(echo $(echo \")\" ')' # )\n) `)`) z", [["echo", "$(echo $(echo \")\" ')' # )\n) `)`)", "z"]]),
    ("echo {a,b} {1..3} ~ %1 @ ! } if", [["echo", "{a,b}", "{1..3}", "~", "%1", "@", "!", "}", "if"]]),
    ("echo @(a|b c)*.txt !(x)", [["echo", "@(a|b c)*.txt", "!(x)"]]),
    ("2>f cat <g x >>h y 2>&1 z", [["cat", "x", "y", "z"]]),
    ("cat 2 >f a2>g", [["cat", "2", "a2"]]),
    ("cat >&-x", [["cat", "x"]]),
    ("é=1 x", [["é=1", "x"]]),
    ("echo \\", [["echo", "\\"]]),
    ("a\u00a0b\r", [["a\u00a0b\r"]]),
])
def test_words_are_without_quotes_and_expansions_stay_as_written(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text, quoted, literal, glob", [
    ("abc", 0, 1, 0), ("'a'b", 1, 1, 0), ('"a"', 1, 1, 0), ("a\\b", 1, 1, 0), ("a\\\nb", 0, 1, 0), ("$'a'", 1, 1, 0),
    ("$x", 0, 0, 0), ("$$", 0, 0, 0), ('"$x"', 1, 0, 0), ('"\\$x"', 1, 1, 0), ("'$x'", 1, 1, 0), ("a$", 0, 1, 0), ('"a$"', 1, 1, 0), ("$(a)", 0, 0, 0),
    ("`a`", 0, 0, 0), ("<(a)", 0, 0, 0), ("${x}", 0, 0, 0), ("$((1))", 0, 0, 0), ("*.txt", 0, 1, 1), ("'*'", 1, 1, 0), ("\\*", 1, 1, 0),
    ("[ab]", 0, 1, 1), ("[", 0, 1, 0), ("]", 0, 1, 0), ("[\"a\"]?", 1, 1, 1), ("+(a|'b')", 0, 1, 1), ("$x*", 0, 0, 1), ("{a,b}", 0, 1, 0),
])
def test_a_word_says_whether_it_is_quoted_literal_and_a_glob(text, quoted, literal, glob):
    word = parse("echo " + text).commands[0].words[1]
    assert (word.quoted, word.literal, word.glob) == (bool(quoted), bool(literal), bool(glob))


def test_spans_are_offsets_into_the_text():
    text = "  A=1 cat  'é b' >out 2>&1; ls \\\n x"
    parsed = parse(text)
    first, second = parsed.commands
    assert [text[w.start:w.end] for w in first.assignments + first.words] == ["A=1", "cat", "'é b'"]
    assert [text[r.start:r.end] for r in first.redirects] == [">out", "2>&1"]
    assert text[first.start:first.end] == "A=1 cat  'é b' >out 2>&1"
    assert text[second.start:second.end] == "ls \\\n x"
    assert first.redirects[0].target.start == text.index("out")


def test_words_before_the_first_redirection_are_counted():
    assert [command.words_before_redirect for command in parse("cat a b >f c; > f a b; cat a; x 2>&1").commands] == [3, 0, 2, 1]


@pytest.mark.parametrize("text, words, written", [
    ("a b; ./c d > e", "b ./c d", "e"),
    ("diff <(sort a) >(tee b > c)", "<(sort a) >(tee b > c) a b", "c"),
    ("x $(cat a <b; f=c ./p 2>q) \"$(<d)\"", "$(cat a <b; f=c ./p 2>q) $(<d) a ./p f=c b d", "q"),
    ("for f in a 'b c' $x *.t; do w $f; done", "$f a b c $x *.t", ""),
    ("x `cat a \\`cat b > c\\``", "`cat a \\`cat b > c\\`` a `cat b > c` b", "c"),
    ("[[ -f a && b == c ]]", "-f a b == c", ""), ("x `cat 'a`", "`cat 'a`", ""),
    ("x ${v:-$(cat a)} $(( $(cat b) ))", "${v:-$(cat a)} $(( $(cat b) )) a b", ""),
])
def test_all_words_that_may_name_a_file_are_mentioned(text, words, written):
    parsed = parse(text)
    assert " ".join(word.text for word in parsed.mentioned()) == words
    assert parsed.written == set(written.split())


# --- commands, pipelines

@pytest.mark.parametrize("text, expected", [
    ("a; b & c && d || e\nf", "a b c d e f"),
    ("for f in x y; do a; b $f | c; done; d", "a b c d"),
    ("for f; do a; done", "a"), ("for ((i=0; i<3; i++)) { a; }", "a"), ("select x in p q; do a; done", "a"),
    ("while a; do b; done < f", "a b"), ("until ! a | b; do c; done", "a b c"),
    ("if a; then b; elif c; then d; else e; fi", "a b c d e"),
    ("case $x in p|q) a;; (r) b;& *) c; esac; d", "a b c d"),
    ("f() { a; }; function g { b; }; function h() ( c ); d", "a b c d"),
    ("( a; ( b ) ); { c; { d; }; }", "a b c d"), ("((a; b)); ((c); d)", "c d"),
    ("[[ -f x && (y == *(z|w) || ! v =~ ^(p|q r)$) ]] && a", "a"),
    ("time a; time -p b; time -- c; ! d; ! time ! e", "a b c d e"), ("coproc a; coproc N { b; }; coproc (c)", "a b c"),
    ("a | time b", "a time"), ("a $(b; c) <(d) \"$(e)\"", "a"),
    ("a <<E | b\n$(x ' \nE\nc <<-'F' <<G; d\n\tx\n\tF\nE\nG\ne", "a b c d e"),
    ("a $(cat <<E\n)\nE\n) b; c", "a c"), ("a \"$(cat <<E\n'\nE)\" && b", "a b"), ("cat <<E\nE\\\n\na", "cat a"),
    ("cat <<E\n\tE\nE)\nE \nE\na", "cat a"), ("cat <<-E\n\tE\na", "cat a"), ("a $(cat <<E); b\n'\nE\nc", "a b c"), ("!(a | b) && c", "a b c"),
])
def test_simple_commands_at_shell_level_are_found_in_textual_order(text, expected):
    assert " ".join(command.words[0].text for command in parse(text).commands) == expected


@pytest.mark.parametrize("text, expected", [
    ("cat a | sort | uniq", "012"), ("cat a && cat b", "0 1"), ("a; b | c", "0 12"), ("a | b; c |& d", "01 23"),
    ("(cat a | sort) > f", "01"), ("{ cat a | sort; } > f", "01"), ("(a; b) | c", "012"), ("a | (b | c) | d", "0123"), ("a | { b; c; }; d", "012 3"), ("( a | (b; c) )", "0 1 2"),
    ("a | while b; do c | d; done", "0 1 23"), ("! a |\n b", "01"), ("for f in x; do a | b; done", "01"), ("a $(b | c) | d", "01"),
])
def test_pipelines_join_what_has_nothing_but_a_bar_between(text, expected):
    assert " ".join("".join(map(str, indices)) for indices in parse(text).pipelines) == expected


def primary(text, number=1):
    return [command.words[0].text for command in parse(text).primary(number)]


def test_the_primary_command_comes_first_then_the_rest_of_its_pipeline():
    assert primary("a | b | c") == ["a", "b", "c"]
    assert primary("a | b | c", 3) == ["c", "a", "b"]
    assert primary("x; a | b", 2) == ["a", "b"]
    assert primary("cat a && cat b") == ["cat"]
    assert primary("X=1; cat a") == ["cat"]             # a command without words is none that could be meant
    assert primary("X=1") == primary("[[ a ]]") == []
    for number in (0, 3, -1):
        with pytest.raises(UsageError, match="no command number %d: the command line has 2" % number):
            parse("a | b").primary(number)


@pytest.mark.parametrize("text, expected", [
    ("cat a > f", [(">", "f")]), ("cat a >> f", [(">>", "f")]), ("cat a &> f", [("&>", "f")]), ("cat a &>>f", [("&>>", "f")]),
    ("cat a >& f", [(">&", "f")]), ("cat a 1> f", [(">", "f")]), ("cat a >| f", [(">|", "f")]), ("> f cat a", [(">", "f")]),
    ("cat a 2> f", []), ("cat a >&2", []), ("cat a 2>&1", []), ("cat a >&-", []), ("cat a 1>&2-", []), ("cat < a", []),
    ("cat <<E\n> f\nE", []), ("cat <<< f", []), ("cat <> f", []), ("cat a > -", [(">", "-")]), ("cat a 2>e >o", [(">", "o")]),
    ("cat a > f > g", [(">", "f"), (">", "g")]), ("cat a > f | sort", []), ("cat a > f; true", []), ("cat a > f && true", []),
    ("cat a | sort > f", [(">", "f")]), ("(cat a | sort) > f", [(">", "f")]), ("{ cat a; } 2> e > f", [(">", "f")]),
    ("(cat a > f) > g", [(">", "f"), (">", "g")]), ("(cat a) > f; true", []), ("for x in a; do cat $x; done > f", [(">", "f")]),
    ("a | { b; } > f", [(">", "f")]), ("a > f; [[ x ]]", []), ("a > f & ", [(">", "f")]), ("((1)) > f", [(">", "f")]),
    ("echo $(a > f)", []), ("f() { a; } > g", []), ("a > 'x y'", [(">", "x y")]), ("a > $x", [(">", "$x")]), ("a >\\\n> f", [(">>", "f")]),
])
def test_output_redirects_are_those_of_the_last_command_and_the_outermost_group(text, expected):
    assert targets(parse(text).output_redirects()) == expected


def test_last_is_the_last_simple_command_of_the_last_list_element():
    assert parse("a; b | c").last == 2
    assert parse("a; (b; c)").last == 2
    assert parse("a; [[ b ]]").last is None
    assert parse("a && ((1))").last is None


def test_input_redirects_are_all_files_read_at_shell_level():
    parsed = parse("while read x; do cat < a; done < b; sort 0<'c d' <<< x <&3 $(cat < no) | (cat) < $e")
    assert targets(parsed.input_redirects()) == [("<", "a"), ("<", "b"), ("<", "c d"), ("<", "$e")]
    assert [redirect.fd for redirect in parse("a 2>x {fd}>y 10<z").redirects] == [2, None, 10]


# --- refusals

@pytest.mark.parametrize("text, message", [
    ("", "the command is empty"), (" \n # nothing\n", "the command is empty"),
    ("cat 'a b", "the command has an unclosed ' at column 5"), ('cat "a', 'the command has an unclosed " at column 5'),
    ("a; cat $'a", "the command has an unclosed $' at column 8"), ("cat `ls", "the command has an unclosed ` at column 5"),
    ("cat $(ls", "the command has an unclosed $( at column 5"), ("cat $((1)", "the command has an unclosed $(( at column 5"),
    ("cat ${x", "the command has an unclosed ${ at column 5"), ("a\nb 'c\n", "the command has an unclosed ' at line 2, column 3"),
    ("(a; b", "the command has an unclosed ( at column 1"), ("if a; then b", "the command has an unclosed if at column 1"),
    ("{ a }", "the command has an unclosed { at column 1"), ("a=(1 2", "the command has an unclosed ( at column 3"),
    ("[[ a == b", "the command has an unclosed [[ at column 1"), ("a; while b; do c", "the command has an unclosed while at column 4"),
    ("a | | b", "the command has an unexpected | at column 5"), ("a;; b", "the command has an unexpected ;; at column 2"),
    ("a )", "the command has an unexpected ) at column 3"), ("a; done", "the command has an unexpected done at column 4"),
    ("if a\nthen fi", "the command has an unexpected fi at line 2, column 6"), ("for x in a\nb", "the command has an unexpected b at line 2, column 1"),
    ("a &&", "the command has an end that comes too early at column 5"), ("f() a", "the command has an unexpected a at column 5"),
    ("cat >", "the command has nothing after the > at column 5"), ("cat > | a", "the command has nothing after the > at column 5"),
    ("for ((a;b)); do c; done", "the command has less than two ; in the (( at column 5"),
    ("a \0", "the command has a NUL character at column 3"),
])
def test_a_broken_command_is_refused_with_one_sentence(text, message):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("opening, closing", [
    ("( ", " )"), ("$(", ")"), ('"$(', ')"'), ("{ ", "; }"), ("${x:-", "}"), ('"${x:-', '}"'), ("if a; then ", "; fi"), ("f() { ", "; }"),
    ("<(", ")"), ("$((", "))"), ("case x in a) ", "; esac"), ("while b; do a | ", "; done"), ("[[ $( ", " ) ]]"), ("a=($(", "))"),
])
def test_what_nests_too_deep_is_refused_and_never_a_recursion_error(opening, closing):
    parse(opening * 20 + "a" + closing * 20)
    for depth in (MAX_DEPTH + 1, 20000):
        for text in (opening * depth, opening * depth + "a" + closing * depth):
            with pytest.raises(UsageError, match="more than %d constructs inside each other" % MAX_DEPTH):
                parse(text)


@pytest.mark.parametrize("piece", [
    "a;", "a\n", "a|", "\\a", "''", '"" ', "$x", "[", "a[", "`a` ", "(a);", "((1));", "cat <<E\nE\n", "x\\\n", "*?", ">a ", "#", "!{", "{x", "@("])
@pytest.mark.slow
def test_long_commands_are_parsed_or_refused(piece):
    we_accept(piece * (100000 // len(piece)) + "a")


def test_what_may_be_arithmetic_or_groups_is_not_read_over_and_over():
    parse("((a $( " * 24 + "1" + " ) ) )" * 24)         # 2 ** 24 readings if done naively


# --- agreement with bash

#: Scripts parted by ``¦`` (%n is a line end, %x a vertical tab), which bash and we accept.
VALID = r"""
a¦a|b|c¦echo a<(b)¦2>f 3<g cat¦2&>f¦{x}>f cat¦!¦! ;¦! ! a¦time¦time -p¦time -- a¦! time a¦a && time (b)¦a && !¦if !; then b; fi
a=(1 2)¦export a=(1 2)¦eval a=(1 2)¦>f a=(1 2)¦A=1 b=(1 2) c¦a+=(1 2)¦a[1]=(1 2)¦a[x y]=3¦a[$(b)]=x c¦a[x;y]=3¦A=1 if true¦export n[¦a=()¦a=(%n1 # c%n2)
a=(b)c¦a=(b) c=(d)¦a=(<(b))¦declare a[1]=(2)¦for x; do a; done¦for x do a; done¦for x in; do a; done¦for x in a b; { c; }¦for x; { a; }¦for x%n{ a; }
for x%nin a b%n%n do c; done¦for ((;;)); do a; done¦for ((;;)) { a; }¦for((a;b;c)) do d; done¦for (( ";" ; a; b)); do c; done¦for if in a; do in=1; done
for "x" in $(ls) `ls` 'a b'; do b; done¦for x in if do done; do a; done¦select x in a; do b; done¦select x%n{ a; }¦case x in esac¦case x in a) ;; esac
case x in a) b;; c) esac¦case x in (a|b) c;; (esac) d;; esac¦case x in a | b ) c;& d) e;;& f) ;; esac¦case in in in) a;; esac¦case x%n in a) b%n esac
case "$x" in $(a)) ;; esac¦case x in *) a & ;; esac¦case x in(a)b;;esac¦case x in # c%n a) ;; # d)%n esac¦case x in a) (b) esac¦case x in a) { b; } esac
f() { a; }¦f () ( a )¦f() [[ a ]]¦f() ((1))¦f() for x; do a; done¦f()%n%n{ a; } > g¦function f { a; }¦function f () { a; }¦function f (a)¦function f ((1))
function if { a; }¦"f"() { a; }¦$f() { a; }¦f-g.h() { a; }¦1() { a; }¦@() { a; }¦function { { a; }¦!(a)¦f(){ a; }¦f()(a)¦f() { a; } && g() { b; }
[[ a ]]¦[[ ! a ]]¦[[ -f a && (b || ! c) ]]¦[[ a < b ]]¦[[ a<b ]]¦[[ a == @(b|c)* ]]¦[[ a != !(b) ]]¦[[ a =~ ^(b|c d)+$ ]]¦[[ (a =~ b(c)) ]]¦[[ a =~ a|b ]]
[[ a =~ (b;c) && d ]]¦[[%n a == b &&%n c < d%n]]¦[[ ! (a) ]]¦[[ a == "]]" ]] > f¦[[a]]¦[[ a == <(b) ]]¦[[ a == b # c%n ]]¦if [[ a ]] then b; fi¦[[ -n $(a) ]] | b
((1+2))¦((1+2)) > f¦((echo a); echo b)¦( (a) )¦((a);(b))¦((a "))" ))¦((a # ))¦((a%n+ b ))¦(((1)))¦echo $((1+2)) $(((1)))¦echo $((a) )¦echo $((a);(b))¦echo $((a[$(b)]))
echo $[1+[2]]¦echo ${}¦echo ${a:-'}'}¦echo "${a#'}'}"¦echo "${a:-"b}c"}"¦echo ${a:-{b}}¦echo ${a:-$(b })}¦echo ${a:-`b }`}¦echo ${a:-\}}¦echo "${a:-$'}'}"
echo ${a b;(|}¦echo `if`¦echo `a '`¦echo `a \`b\``¦echo "`a "b"`"¦echo "`"`"¦echo "$(a ")")"¦echo $()¦echo $(a;) $(a &)¦echo $(< f)¦echo $(time | a)¦echo $(a; time (b))¦echo "<(if)"
echo $(case x in x) a;; esac)¦echo $(case x in (x) esac)¦echo $(# it's%na)¦echo $"a\"b"¦echo $'a\''¦echo "$'"¦echo "$" a$¦echo a\|b¦echo '\'¦echo "\$(if)"
a; b;¦a &¦a & b¦a&b¦a%n%n%nb¦a |&%n# c%n b¦a || b¦a &&%n%nb¦(a)¦(a) > f 2>&1¦(%na%n)¦{ a; }¦{ a; } > f < g¦{(a)}¦{ { a; } }¦{ (a) }¦{ a & }¦{}¦{ ! ; }¦{ if a; then b; fi }
if a; then b; fi¦if a%nthen b%nelif c; then d; else e%nfi > f¦if (a) then (b) fi¦if ! a; then b; fi¦if a & then b; fi¦if a; then b; fi | c¦if(a)then(b)fi
while a; do b; done¦until { a; } do b; done < f¦while (a) do b; done &¦while a%ndo%nb%ndone | c¦while a; { b; }; do c; done¦echo if then fi } { ! [[ in
coproc a¦coproc A { b; }¦coproc (a)¦coproc A if a; then b; fi¦coproc A b=1 c¦coproc >f a¦a | coproc b¦coproc time a¦coproc A%nb
> f¦>f>g¦a >& 2¦a >&-¦a <&3-¦a 2>& f¦a >| f¦a 3<>f¦a <<< "b c" d¦a <<<$x¦a &>>f¦a&>f¦a > >(b)¦a < <(b)¦a 2 > f¦a a2> f¦{a[1]}>f¦a {1}>f¦"2">f¦\2>f¦a >! f¦a 2&>1
a >&-b¦a 2>&1>f¦a <&1<f¦>f export a=(1)¦>f A=1 b=(1)¦A=1 >f b[¦(a) 2>&1b¦&>f a¦a > if¦a > }¦a &2>1¦cat <<E%nfoo%nE%nb¦cat <<E | b%n$(if%nE¦cat <<E &&%n"'%nE%nb¦cat <<E; c <<-'F'%na%nE%n	F%nb¦(cat <<E%n)%nE%n)
if cat <<E; then%nfoo%nE%nb; fi¦cat <<E "a%nb"%nfoo%nE%nb¦cat <<"E F"%nE F%nb¦cat <<$x%n$x%nb¦cat <<E%nE\%n%nb¦echo $(cat <<E%n)%nE%n)¦echo "$(cat <<E%n'%nE)"
i\%nf a; then b; fi¦a &\%n& b¦a >\%n> b¦case x in a) ;\%n; esac¦echo $\%n(b)¦f(\%n) { a; }¦a \%n# c¦\%na¦a%xb¦[ a¦a=b¦a==b¦=a¦1=2¦a-=1¦_a=1 b¦# a%nb
"""
#: The same, which bash and we refuse.
INVALID = r"""
if¦fi¦then¦do¦done¦else¦elif¦esac¦in a¦}¦]]¦;¦&¦|¦a |¦a &&¦a ||¦&& a¦a && && b¦a;; ¦a; ;¦a & ;¦a;&b¦a & & b¦a | ! b¦a | | b¦a%n&& b¦a%n| b¦;a¦a;%n;b¦a &&& b¦a ||| b
()¦( )¦(%n)¦(a¦a)¦(a))¦(a) b¦(a)(b)¦(a) > f b¦{ }¦{ a }¦{a; }¦{ a; } b¦{ a; }}¦{ a; } }¦{ (a) > f }¦(a) }¦{ ! }¦! && a¦! | a¦time && a¦a(b)¦a ()¦echo (¦echo )¦echo ((
if a then b; fi¦if a; then; b; fi¦if a; then b fi¦if a; then fi¦if; then b; fi¦if a; then b; else; c; fi¦if a; then b; fi fi¦if a; then b; fi c¦if a; then b¦if (a) >f then b; fi
while a do b; done¦while a; do done¦while; do a; done¦while a; { b; }¦for x { a; }¦for x in a b { c; }¦for x y in a; do b; done¦for; do a; done¦for x in a do b; done
for x in a; do b done¦for x in a; b; do c; done¦for x in a & do b; done¦for x in (a); do b; done¦for x in a > f; do b; done¦for x%n%n; do a; done¦for x ; ; do a; done
for ((a;b)); do c; done¦for ( (a;b;c)); do d; done¦for ((a;b;c));; do d; done¦select x { a; }¦select ((a;b;c)); do d; done¦for in in in; do in; done¦for x in a;; do b; done
case x¦case x in¦case x in a) b esac¦case x in esac) a;; esac¦case x in a) ;; ;; esac¦case x in | a) ;; esac¦case x in a|) ;; esac¦case x in ) ;; esac¦case x in () ;; esac
case x in a b) c;; esac¦case x y in a) b;; esac¦case x in a%n) b;; esac¦case x in (%na) b;; esac¦case in esac¦case > in a) b;; esac¦case x in a) b;; esac c
f() a¦f() g() { a; }¦f(a) { b; }¦f()¦f(%n) { a; }¦A=1 f() { a; }¦>f f() { a; }¦f() { a; } b¦f() coproc a¦f() ! a¦if() { a; }¦!() { a; }¦a=b() { c; }¦time() { a; }¦{() { a; }
function¦function f¦function f a¦function f;{ a; }¦function a b { c; }¦function (a)¦function f() > f { a; }¦function f[[ a ]]¦coproc¦coproc ! a¦coproc coproc a
coproc f() { a; }¦coproc a b { c; }¦coproc%na¦[[ a¦[[ a]]¦[[ a ]] b¦[[ a =~ (b ]]¦[[ a =~ (b)]]¦[[ a == b]]¦((1¦((1)¦((1)) 2¦((a)) )¦(( ( ))¦((a;if) )¦(( $(if) ))¦(( ' ))
echo a=(1 2)¦command declare a=(1)¦"export" a=(1)¦a=b=(c)¦a=$(b)=(c)¦a=(b¦a=(b;c)¦a=(b|c)¦a=(b>c)¦a=((b))¦a=(b (c))¦a= (b)¦a=(b)(c)¦a=(b)c=(d)¦declare "a"=(1)¦a-b=(1)¦é=(1)
a=1 b c=(1)¦a[1¦a[¦A=1 n[¦>¦a >¦a > > b¦a > ;¦a > &¦a <<¦a << <¦a <<<¦a <<<(b)¦a > (b)¦a >>(b)¦a >>> b¦a <|b¦a >&¦a >&|f¦a &>|f¦a >>& f¦(a) >&-b¦(a) <& -b¦a > 2>f¦export >f a=(1)¦A=1 >f b=(1)¦a > a=(b)
echo $(¦echo $(a¦echo $(if)¦echo $(time (a))¦echo $(;)¦echo $(a &&)¦echo $(a # )¦echo "$(a"¦echo "$(a ")"¦echo <(¦echo <(if)¦echo "a¦echo 'a¦echo $'a\'¦echo `a¦echo "`a¦echo "a\
echo `a '`'`¦echo ${a¦echo "${a:-'}"¦echo "${a#'}"¦echo ${a:-$(if)}¦echo "${a:-"b}"¦echo $((1¦echo $((1)¦echo $(( ' ))¦echo $[1¦echo "$"a"¦echo "$((1)"¦echo \$(if)
cat <<E; b%nfoo%nE%nif¦cat <<E "a%nfoo%nE%nb"%nx%nE%nif¦cat <<-E%n	E%nif¦cat <<E%nfoo\%nE%nE%nif¦cat <<"E"%nfoo\%nE%nif¦echo $(cat <<E%nfoo)¦a \%n)¦a # c \%nif¦a%xb;if
"""


def scripts(corpus):
    return [text.replace("%n", "\n").replace("%x", "\x0b") for line in corpus.strip("\n").split("\n") for text in line.split("¦")]


@needs_bash
@pytest.mark.parametrize("corpus, expected", [(VALID, True), (INVALID, False)], ids=["valid", "invalid"])
def test_bash_and_we_agree_on_every_script_of_the_corpus(corpus, expected):
    assert len(scripts(corpus)) > 150
    verdicts = [(text, bash_accepts(text), we_accept(text)) for text in scripts(corpus)]
    assert [verdict for verdict in verdicts if verdict[1:] != (expected, expected)] == []


# --- random scripts

PLAIN = "a b ls x1 foo.txt -l --opt=3 d/e.txt 2 07 a=b if then do fi in é { } ! [ ] ~ % , : @ a#b - * ? [ab] {a,b} $x $? ${x}".split()
IN_QUOTES = ["a b", ";", "|", "&", "(", ")", "#", "<", ">", "{", "}", "é", "", "*", "if", "\n", "\t", "x"]
DAMAGE = "&& || ; & | |& ;; ;& ( ) { } < > << <<E <<< <( >& &> ' \" ` $ $( $(( ${ (( )) [[ ]] \\ # ! time if then else fi for in do done " \
         "while case esac function coproc select a=( x 2 =".split() + ["\n", " "]


class Scripts:
    """A source of random scripts, most of them valid: it writes the grammar, and ``heredocs`` where lines end."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.heredocs = ""

    def one(self, *choices):
        return self.random.choice(choices)

    def many(self, make, *counts):
        return "".join(make() for _ in range(self.one(*counts)))

    def script(self):
        text = self.list(self.one(1, 2, 3))
        return text + (self.line_end() if self.heredocs else self.one("", "", "\n", " # it's the end"))

    def line_end(self):
        text, self.heredocs = "\n" + self.heredocs, ""
        return text

    def blank(self):
        return self.one(" ", " ", " ", "  ", "\t", " \\\n")

    def space(self):
        """A blank, or a line end where that is as good."""
        return self.one(self.blank, self.blank, self.line_end, lambda: " # don't" + self.line_end())()

    def separator(self):
        return self.line_end() if self.heredocs or self.one(0, 0, 1) else self.one("; ", ";", " &")

    def literal(self):
        """A piece of a word, without expansions."""
        return self.one(
            lambda: self.one("a", "b.txt", "x-1", "é", "0", "=b", "%", "if", ","),
            lambda: "\\" + self.one(*" $\\'\"`;|&()<>#*{}~!é\n"),
            lambda: "'%s'" % self.many(lambda: self.one("\\", '"', "`", "$x", *IN_QUOTES), 0, 1, 2, 3),
            lambda: '"%s"' % self.many(lambda: self.one('\\"', "\\$", "\\\\", "\\`", "\\a", "\\\n", "'", *IN_QUOTES), 0, 1, 2, 3),
            lambda: "$'%s'" % self.many(lambda: self.one(*"\\n \\' \\\\ \\x41 \\xc3\\xa9 \\u00e9 \\101 \\cA \\q \\e \\U1f600 \"".split(),
                                                         *IN_QUOTES), 0, 1, 2, 3))()

    def word(self, depth):
        return self.many(lambda: self.one(*[lambda: self.one(*PLAIN)] * 4, self.literal, lambda: self.expansion(depth),
                                          lambda: '"a%sb"' % self.expansion(depth))(), 1, 1, 1, 2, 3)

    def expansion(self, depth):
        if depth > 0 and self.one(0, 0, 1):
            outside, self.heredocs = self.heredocs, ""
            text = "(%s%s%s)" % (self.one("", " ", "\n"), self.list(depth - 1), self.line_end() if self.heredocs else self.one("", " ", "\n"))
            self.heredocs = outside
            return "$" + (" " if text.startswith("((") else "").join((text[:1], text[1:]))
        operator = self.one(":-", "-", ":=", "+", "#", "##", "%", "/", "//", "^", ",", ":")
        return self.one("$x", "$1", "$@", "$$", "${#x}", "${!x}", "${x[1]}", "$((x * (y + 1)))", "$((1<<2))", "$(( a[$(ls)] ))", "$[1+a[1]]", "`ls`",
                        "`a \\`b\\` | c`", "${x%s%s}" % (operator, self.one("a b", "'}'", '"}"', "\\}", "${y}", "$(ls)", "`ls`", "", "(", "|")))

    def redirect(self, depth):
        if self.one(0, 0, 0, 1):
            end, tabs = self.one("E", "EOF"), self.one("", "-")
            self.heredocs += self.many(lambda: self.one("foo\n", "$(\n", "'\"\n", "\n", " E\n", "done\n", "\tx\n", "a\\\\\n"), 0, 1, 3)
            self.heredocs += ("\t" if tabs else "") + end + "\n"
            return "<<" + tabs + self.one("%s", " %s", "'%s'", '"%s"', "\\%s") % end
        return self.one("2>&1", ">&2", "2>&-", "<&-", "<<< " + self.word(depth), "< <(ls; x)", "> >(cat)") if self.one(0, 1) else self.one(
            "<", ">", ">>", ">|", "<>", ">&", "<&", "&>", "&>>", "2>", "{fd}>", "1<") + self.one("", " ") + "f" + self.word(depth)

    def simple(self, depth):
        parts = [self.one("A=1", "B=", "C='x y'", "a=(1 2)", "a[1]=x", "b+=3", 'D="$(ls)"') for _ in range(self.one(0, 0, 0, 1, 2))]
        parts += [self.redirect(0)] if self.one(0, 0, 0, 0, 1) else []
        parts += [self.one("cat", "ls", "./x", "'e'cho", "$x", "[", "export")]
        parts += [self.redirect(depth) if self.one(0, 0, 0, 1) else self.word(depth) for _ in range(self.one(0, 1, 2, 3))]
        return "".join(part + self.blank() for part in parts[:-1]) + parts[-1]

    def block(self, depth, *words):
        """Each word, with commands after each but the last."""
        return "".join(word + self.space() + self.list(depth - 1) + self.separator() + " " for word in words[:-1]) + words[-1]

    def compound(self, depth):
        text = self.one(
            lambda: "( %s%s)" % (self.list(depth - 1), self.line_end()), lambda: self.block(depth, "{", "}"),
            lambda: self.block(depth, "if", "then", "fi"), lambda: self.block(depth, "if", "then", "elif", "then", "else", "fi"),
            lambda: self.block(depth, self.one("while", "until"), "do", "done"),
            lambda: self.block(depth, self.one("for", "select") + " i in %s%s do" % (self.word(depth), self.separator().replace("&", ";")), "done"),
            lambda: self.block(depth, "for ((%s)); do" % self.one(";;", "i=0; i<3; i++", "i=(1); $x; 1"), "done"),
            lambda: self.block(depth, "case %s in %s)" % (self.word(depth), self.one("a", "(*", "'b c'|d")), "") + self.line_end() + self.one(";;", "") + " esac",
            lambda: "((%s))" % self.one("1", "x > 3", "i++", "a[1] << (2)", "$(ls)", '"1"', "x && (y || z)"),
            lambda: "[[ %s ]]" % self.one("a", "-f a", "$x == y*", "! -d a && b", "(a || b) && c", "a =~ ^(b|c d)+$", "a < b", "a == @(b|c)*", "a &&\n b"))()
        return text + self.many(lambda: " " + self.redirect(0), 0, 0, 1)

    def command(self, depth):
        if depth <= 0 or self.one(0, 0, 1):
            return self.simple(depth)
        if self.one(0, 0, 0, 1):
            return self.one("f() ", "f ()\n" if not self.heredocs else "f () ", "function f ", "function g() ", "coproc ", "coproc N ") + self.block(depth, "{", "}")
        return self.compound(depth)

    def list(self, depth):
        text = self.one("", "", "", "", "! ", "time -p ") + self.command(depth)
        for _ in range(self.one(0, 0, 1, 2)):
            joint = self.one(" | ", "|", "|&", " && ", "&&", "||", "&&" + self.line_end())
            text += joint + self.command(depth) if self.one(0, 1) else self.separator() + " " + self.command(depth)
        return text

    def damaged(self, text):
        """``text`` with one or two random changes."""
        for _ in range(self.one(1, 1, 2)):
            pos, other = self.random.randrange(len(text) + 1), self.random.randrange(len(text) + 1)
            text = self.one(text[:pos] + text[pos + self.one(1, 1, 2, 5):], text[:pos] + self.one(*DAMAGE) + text[pos:],
                            text[:pos] + text[other:other + self.one(1, 3, 10)] + text[pos:], text[:pos])
        return text


#: Where we take what bash refuses: extended globs, the inside of [[ ]], "for ((", what follows a "((" that is no
#: arithmetic, "!" and "time" in front of ";;", and a here-document that a $(...) announces but does not hold.
LENIENT = re.compile(r"[?*+@!](\\\n)*\(|\[\[|\(\(|(!|time)[ \t]*;;|[$<>]\(.*<<", re.DOTALL)
#: Where we refuse what bash takes: no command at all, "${" that does not end in arithmetic, and the last four above.
STRICT = re.compile(r"\A[\s\\]*(#.*)?\Z|(\(\(|\$\[).*\$\{|\[\[|for.*\(\(|[$<>]\(.*<<", re.DOTALL)


@pytest.mark.slow
@needs_bash
def test_whatever_bash_accepts_of_random_scripts_we_accept():
    source, accepted = Scripts(1), 0
    for _ in range(300):
        text = source.script()
        source.heredocs = ""
        verdict = bash_accepts(text)
        accepted += bool(verdict)
        if verdict:
            parse(text)
        elif verdict is False and we_accept(text):
            assert LENIENT.search(text), text
    assert accepted > 200                               # the generator is good for something


@pytest.mark.slow
@needs_bash
def test_we_refuse_damaged_scripts_when_bash_does():
    source, refused = Scripts(2), 0
    for _ in range(300):
        text = source.damaged(source.script())
        source.heredocs = ""
        verdict, ours = bash_accepts(text), we_accept(text)
        refused += verdict is False
        if verdict is not None and verdict != ours:
            assert (STRICT if verdict else LENIENT).search(text), text
    assert refused > 100


@needs_bash
def test_the_text_of_literal_words_is_what_bash_passes_on():
    source = Scripts(3)
    lines = ["p " + " ".join(source.many(source.literal, 1, 1, 2, 3, 4) for _ in range(source.one(1, 2, 3, 4))) for _ in range(400)]
    script = "\n".join(lines)
    commands = parse(script).commands
    done = subprocess.run([BASH, "-c", "--", "p() { printf '%s\\0' \"$#\" \"$@\"; }\n" + script], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"}, timeout=20)
    expected = []
    for command in commands:
        assert all(word.literal and not word.glob for word in command.words)
        expected += [str(len(command.words) - 1)] + [word.text for word in command.words[1:]]
    assert len(commands) == len(lines)
    assert os.fsdecode(done.stdout).split("\0")[:-1] == expected


def test_a_word_means_the_same_alone_as_in_its_script():
    source = Scripts(4)
    for _ in range(200):
        script = source.script()
        source.heredocs = ""
        for command in parse(script).commands if we_accept(script) else ():
            for word in command.words[1:]:
                assert "=(" in word.text or parse("x " + script[word.start:word.end]).commands[0].words[1].text == word.text
