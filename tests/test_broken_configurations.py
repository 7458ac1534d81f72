"""Broken configurations, each with the exact message that it must give.

A message names the file and the line, the offending word, and the nearest valid one where there are words to
compare.  In the expected texts the folder of the project is left out, and ``~`` stands for the home directory.
"""
import pytest

from seamless_lite.errors import ConfigurationError
from seamless_lite.settings import load_settings

PROJECT = "- project: p\n"
STORES = "hashserver:\n  bufferdir: /b\ndatabase:\n  database_dir: /d\n"
JOBS = "jobserver:\n"
DASK = "daskserver:\n"
CASES = []


def case(title, message, here=None, profile=None, clusters=None, **arguments):
    """One broken configuration: seamless.yaml, seamless.profile.yaml, ~/.seamless/clusters.yaml, arguments."""
    CASES.append(pytest.param(message, here, profile, clusters, arguments, id=title))


def clients(text):
    return {"environ": {"SEAMLESS_REMOTE_CLIENTS": text}}


def cluster(services, rest=""):
    """A cluster file with one cluster on this machine; its services start on line 4."""
    lines = services.splitlines()
    return "c:\n  frontends:\n    - hostname: localhost\n" + "".join("      %s\n" % line for line in lines) + rest


# YAML
case("a tab indents",
     "seamless.yaml:2: a tab indents the line; use spaces",
     "- stage a:\n\t- project: p\n")
case("a quote is not closed",
     "seamless.yaml:1: a quote is opened here and never closed",
     "- project: 'p\n")
case("a bracket is not closed",
     "seamless.yaml:2: the file ends where something is missing, perhaps a closing bracket",
     "- [project\n")
case("two documents",
     "seamless.yaml:2: a second document starts here; keep one, without '---' lines between",
     "- project: p\n---\n- project: q\n")
case("a value starts with an at sign",
     "seamless.yaml:1: a value cannot start with '@'; put it in quotes",
     "- project: @home\n")
case("a value starts with a percent sign",
     "seamless.yaml:1: a value cannot start with '%'; put it in quotes",
     "- project: %home\n")
case("two colons in a line",
     "seamless.yaml:1: the ': ' in this line does not fit: the line above may lack its ':', this one "
     "may be indented too far, or its value may need quotes",
     "- project: execution: remote\n")
case("a line is indented too little",
     "seamless.yaml:3: the line is not indented like the lines that it belongs to",
     "- stage gpu:\n    - cluster: c\n  - execution: remote\n")
case("a mapping follows a list",
     "seamless.yaml:2: the line is not indented like the lines that it belongs to",
     "- project: p\nexecution: remote\n")
case("a colon is missing",
     "~/.seamless/clusters.yaml:3: the ': ' in this line does not fit: the line above may lack its ':', "
     "this one may be indented too far, or its value may need quotes",
     clusters="c:\n  frontends\n  workers: 2\n")
case("an unknown anchor",
     "seamless.yaml:1: this is not YAML: found undefined alias 'name'; a value with special characters "
     "needs quotes",
     "- project: *name\n")
case("an alias of itself",
     "seamless.yaml:2: an alias stands inside of what it stands for; write the value out",
     "- clusters: &a\n    c: *a\n")
case("a control character",
     "seamless.yaml:2: the file holds a control character; remove it",
     "- project: p\n- node: a\x01b\n")
case("not UTF-8",
     "seamless.yaml:2: the file is not UTF-8 text; save it as UTF-8",
     b"- project: p\n- node: caf\xe9\n")
case("a Python object",
     "seamless.yaml:1: the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' means nothing here; "
     "remove it",
     "- project: !!python/object/apply:os.getcwd []\n")
case("a custom tag",
     "seamless.yaml:1: the tag '!name' means nothing here; remove it",
     "- project: !name p\n")
case("a key that is a list",
     "~/.seamless/clusters.yaml:1: a key must be one word before the ':'",
     clusters="? [a, b]\n: 1\n")
case("a key twice",
     "~/.seamless/clusters.yaml:3: the key 'workers' stands here a second time, after line 2; remove "
     "one of them",
     clusters="c:\n  workers: 1\n  workers: 2\n")
case("a cluster twice",
     "~/.seamless/clusters.yaml:3: the key 'c' stands here a second time, after line 1; remove one of "
     "them",
     clusters="c:\n  workers: 1\nc:\n  workers: 2\n")
case("merging a word",
     "~/.seamless/clusters.yaml:2: '<<' must name a mapping, or a list of mappings",
     clusters="c:\n  <<: word\n")
