"""The Python face, in one process and in memory: direct, delayed, Transformation, parallel."""
import asyncio
import os
import subprocess
import sys
import textwrap
import threading

import pytest

import seamless_lite.config as config
from seamless_lite import Transformation, TransformationList, delayed, direct, parallel, parallel_async
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CelltypeError, FunctionError, JobCancelledError, JobError, UsageError


@pytest.fixture(autouse=True)
def fresh():
    config.close()
    yield
    config.close()


@delayed
def add(a, b):
    return a + b


@direct
def times(a, b=2):
    return a * b


@delayed
def fail(x):
    raise ValueError("no " + x)


def test_a_direct_function_gives_the_value():
    assert times(3) == 6 and times(3, b=5) == 15


def test_a_delayed_function_gives_a_transformation_that_runs_once_it_is_told():
    tf = add(1, 2)
    assert isinstance(tf, Transformation) and tf.status == "Status: ready"
    assert tf.transformation_checksum == "8e2e8170babdf234ad256b1c7746e2a8e9e85748edaa1db445161422e070ea40"
    assert tf.result_checksum is None
    assert tf.run() == 3 and tf.status == "Status: OK" and tf.value == 3 and tf.buffer == b"3\n"
    assert tf.result_checksum == tf.compute() == Checksum.of(b"3\n")


def test_the_second_call_runs_nothing(tmp_path):
    @direct
    def count(path, x):
        with open(path, "a") as file:
            file.write("x")
        return x
    assert [count(str(tmp_path / "n"), 5) for _ in range(3)] == [5, 5, 5]
    assert (tmp_path / "n").read_text() == "x"


def test_a_transformation_as_an_argument_is_a_dependency():
    tf = add(add(1, 2), add(3, add(4, 5)))
    assert tf.transformation_checksum is None
    assert tf.run() == 15
    assert tf.transformation_checksum == add(3, 12).transformation_checksum


def test_construct_runs_the_dependencies_only():
    inner = add(1, 2)
    outer = add(inner, 10)
    assert outer.construct() == add(3, 10).transformation_checksum
    assert inner.status == "Status: OK" and outer.status == "Status: ready"


def test_a_chain_of_2000_dependencies_is_a_loop_and_not_a_recursion():
    tf = add(0, 1)
    for _ in range(2000):
        tf = add(tf, 1)
    assert tf.run() == 2001
    again = add(0, 1)
    for _ in range(2000):
        again = add(again, 1)
    assert again.start().value == 2001


def test_a_failure_is_raised_by_run_and_kept_by_compute():
    tf = fail("luck")
    assert tf.compute() is None and tf.status == "Status: exception"
    assert isinstance(tf.exception, JobError) and "ValueError: no luck" in str(tf.exception)
    assert 'raise ValueError("no " + x)' in str(tf.exception), "the user's own line is shown"
    with pytest.raises(RuntimeError, match="no luck"):
        tf.run()
    tf.clear_exception()
    assert tf.status == "Status: ready"


def test_what_depends_on_a_failure_says_so():
    tf = add(fail("luck"), 1)
    with pytest.raises(JobError, match="argument 'a' has no value.*no luck"):
        tf.run()


def test_arguments_are_taken_as_they_are_at_the_call():
    values = [1, 2]
    tf = add(values, [3])
    values.append(99)
    assert tf.run() == [1, 2, 3]


def test_a_wrong_argument_is_refused_at_the_call():
    with pytest.raises(CelltypeError):
        add(object(), 1)
    with pytest.raises(FunctionError, match="add"):
        add(1)
    with pytest.raises(FunctionError, match="'c'"):
        add(1, 2, c=3)


def test_a_name_that_the_sandbox_does_not_have_is_refused_at_the_call():
    @direct
    def uses_os(x):
        return os.path.join(x)          # noqa: F821
    with pytest.raises(FunctionError, match="'os'"):
        uses_os("a")


def test_globals_and_modules_are_inputs():
    @direct
    def scaled(x):
        return helper(x) * FACTOR + tools.three       # noqa: F821

    def helper(x):
        return x + 1
    import types
    tools = types.ModuleType("tools")
    scaled.globals.helper = helper
    scaled.globals.FACTOR = 10
    scaled.modules.tools = {"code": "three = 3", "language": "python", "type": "interpreted"}
    assert tools and scaled(1) == 23
    scaled.globals.FACTOR = 100
    assert scaled(1) == 203


