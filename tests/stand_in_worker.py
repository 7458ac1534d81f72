"""A worker process for tests of the pool alone: a job is ``{"code": text}``, its outcome the ``result`` that it sets."""
import json
import os
import pathlib
import socket
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from seamless_lite.processes import receive_message, send_message

sock = socket.socket(fileno=int(sys.argv[1]))
os.set_inheritable(sock.fileno(), False)
hello = json.loads(receive_message(sock))
try:
    while True:
        control, job = json.loads(receive_message(sock)), json.loads(receive_message(sock))
        log = os.open(control["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        scope = {"control": control, "hello": hello, "result": None}
        exec(job["code"], scope)
        sys.stdout.flush()
        send_message(sock, json.dumps({"result": scope["result"], **scope.get("more", {})}).encode())
except EOFError:
    pass