case("nested too deeply",
     "seamless.yaml: the file is nested too deeply",
     "[" * 5000)
case("too large",
     "seamless.yaml: the file is larger than 1 MB, which no configuration is",
     "# comment\n" * 120000)

# shape of command files
case("a mapping instead of a list",
     "seamless.yaml:1: the file is a mapping, and must be a list of commands; start each with '- ', as "
     "in '- project: NAME'",
     "project: p\nexecution: process\n")
case("a word instead of a list",
     "seamless.yaml:1: the file is 'project', and must be a list of commands; start each with '- ', as "
     "in '- project: NAME'",
     "project\n")
case("two commands in one entry",
     "seamless.yaml:2: 'execution' stands in the same entry as 'project'; start its line with '- '",
     "- project: p\n  execution: process\n")
case("an entry is a list",
     "seamless.yaml:1: an entry is a list, and must be a command, as in '- project: NAME'",
     "- - project: p\n")
case("an entry is a number",
     "seamless.yaml:1: an entry is 5, and must be a command, as in '- project: NAME'",
     "- 5\n")
case("an entry is empty",
     "seamless.yaml:2: an entry is empty, and must be a command, as in '- project: NAME'",
     "- project: p\n-\n")
case("no space after the colon",
     "seamless.yaml:1: 'project:p' needs a space after the ':'; write '- project: p'",
     "- project:p\n")

# commands
case("a misspelt command",
     "seamless.yaml:1: unknown command 'projct': did you mean 'project'?",
     "- projct: p\n")
case("a command like none",
     "seamless.yaml:1: unknown command 'xyzzy'; the commands are cluster, project, subproject, "
     "execution, remote, persistent, queue, record, node, nparallel, clusters, inherit_from_parent, "
     "stage",
     "- xyzzy: p\n")
case("a misspelt command in a stage that is not selected",
     "seamless.yaml:2: unknown command 'clustr': did you mean 'cluster'?",
     "- stage gpu:\n    - clustr: c\n")
case("a project without a value",
     "seamless.yaml:1: 'project' has no value; write one after the ':'",
     "- project:\n")
case("a bare project",
     "seamless.yaml:1: 'project' has no value; write one after the ':'",
     "- project\n")
case("a project that YAML takes for a number",
     "seamless.yaml:1: 'project' is 2024, which YAML takes for a number; put it in quotes",
     "- project: 2024\n")
case("a project that YAML takes for a truth value",
     "seamless.yaml:1: 'project' is off, which YAML takes for a truth value; put it in quotes",
     "- project: off\n")
case("a project that is a list",
     "seamless.yaml:1: 'project' is a list, and must be text",
     "- project: [a, b]\n")
case("a project with a space",
     "seamless.yaml:1: 'project' is 'my project', with a ' ' in it; a name consists of letters, digits "
     "and @ _ . ~ -",
     "- project: my project\n")
case("a project with a slash",
     "seamless.yaml:1: 'project' is 'a/b', with a '/' in it; a name consists of letters, digits and @ _ "
     ". ~ -",
     "- project: a/b\n")
case("a project that goes up",
     "seamless.yaml:1: 'project' is '..', which is no name for a folder",
     "- project: ..\n")
case("a project with two dashes",
     "seamless.yaml:1: 'project' is 'a--b', and a name must not contain '--'",
     "- project: a--b\n")
case("a project like a stage",
     "seamless.yaml:1: 'project' is 'STAGE-1', and a name must not contain 'STAGE-'",
     "- project: STAGE-1\n")
case("a subproject that goes up",
     "seamless.yaml:2: 'subproject' is '..', which is no name for a folder",
     PROJECT + "- subproject: a/../b\n")
case("a subproject with an empty part",
     "seamless.yaml:2: 'subproject' is '', and must be text that can be seen",
     PROJECT + "- subproject: a//b\n")
case("a misspelt execution",
     "seamless.yaml:1: 'execution' is 'remot', and must be one of process, spawn, remote: did you mean "
     "'remote'?",
     "- execution: remot\n")
case("an execution like none",
     "seamless.yaml:1: 'execution' is 7, and must be one of process, spawn, remote",
     "- execution: 7\n")
case("a misspelt truth value",
     "seamless.yaml:1: 'persistent' is 'ture', and must be true or false: did you mean 'true'?",
     "- persistent: ture\n")
case("a truth value in quotes",
     "seamless.yaml:1: 'record' is 'true', and must be true or false: did you mean 'true'?",
     "- record: 'true'\n")