def test_a_celltype_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(CelltypeError, match="'int'"):
        add.celltypes.result = "itn"


def test_meta_refuses_what_it_does_not_know():
    with pytest.raises(FunctionError, match="timeout_s"):
        times.meta = {"timeuot": 3}


def test_results_of_the_declared_celltype():
    @direct
    def raw(n):
        return b"\0" * n
    raw.celltypes.result = "bytes"
    assert raw(3) == b"\0\0\0"


def test_code_text_is_a_transformation_too():
    expression = direct("a + b")
    expression.celltypes.update({"a": "int", "b": "int"})
    assert expression(a=1, b=2) == 3
    shell = direct("echo $a > RESULT", "bash")
    shell.celltypes.update({"a": "str", "result": "text"})
    assert shell(a="hello") == "hello"


def test_a_driver_calls_other_transformations_to_any_depth():
    @direct
    def depth(n):
        return 0 if n == 0 else 1 + child(n - 1)        # noqa: F821

    @direct
    def child(n):
        return n * 10
    depth.globals.child = child
    assert depth(4) == 31


def test_a_transformation_that_calls_itself_with_the_same_arguments_is_told_so():
    import seamless_lite.handle as handle
    tf = add(5, 6)
    session = config.session()
    session._running.__dict__["stack"] = [tf.transformation_checksum]
    with pytest.raises(FunctionError, match="calls itself"):
        handle.Transformation(tf._recipe, tf._buffers, tf._meta).run()


def test_start_runs_in_the_background_and_threads_may_share_a_transformation():
    tf = add(20, 22).start()
    values = []
    threads = [threading.Thread(target=lambda: values.append(tf.run())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values == [42] * 5


def test_a_cancelled_transformation_says_so():
    tf = add(100, 1)
    assert tf.cancel() is True and tf.cancel() is False
    assert tf.status == "Status: canceled"
    with pytest.raises(JobCancelledError):
        tf.run()


def test_await_and_task_under_a_running_loop():
    async def main():
        task = add(1, 2).task()
        return await task, await add(3, add(2, 2)), times(4)
    assert asyncio.run(main()) == (3, 7, 8)


def test_parallel_yields_in_input_order_and_takes_from_a_generator_as_needed():
    config.set_nparallel(3)
    taken = []

    def source():
        for i in range(200):
            taken.append(i)
            yield add(i, i)
    values = []
    for tf in parallel(source()):
        values.append(tf.value)
        assert len(taken) <= len(values) + 10 * 3
    assert values == [2 * i for i in range(200)]


def test_parallel_does_not_raise_but_a_list_may_be_told_to():
    items = [add(1, 1), fail("a"), add(2, 2)]
    assert [tf.exception is None for tf in parallel(items)] == [True, False, True]
    with pytest.raises(JobError):
        list(parallel(TransformationList([fail("b")], on_error="raise")))
    kept = TransformationList([add(7, 7), fail("c")], store_details=True)
    list(parallel(kept))
    assert kept.checksums[0] == Checksum.of(b"14\n") and kept.errors == 1 and list(kept) == [None, None]


def test_parallel_async_and_the_refusal_of_parallel_under_a_loop():
    async def main():
        with pytest.raises(UsageError, match="parallel_async"):
            parallel([add(1, 1)])
        return [tf.value async for tf in parallel_async(add(i, 1) for i in range(5))]
    assert asyncio.run(main()) == [1, 2, 3, 4, 5]


def run_script(code, tmp_path, *command):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(code))
    import pathlib
    import os
    env = dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).resolve().parent.parent))
    return subprocess.run([sys.executable, *(command or [str(path)])], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=tmp_path, timeout=60)


def test_workers_need_no_main_guard(tmp_path):
    done = run_script("""
        import os
        from seamless_lite import direct, spawn, has_spawned
        assert not has_spawned()
        spawn(2)
        assert has_spawned()
        @direct
        def pid(x):
            import os
            return os.getpid()
        print(pid(1) != os.getpid())
        """, tmp_path)
    assert (done.stdout, done.stderr) == (b"True\n", b"")


