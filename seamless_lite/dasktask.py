"""What a daskserver has its Dask workers do: the functions that Dask finds by their names on both sides.

On a worker they turn to ``node``, which the worker's plugin has set (see ``daskworker``).
"""
import asyncio
import typing as _t

node: _t.Any = None
#: The fields of a job's meta that an outcome depends on.
KINDS = ("fresh", "scratch", "job_folder")


def name_of(id: str) -> str:
    """The name of the Dask task that runs the job ``id``."""
    return "seamless-" + id


async def run_task(message: bytes):
    """A Dask task: run one job here."""
    return await node.run(message)


def read_output(id: str, offset: int) -> _t.Tuple[int, bytes, int]:
    """Read the output of a job that runs or ran here."""
    return node.read_output(id, offset)


async def cancel_jobs(tokens: _t.Mapping[str, str]) -> _t.List[str]:
    """Kill those of these jobs (id -> token of the submission) that run here; returns which."""
    if node is None:                        # a plain worker of somebody else's
        return []
    return await asyncio.get_running_loop().run_in_executor(None, node.cancel, tokens)


def waits() -> _t.List[_t.Tuple[str, str]]:
    """(job that runs here, job that it waits for), all of them."""
    return node.waits() if node is not None else []


async def refuse(id: str, other: str) -> None:
    """Have the job ``id``, which runs here and waits for ``other``, end with that as an error."""
    await asyncio.get_running_loop().run_in_executor(None, node.refuse, id, other)


def processing_on(name: str, dask_scheduler) -> _t.Optional[str]:
    """On the scheduler: the address of the worker that has this task; None if none has it."""
    task = dask_scheduler.tasks.get(name)
    worker = task.processing_on if task is not None else None
    return worker.address if worker is not None else None