case("a misspelt back end",
     "seamless.yaml:1: 'remote' is 'jobsever', and must be one of jobserver, daskserver: did you mean "
     "'jobserver'?",
     "- remote: jobsever\n")
case("nparallel is zero",
     "seamless.yaml:1: 'nparallel' is 0, and must be a whole number of at least 1",
     "- nparallel: 0\n")
case("nparallel is a truth value",
     "seamless.yaml:1: 'nparallel' is true, and must be a whole number of at least 1",
     "- nparallel: true\n")
case("nparallel is a word",
     "seamless.yaml:1: 'nparallel' is 'many', and must be a whole number of at least 1",
     "- nparallel: many\n")
case("a blank node",
     "seamless.yaml:1: 'node' is ' ', and must be text that can be seen",
     "- node: ' '\n")
case("clusters in the project file",
     "seamless.yaml:1: 'clusters' names hosts and programs, which a project must not choose for its "
     "users; move it to seamless.profile.yaml or ~/.seamless/clusters.yaml",
     "- clusters:\n    c: {}\n")
case("clusters is a list",
     "seamless.profile.yaml:1: 'clusters' is a list, and must be a mapping: lines like 'key: value', "
     "indented below it",
     None, "- clusters:\n    - c\n")

# stages
case("a stage without indented lines",
     "seamless.yaml:3: 'stage gpu' holds nothing; write '- stage gpu:', and indent the lines below it "
     "that belong to it",
     PROJECT + "- execution: process\n- stage gpu:\n- cluster: gpu-cluster\n")
case("a stage without a colon",
     "seamless.yaml:1: 'stage gpu' holds nothing; write '- stage gpu:', and indent the lines below it "
     "that belong to it",
     "- stage gpu\n")
case("a stage whose name is a value",
     "seamless.yaml:1: 'stage' has no name before its ':'; write '- stage gpu:', and indent below it "
     "the lines that belong to it",
     "- stage: gpu\n")
case("a stage without a name",
     "seamless.yaml:1: 'stage' has no name before its ':'; write '- stage NAME:', and indent below it "
     "the lines that belong to it",
     "- stage:\n    - project: p\n")
case("a stage without a space",
     "seamless.yaml:1: unknown command 'stagebuild': did you mean 'stage build'?",
     "- stagebuild:\n    - project: p\n")
case("a stage that holds a mapping",
     "seamless.yaml:1: 'stage gpu' is a mapping, and must hold a list; indent the lines that belong to "
     "it, each with '- '",
     "- stage gpu:\n    cluster: c\n")
case("a stage with a bad name",
     "seamless.yaml:1: 'stage' is 'a--b', and a name must not contain '--'",
     "- stage a--b: []\n")
case("inheritance in a stage",
     "seamless.yaml:2: 'inherit_from_parent' cannot stand in 'stage gpu'; move it to the left margin",
     "- stage gpu:\n    - inherit_from_parent\n")
case("inheritance from a folder",
     "seamless.yaml:1: 'inherit_from_parent' is '../..', and must be true or false",
     "- inherit_from_parent: ../..\n")
case("a misspelt stage is asked for",
     "there is no stage 'gpuu' in seamless.yaml; the stages are gpu, train, big: did you mean 'gpu'?",
     "- stage gpu: []\n- stage train:\n    - stage big: []\n", stage="gpuu")
case("a stage like none is asked for",
     "there is no stage 'xyz' in seamless.yaml or seamless.profile.yaml; the stages are gpu, cpu",
     "- stage gpu: []\n", "- stage cpu: []\n", stage="xyz")
case("a stage where there are none",
     "there is no stage 'gpu', as no file mentions a stage; write '- stage gpu:' in seamless.yaml, and "
     "indented below it what differs there",
     PROJECT, stage="gpu")
case("a bad stage is asked for",
     "'stage' is 'a/b', with a '/' in it; a name consists of letters, digits and @ _ . ~ -",
     PROJECT, stage="a/b")

# clusters: selection
case("a misspelt cluster",
     "seamless.yaml:2: 'cluster' is 'lcal', and the clusters are local, big: did you mean 'local'?",
     PROJECT + "- cluster: lcal\n", None, "local:\n  frontends: [{}]\nbig:\n  frontends: [{hostname: big}]\n")
case("a cluster where there are none",
     "seamless.yaml:2: 'cluster' is 'gpu', but no cluster is defined; define it in "
     "~/.seamless/clusters.yaml",
     PROJECT + "- cluster: gpu\n")
case("a cluster in a file that cannot be read",
     "~/.seamless/clusters.yaml:2: the file ends where something is missing, perhaps a closing bracket",
     PROJECT + "- cluster: gpu\n", None, "gpu: [\n")