def test_lambdas_work_and_functions_in_a_command_line_too(tmp_path):
    assert direct(lambda x: x + 1)(2) == 3
    done = run_script("", tmp_path, "-c", "from seamless_lite import direct\n"
                      "@direct\ndef f(x):\n    return x + 1\nprint(f(1))")
    assert done.stdout == b"2\n", done.stderr.decode()


def test_what_is_set_beside_the_identity_reaches_children_declared_in_globals(tmp_path):
    done = run_script("""
        import seamless_lite
        from seamless_lite import delayed, direct
        @delayed
        def nap(x):
            import time
            time.sleep(30)
        nap.meta = {"timeout_s": 0.3}
        @direct
        def driver(x):
            tf = nap(x)
            tf.compute()
            return type(tf.exception).__name__
        driver.globals.nap = nap
        seamless_lite.spawn(1)
        print(driver(1))
        """, tmp_path)
    assert done.stdout == b"DeadlineError\n", done.stderr.decode()


def test_the_first_thing_that_runs_may_be_in_another_thread(tmp_path):
    done = run_script("""
        from seamless_lite import delayed, parallel
        @delayed
        def add(a, b):
            return a + b
        print([tf.value for tf in parallel(add(i, i) for i in range(10))])
        """, tmp_path)
    assert done.stdout == b"[0, 2, 4, 6, 8, 10, 12, 14, 16, 18]\n", done.stderr.decode()


def test_an_interrupted_start_does_not_block_the_next_one(monkeypatch):
    store = config.session().store
    real = store.put_many

    def interrupted(datas):
        raise KeyboardInterrupt
    monkeypatch.setattr(store, "put_many", interrupted)
    tf = add("a" * 3_000_000, "b")
    with pytest.raises(KeyboardInterrupt):
        tf.start()
    assert tf.status == "Status: canceled"
    monkeypatch.setattr(store, "put_many", real)
    assert add("c", "d").start().run() == "cd"


def test_parallel_names_what_is_not_a_transformation():
    with pytest.raises(UsageError, match="item 1 .*None"):
        list(parallel([add(1, 1), None, add(2, 2)]))
    with pytest.raises(UsageError, match="item 0"):
        list(parallel([7]))


@pytest.mark.parametrize("spawned", ["", "seamless_lite.spawn(1)"])
def test_forked_children_run_transformations_of_their_own(tmp_path, spawned):
    done = run_script("""
        import multiprocessing, seamless_lite
        from seamless_lite import delayed, parallel
        %s
        @delayed
        def square(i):
            return i * i
        def work(k):
            return sum(tf.value for tf in parallel(square(k * 100 + i) for i in range(20)))
        print(work(0))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(work, [1, 2]))
        print(work(3))
        """ % spawned, tmp_path)
    expected = [sum((k * 100 + i) ** 2 for i in range(20)) for k in range(4)]
    assert done.stdout.decode().split("\n")[:3] == [str(expected[0]), str(expected[1:3]), str(expected[3])], done.stderr.decode()


def test_a_program_that_ends_does_not_wait_for_what_it_only_started_and_leaves_no_command_behind(tmp_path):
    done = run_script("""
        import os, time
        from seamless_lite import delayed
        shell = delayed("echo $$ > %s/pid; sleep 60; echo x > RESULT", "bash")
        shell().start()
        while not (os.path.exists("pid") and open("pid").read().strip()):
            time.sleep(0.01)
        raise KeyboardInterrupt
        """ % tmp_path, tmp_path)
    assert done.returncode != 0 and b"KeyboardInterrupt" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_code_of_seamless_1_that_calls_others_finds_our_decorators_and_no_more():
    @direct
    def outer(n):
        from seamless.transformer import direct

        @direct
        def inner(a):
            return a * 2
        return inner(n) + 1
    assert outer(4) == 9

    @direct
    def other():
        import seamless.transformer.nothing
    with pytest.raises(JobError, match="No module named 'seamless'"):
        other()
    assert "seamless" not in sys.modules
