"""The key pair of one Dask cluster: scheduler, workers and clients of that cluster have it, and nobody else.

One certificate that signed itself is everybody's, and the only one that anybody trusts.  It is made with the program
``openssl`` (whose certificate can be valid since long ago, for clocks that differ), or by distributed, if the package
``cryptography`` is there.  It lives in memory; for the moment of its making it is in a private folder.
"""
import os
import shutil
import subprocess
import tempfile
import typing as _t

from .errors import ConfigurationError

_CONFIG = """\
[ca]
default_ca = own
[own]
dir = .
database = index.txt
new_certs_dir = .
serial = serial
default_md = sha256
policy = any
x509_extensions = extensions
[any]
commonName = supplied
[req]
prompt = no
distinguished_name = name
[name]
CN = seamless-dask
[extensions]
basicConstraints = critical, CA:true
keyUsage = critical, digitalSignature, keyCertSign
subjectKeyIdentifier = hash
"""
_TIMEOUT_S = 60


def make_keys() -> _t.Dict[str, str]:
    """{"ca", "cert", "key"}: PEM texts.  Raises ``ConfigurationError`` where there is nothing to make them with."""
    program = shutil.which("openssl")
    if program is not None:
        return _openssl(program)
    from distributed import Security        # only a daskserver needs it
    try:
        made = Security.temporary()
    except ImportError:
        raise ConfigurationError("the keys for the Dask cluster cannot be made on %s: there is neither the program 'openssl' nor "
                                 "the Python package 'cryptography'; install one of them there" % os.uname().nodename) from None
    return {"ca": made.tls_ca_file, "cert": made.tls_scheduler_cert, "key": made.tls_scheduler_key}


def _openssl(program: str) -> _t.Dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="seamless-keys-") as folder:        # 0700
        def path(name):
            return os.path.join(folder, name)

        def write(name, text):
            with open(os.open(path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)

        def run(*words):
            done = subprocess.run([program, *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=_TIMEOUT_S)
            if done.returncode:
                raise ConfigurationError("the keys for the Dask cluster cannot be made: %s says: %s"
                                         % (program, done.stdout.decode("utf-8", "replace").strip()))
        write("config", _CONFIG)
        write("index.txt", "")
        write("serial", "01" + os.urandom(8).hex())
        write("key.pem", "")                # openssl keeps the mode of a file that exists
        run("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "config",
            "-keyout", "key.pem", "-out", "request.pem")
        run("ca", "-selfsign", "-batch", "-notext", "-config", "config", "-keyfile", "key.pem", "-in", "request.pem",
            "-startdate", "200101000000Z", "-enddate", "491231235959Z", "-out", "cert.pem")
        with open(path("cert.pem")) as file:
            cert = file.read()
        with open(path("key.pem")) as file:
            return {"ca": cert, "cert": cert, "key": file.read()}


def security(keys: _t.Mapping[str, str]):
    """distributed's ``Security`` for one who has the keys."""
    from distributed import Security        # as above; a client may have it too
    pairs = {"tls_%s_%s" % (role, what): keys[what] for role in ("scheduler", "worker", "client") for what in ("cert", "key")}
    return Security(tls_ca_file=keys["ca"], require_encryption=True, **pairs)