case("remote without a cluster",
     "seamless.yaml:2: 'execution' is 'remote', but no cluster is selected; define one in "
     "~/.seamless/clusters.yaml",
     PROJECT + "- execution: remote\n")
case("remote where all clusters are elsewhere",
     "seamless.yaml:2: 'execution' is 'remote', but no cluster is selected; write '- cluster: NAME', "
     "where NAME is one of big",
     PROJECT + "- execution: remote\n", None, "big:\n  frontends:\n    - hostname: big.example.org\n")
case("remote with the cluster taken away",
     "seamless.yaml:3: 'execution' is 'remote', but no cluster is selected; write '- cluster: NAME', "
     "where NAME is one of c",
     PROJECT + "- cluster: null\n- execution: remote\n", None, cluster(STORES + JOBS))
case("no project",
     "No project defined, and the cluster 'c' (~/.seamless/clusters.yaml:1) needs one; write '- "
     "project: NAME' in seamless.yaml, or give --project",
     "- cluster: c\n", None, cluster(STORES + JOBS))
case("both back ends",
     "~/.seamless/clusters.yaml:1: the cluster 'c' offers both a jobserver and a daskserver; add the line "
     "'- remote: jobserver' or '- remote: daskserver' to seamless.yaml",
     PROJECT + "- cluster: c\n- execution: remote\n", None, cluster(STORES + JOBS + DASK))
case("both back ends and nothing said",
     "~/.seamless/clusters.yaml:1: the cluster 'c' offers both a jobserver and a daskserver; add the line "
     "'- remote: jobserver' or '- remote: daskserver' to seamless.yaml",
     PROJECT + "- cluster: c\n", None, cluster(STORES + JOBS + DASK))
case("no such back end",
     "seamless.yaml:3: 'remote' is 'daskserver', but the cluster 'c' (~/.seamless/clusters.yaml:1) "
     "offers no daskserver; add 'daskserver:' to one of its frontends, or write '- remote: jobserver'",
     PROJECT + "- cluster: c\n- remote: daskserver\n", None, cluster(STORES + JOBS))
case("no back end at all",
     "seamless.yaml:3: 'remote' is 'jobserver', but the cluster 'c' (~/.seamless/clusters.yaml:1) "
     "offers no jobserver; add 'jobserver:' to one of its frontends",
     PROJECT + "- cluster: c\n- remote: jobserver\n", None, cluster(STORES))
case("a jobserver that keeps nothing",
     "seamless.yaml:3: 'persistent' is false, but a jobserver keeps what it computes; write '- "
     "execution: process'",
     PROJECT + "- cluster: c\n- persistent: false\n", None, cluster(STORES + JOBS))
case("a cluster without a hashserver",
     "~/.seamless/clusters.yaml:1: the cluster 'c' offers no hashserver; add 'hashserver:' to one of "
     "its frontends, or write '- persistent: false'",
     PROJECT + "- cluster: c\n", None, cluster(JOBS))
case("a cluster without a database",
     "~/.seamless/clusters.yaml:1: the cluster 'c' offers no database; add 'database:' to one of its "
     "frontends, or write '- persistent: false'",
     PROJECT + "- cluster: c\n", None, cluster("hashserver:\n" + JOBS))
case("a misspelt local_cluster",
     "~/.seamless/clusters.yaml:1: 'local_cluster' is 'lcal', and the clusters are local: did you mean "
     "'local'?",
     PROJECT, None, "local_cluster: lcal\nlocal:\n  frontends:\n    - {}\n")
case("local_cluster is a list",
     "~/.seamless/clusters.yaml:1: 'local_cluster' is a list, and must be text",
     PROJECT, None, "local_cluster: [a]\n")

# clusters: definitions
case("a block typed without indentation",
     "~/.seamless/clusters.yaml:3: 'frontends' is a key of a cluster and not the name of one; indent it "
     "below the cluster's name",
     PROJECT, None, "local:\n...\nfrontends:\n- hostname: localhost\nhashserver:\n...\n")
case("clusters: above the clusters",
     "~/.seamless/clusters.yaml:1: the clusters stand here without 'clusters:' above them; remove that "
     "line",
     PROJECT, None, "clusters:\n  local:\n    frontends: []\n")
case("the cluster file is a list",
     "~/.seamless/clusters.yaml:1: 'clusters' is a list, and must be a mapping: lines like 'key: "
     "value', indented below it",
     PROJECT, None, "- local\n")
