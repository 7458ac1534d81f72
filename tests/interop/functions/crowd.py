"""``python crowd.py PACKAGE FIRST LAST``: runs the transformations FIRST to LAST - 1; prints number -> [transformation, result]."""
import importlib
import json
import sys


def work(n):
    open(__import__("os").environ["LEDGER"], "a").write("%d\n" % n)
    return {"n": n, "text": "x" * n}


if __name__ == "__main__":
    package, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    importlib.import_module(package + ".config").init()
    api = importlib.import_module("seamless.transformer" if package == "seamless" else package)
    made = {n: api.delayed(work)(n) for n in range(first, last)}
    for n, tf in made.items():
        assert tf.run() == {"n": n, "text": "x" * n}
    print(json.dumps({n: [str(tf.transformation_checksum), str(tf.result_checksum)] for n, tf in made.items()}))
    sys.stdout.flush()
    if package == "seamless":
        importlib.import_module(package).close()    # else the end of the program may lose buffers
