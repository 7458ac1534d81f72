"""The main job, from nothing: a Python function over a data file and a shell pipeline over data files, each run
on a jobserver that starts by itself, and answered from the cache afterwards, with every service stopped.

Works in a temporary folder with a home of its own; prints what happens; exits 1 if anything is not as it says.
"""
import os
import pathlib
import random
import subprocess
import sys
import tempfile

CLUSTERS = """\
local:
  frontends:
    - hostname: localhost
      hashserver:
        bufferdir: {folder}/storage/buffers
      database:
        database_dir: {folder}/storage/results
      jobserver:
        network_interface: 127.0.0.1
        port_start: 55300
        port_end: 55399
"""
SEAMLESS = """\
- project: my-project
- execution: remote
"""
FUNCTION = """\
import seamless_lite
import seamless_lite.config
from seamless_lite import direct

seamless_lite.config.init()

@direct
def summarise(data):
    import os
    numbers = [float(line) for line in data.splitlines()]
    return {"count": len(numbers), "mean": sum(numbers) / len(numbers), "process": os.getpid()}

summarise.celltypes.data = "bytes"
with open("numbers.txt", "rb") as file:
    print(summarise(file.read()))
"""
PIPELINE = ["seamless-run", "paste a.txt b.txt | sort -k2 | uniq -c"]


def run(folder, environment, command):
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, timeout=120)
    if done.returncode:
        sys.exit("%r ended with exit code %d" % (command, done.returncode))
    return done.stdout


def main():
    with tempfile.TemporaryDirectory(prefix="seamless-main-job-") as name:
        folder = pathlib.Path(name)
        home = folder / "home"
        (home / ".seamless").mkdir(parents=True)
        work = folder / "work"
        work.mkdir()
        (home / ".seamless" / "clusters.yaml").write_text(CLUSTERS.format(folder=folder))
        (work / "seamless.yaml").write_text(SEAMLESS)
        (work / "script.py").write_text(FUNCTION)
        numbers = random.Random(1)
        (work / "numbers.txt").write_text("".join("%.6f\n" % numbers.random() for _ in range(200_000)))
        (work / "a.txt").write_text("one\ntwo\nthree\none\n")
        (work / "b.txt").write_text("x\ny\nx\nx\n")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SEAMLESS_")}
        environment["HOME"] = str(home)
        bin_folder = pathlib.Path(__file__).resolve().parent.parent / "bin"
        environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"], str(bin_folder)])
        python = [sys.executable, "script.py"]
        plain = run(work, environment, ["bash", "-c", PIPELINE[1]])
        try:
            first = run(work, environment, python)
            print("function, on the jobserver:        ", first.decode().strip())
            shell = run(work, environment, PIPELINE)
            print("pipeline, same bytes as without us:", shell == plain)
            stop_services(home, environment)
            again = run(work, environment, PIPELINE)
            print("pipeline, every service stopped:   ", again == plain)
            second = run(work, environment, python)
            print("function, a new process, cached:   ", second.decode().strip())
        finally:
            stop_services(home, environment)
        if not (first == second and shell == plain == again):
            sys.exit("the cache did not answer as it should")
        print("All as it should be.")


def stop_services(home, environment):
    code = ("from seamless_lite import launch\n"
            "for record in launch.services(): launch.stop(record)\n")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


if __name__ == "__main__":
    main()