case("an empty cluster",
     "~/.seamless/clusters.yaml:1: the cluster 'local' holds nothing; indent its lines below its name",
     PROJECT, None, "local:\n")
case("a cluster that is a word",
     "~/.seamless/clusters.yaml:1: 'local' is 'here', and must be a mapping: lines like 'key: value', "
     "indented below it",
     PROJECT, None, "local: here\n")
case("a bad cluster name",
     "~/.seamless/clusters.yaml:1: 'cluster' is 'my--cluster', and a name must not contain '--'",
     PROJECT, None, "my--cluster:\n  frontends: [{}]\n")
case("no frontends",
     "~/.seamless/clusters.yaml:1: the cluster 'local' has no 'frontends'; add 'frontends:' with '- "
     "hostname: NAME' below it",
     PROJECT, None, "local:\n  workers: 2\n")
case("empty frontends",
     "~/.seamless/clusters.yaml:2: 'frontends' is an empty list, and must be a list, whose entries "
     "start with '- '",
     PROJECT, None, "local:\n  frontends: []\n")
case("frontends is a mapping",
     "~/.seamless/clusters.yaml:2: 'frontends' is a mapping, and must be a list, whose entries start "
     "with '- '",
     PROJECT, None, "local:\n  frontends:\n    hostname: localhost\n")
case("a frontend is a word",
     "~/.seamless/clusters.yaml:3: a frontend is 'localhost', and must hold lines like 'hostname: NAME'",
     PROJECT, None, "local:\n  frontends:\n    - localhost\n")
case("a misspelt key of a cluster",
     "~/.seamless/clusters.yaml:2: unknown key 'frontend' in 'local': did you mean 'frontends'?",
     PROJECT, None, "local:\n  frontend:\n    - hostname: localhost\n")
case("a misspelt type",
     "~/.seamless/clusters.yaml:8: 'type' is 'slrum', and must be one of local, slurm, oar: did you "
     "mean 'slurm'?",
     PROJECT, None, cluster(STORES, "  type: slrum\n"))
case("tunnel is a word",
     "~/.seamless/clusters.yaml:8: 'tunnel' is 'yess', and must be true or false",
     PROJECT, None, cluster(STORES, "  tunnel: yess\n"))
case("workers is zero",
     "~/.seamless/clusters.yaml:8: 'workers' is 0, and must be a whole number of at least 1",
     PROJECT, None, cluster(STORES, "  workers: 0\n"))
case("workers is a word",
     "~/.seamless/clusters.yaml:8: 'workers' is 'four', and must be a whole number of at least 1",
     PROJECT, None, cluster(STORES, "  workers: four\n"))
case("share_stages is a number",
     "~/.seamless/clusters.yaml:8: 'share_stages' is 1, and must be true or false",
     PROJECT, None, cluster(STORES, "  share_stages: 1\n"))
case("a jobserver beside the frontends",
     "~/.seamless/clusters.yaml:8: 'jobserver' belongs to a frontend of the cluster 'c'; indent it "
     "below the '- ' of one in 'frontends'",
     PROJECT, None, cluster(STORES, "  jobserver:\n"))
case("a misspelt key of a frontend",
     "~/.seamless/clusters.yaml:4: unknown key 'hostnme' in 'frontends': did you mean 'hostname'?",
     PROJECT, None, cluster("hostnme: b\n"))
case("a misspelt key of a jobserver",
     "~/.seamless/clusters.yaml:9: unknown key 'port_strt' in 'jobserver': did you mean 'port_start'?",
     PROJECT, None, cluster(STORES + "jobserver:\n  port_strt: 55300\n"))
case("a misspelt key of a hashserver",
     "~/.seamless/clusters.yaml:5: unknown key 'buferdir' in 'hashserver': did you mean 'bufferdir'?",
     PROJECT, None, cluster("hashserver:\n  buferdir: /b\n"))
case("a jobserver that is a word",
     "~/.seamless/clusters.yaml:8: 'jobserver' is 'yes please', and must be a mapping: lines like 'key: "
     "value', indented below it",
     PROJECT, None, cluster(STORES + "jobserver: yes please\n"))
case("a port that is a word",
     "~/.seamless/clusters.yaml:9: 'port_start' is 'http', and must be a whole number from 1 to 65535",
     PROJECT, None, cluster(STORES + "jobserver:\n  port_start: http\n  port_end: 55399\n"))
case("a port out of range",
     "~/.seamless/clusters.yaml:10: 'port_end' is 70000, and must be a whole number from 1 to 65535",
     PROJECT, None, cluster(STORES + "jobserver:\n  port_start: 55300\n  port_end: 70000\n"))
case("a port too few",
     "~/.seamless/clusters.yaml:8: 'jobserver' has a 'port_start' but no 'port_end'; add the other one, "
     "or remove it",
     PROJECT, None, cluster(STORES + "jobserver:\n  port_start: 55300\n"))
case("ports the wrong way round",
     "~/.seamless/clusters.yaml:10: 'port_end' is 55300, which is less than 'port_start' 55399",
     PROJECT, None, cluster(STORES + "jobserver:\n  port_start: 55399\n  port_end: 55300\n"))
case("a misspelt auth",
     "~/.seamless/clusters.yaml:9: 'auth' is 'hmca', and must be one of hmac, none: did you mean 'hmac'?",
     PROJECT, None, cluster(STORES + "jobserver:\n  auth: hmca\n"))
case("auth as a truth value",
     "~/.seamless/clusters.yaml:9: 'auth' is no, and must be one of hmac, none: did you mean 'none'?",
     PROJECT, None, cluster(STORES + "jobserver:\n  auth: no\n"))
case("a host that ssh takes for an option",
     "~/.seamless/clusters.yaml:3: 'hostname' is '-oProxyCommand=id', which is not the name or the "
     "address of a host",
     PROJECT + "- cluster: c\n", None, "c:\n  frontends:\n    - hostname: -oProxyCommand=id\n")
case("a network interface with a space",
     "~/.seamless/clusters.yaml:9: 'network_interface' is 'eth 0', which is not the name or the address "
     "of a host",
     PROJECT, None, cluster(STORES + "jobserver:\n  network_interface: eth 0\n"))
case("a relative bufferdir on another host",
     "~/.seamless/clusters.yaml:4: 'bufferdir' is 'data', and must start with '/' or '~/', as it is on "
     "another host",
     PROJECT + "- cluster: big\n", None, "big:\n  frontends:\n    - hostname: h\n      hashserver: {bufferdir: data}\n")
case("an empty list as bufferdir",
     "~/.seamless/clusters.yaml:5: 'bufferdir' is a list, and must be text",
     PROJECT, None, cluster("hashserver:\n  bufferdir: []\n"))

# queues
case("a misspelt queue",
     "seamless.yaml:3: 'queue' is 'shrt', and the queues of the cluster 'c' are short, long: did you "
     "mean 'short'?",
     PROJECT + "- cluster: c\n- queue: shrt\n", None,
     cluster(STORES + DASK, "  queues:\n    short: {}\n    long: {}\n"))
case("a queue above its cluster",
     "seamless.yaml:2: 'queue' must stand below the 'cluster' that it belongs to; move it",
     PROJECT + "- queue: short\n- cluster: c\n", None, cluster(STORES + DASK, "  queues:\n    short: {}\n"))
case("a queue without a cluster",
     "seamless.yaml:2: 'queue' is 'short', but no cluster is selected; write '- cluster: NAME' above it",
     PROJECT + "- queue: short\n")
case("a queue where there are none",
     "seamless.yaml:3: 'queue' is 'short', but the cluster 'c' has no queues; remove the line",
     PROJECT + "- cluster: c\n- queue: short\n", None, cluster(STORES + DASK))
case("no queue chosen",
     "~/.seamless/clusters.yaml:1: the cluster 'c' has the queues short, long, but no 'default_queue'; "
     "add it, or write '- queue: NAME' below the 'cluster' command",
     PROJECT + "- cluster: c\n", None, cluster(STORES + DASK, "  queues:\n    short: {}\n    long: {}\n"))
case("a misspelt default_queue",
     "~/.seamless/clusters.yaml:9: 'default_queue' is 'lnog', and the queues of the cluster 'c' are "
     "short, long: did you mean 'long'?",
     PROJECT, None, cluster(STORES + DASK, "  default_queue: lnog\n  queues:\n    short: {}\n    long: {}\n"))
case("a misspelt key of a queue",
     "~/.seamless/clusters.yaml:11: unknown key 'wall-time' in 'short': did you mean 'walltime'?",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      wall-time: 1h\n"))
case("a key of a queue in both spellings",
     "~/.seamless/clusters.yaml:12: the key 'job_cores' stands in 'short' a second time; remove one of "
     "them",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      job-cores: 1\n      job_cores: 2\n"))
case("a misspelt TEMPLATE",
     "~/.seamless/clusters.yaml:12: 'TEMPLATE' is 'shrt', and the queues above are short: did you mean "
     "'short'?",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short: {}\n    long:\n      TEMPLATE: shrt\n"))
case("a TEMPLATE below its queue",
     "~/.seamless/clusters.yaml:11: 'TEMPLATE' is 'short', which must stand above the queue that uses it",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    long:\n      TEMPLATE: short\n    short: {}\n"))
case("cores is a word",
     "~/.seamless/clusters.yaml:11: 'cores' is 'all', and must be a whole number of at least 1",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      cores: all\n"))
case("memory is a list",
     "~/.seamless/clusters.yaml:11: 'memory' is a list, and must be text",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      memory: [1]\n"))
case("a Dask resource that is a word",
     "~/.seamless/clusters.yaml:12: 'GPU' is 'one', and must be a number",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      dask_resources:\n        GPU: one\n"))
case("extra_dask_config is a list",
     "~/.seamless/clusters.yaml:11: 'extra_dask_config' is a list, and must be a mapping: lines like "
     "'key: value', indented below it",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      extra_dask_config: [a]\n"))
case("a SLURM queue without cores",
     "~/.seamless/clusters.yaml:11: the queue 'short' has no 'cores'; add 'cores: NUMBER'",
     PROJECT, None, cluster(STORES + DASK, "  type: slurm\n  queues:\n    short: {}\n"))
case("an exclusive queue with job_cores",
     "~/.seamless/clusters.yaml:11: the queue 'short' is 'exclusive' and has 'job_cores'; remove one of "
     "them",
     PROJECT, None,
     cluster(STORES + DASK, "  type: slurm\n  queues:\n    short:\n      exclusive: true\n      job_cores: 2\n"))
case("an exclusive local queue without cores",
     "~/.seamless/clusters.yaml:10: the queue 'short' has no 'cores'; add 'cores: NUMBER'",
     PROJECT, None, cluster(STORES + DASK, "  queues:\n    short:\n      exclusive: true\n"))
case("a node for a local Dask cluster",
     "seamless.yaml:2: 'node' is 'n1', but the cluster 'c' (~/.seamless/clusters.yaml:1) has no nodes "
     "to choose from; remove the line, or give the cluster 'type: slurm' or 'type: oar'",
     PROJECT + "- node: n1\n", None, cluster(STORES + DASK))

# arguments
case("a bad project is asked for",
     "'project' is 'a b', with a ' ' in it; a name consists of letters, digits and @ _ . ~ -",
     PROJECT, project="a b")
case("a bad subproject is asked for",
     "'subproject' is 'b--c', and a name must not contain '--'",
     PROJECT, project="a", subproject="b--c")
case("a bad execution is asked for",
     "'execution' is 'proces', and must be one of process, spawn, remote: did you mean 'process'?",
     PROJECT, execution="proces")
case("a bad queue is asked for",
     "'queue' is 'sort', and the queues of the cluster 'c' are short: did you mean 'short'?",
     PROJECT + "- cluster: c\n", None, cluster(STORES + DASK, "  queues:\n    short: {}\n"), queue="sort")

# environment
case("remote clients are not JSON",
     "SEAMLESS_REMOTE_CLIENTS: this is not JSON: Expecting property name enclosed in double quotes: "
     "line 1 column 2 (char 1)",
     **clients("{"))
case("remote clients are a list",
     "SEAMLESS_REMOTE_CLIENTS: 'SEAMLESS_REMOTE_CLIENTS' is a list, and must be a mapping: lines like "
     "'key: value', indented below it",
     **clients("[]"))
case("remote clients are none",
     "SEAMLESS_REMOTE_CLIENTS: there is no client in it; add one under 'database', 'buffer' or 'jobserver', "
     "or unset the variable",
     **clients("{}"))
case("remote clients with a misspelt group",
     "SEAMLESS_REMOTE_CLIENTS: unknown key 'bufer' in 'SEAMLESS_REMOTE_CLIENTS': did you mean 'buffer'?",
     **clients('{"bufer": []}'))
case("remote clients in no list",
     "SEAMLESS_REMOTE_CLIENTS: 'buffer' is a mapping, and must be a list of clients",
     **clients('{"buffer": {"remote_url": "http://a"}}'))
case("a remote client with a misspelt key",
     "SEAMLESS_REMOTE_CLIENTS: unknown key 'remote_ulr' in 'buffer': did you mean 'remote_url'?",
     **clients('{"buffer": [{"remote_ulr": "http://a"}]}'))
case("a remote client without a URL",
     "SEAMLESS_REMOTE_CLIENTS: a client under 'database' has no 'remote_url'; add it",
     **clients('{"database": [{"url": "http://a"}]}'))
case("a remote client with a bad URL",
     "SEAMLESS_REMOTE_CLIENTS: 'remote_url' is 'a:80', and must start with http://",
     **clients('{"database": [{"remote_url": "a:80"}]}'))
case("a remote database in a directory",
     "SEAMLESS_REMOTE_CLIENTS: unknown key 'remote_directory' in 'database': did you mean 'remote_url'?",
     **clients('{"database": [{"remote_directory": "/d"}]}'))
case("a remote client half readonly",
     "SEAMLESS_REMOTE_CLIENTS: 'readonly' is 1, and must be true or false",
     **clients('{"buffer": [{"remote_url": "http://a", "readonly": 1}]}'))
case("remote execution with SEAMLESS_CACHE",
     "execution is 'remote', but SEAMLESS_CACHE is set and leaves no cluster; unset it",
     environ={"SEAMLESS_CACHE": "/cache"}, execution="remote")


def write(folder, contents):
    for name, content in contents.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def message_of(tmp_path, here, profile, clusters, arguments):
    arguments = dict(arguments)
    environ = {"HOME": str(tmp_path / "home"), **arguments.pop("environ", {})}
    (tmp_path / "work").mkdir(exist_ok=True)
    write(tmp_path, {"work/seamless.yaml": here, "work/seamless.profile.yaml": profile,
                     "home/.seamless/clusters.yaml": clusters})
    with pytest.raises(ConfigurationError) as caught:
        load_settings(str(tmp_path / "work"), environ=environ, **arguments)
    return str(caught.value).replace(str(tmp_path / "work") + "/", "").replace(str(tmp_path / "home"), "~")


@pytest.mark.parametrize("message, here, profile, clusters, arguments", CASES)
def test_a_broken_configuration_gives_one_clear_sentence(tmp_path, message, here, profile, clusters, arguments):
    assert message_of(tmp_path, here, profile, clusters, arguments) == message


@pytest.mark.parametrize("message, here, profile, clusters, arguments", CASES)
def test_the_sentence_is_the_same_without_libyaml(tmp_path, monkeypatch, message, here, profile, clusters, arguments):
    import yaml
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert message_of(tmp_path, here, profile, clusters, arguments) == message


def test_the_corpus_is_large_enough_and_its_messages_are_one_line():
    assert len(CASES) >= 60
    assert not [case.id for case in CASES if "\n" in case.values[0]]


def test_a_command_file_that_is_a_folder_is_an_error(tmp_path):
    (tmp_path / "work" / "seamless.yaml").mkdir(parents=True)
    assert message_of(tmp_path, None, None, None, {}) == "seamless.yaml: cannot be read: Is a directory"


def test_a_working_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no such folder to look for seamless.yaml in"):
        load_settings(str(tmp_path / "nowhere"), environ={"HOME": str(tmp_path)})


def test_an_inline_cluster_is_blamed_where_it_stands(tmp_path):
    inline = PROJECT + "- clusters:\n    c:\n      frontends:\n        - hostname: localhost\n          jobservr:\n"
    assert message_of(tmp_path, None, inline, None, {}) == (
        "seamless.profile.yaml:6: unknown key 'jobservr' in 'frontends': did you mean 'jobserver'?")


def test_a_broken_cluster_is_a_warning_for_those_who_use_another(tmp_path):
    good = cluster(STORES + JOBS)
    write(tmp_path, {"home/.seamless/clusters.yaml": good + "bad:\n  frontnds: []\n",
                     "home/.seamless/clusters/x.yaml": "odd: [\n", "seamless.yaml": PROJECT + "- cluster: c\n"})
    settings = load_settings(str(tmp_path), environ={"HOME": str(tmp_path / "home")})
    assert settings.cluster.name == "c"
    assert [text.replace(str(tmp_path / "home"), "~") for text in settings.warnings] == [
        "~/.seamless/clusters/x.yaml:2: the file ends where something is missing, perhaps a closing bracket",
        "~/.seamless/clusters.yaml:10: unknown key 'frontnds' in 'bad': did you mean 'frontends'?"]


def test_a_broken_cluster_that_names_another_host_does_not_stop_the_local_one_from_being_chosen(tmp_path):
    write(tmp_path, {"home/.seamless/clusters.yaml": cluster(STORES) + "far:\n  frontends: [{hostname: far, x: 1}]\n",
                     "seamless.yaml": PROJECT})
    settings = load_settings(str(tmp_path), environ={"HOME": str(tmp_path / "home")})
    assert settings.cluster.name == "c" and len(settings.warnings) == 1
