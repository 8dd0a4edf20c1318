"""The demo's processes: each takes jobs as lines of JSON on its input and answers on its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from postil.demo.work import Plan, Watch, run_job
from postil.errors import PostilError, RunError

# glibc keeps freed memory for the next step instead of giving it back and taking it anew, page by page
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

Submit = Callable[[str, str], Future[dict[str, Any]]]  # a job of work.JOBS, and the team that it is for


@dataclass(frozen=True, slots=True)
class Lane:
    """One process. It ends when its input does, or when nobody reads its output: with its parent at the latest."""

    process: subprocess.Popen[str]

    @classmethod
    def open(cls, plan: Plan, threads: int) -> Lane:
        """Start it."""
        process = subprocess.Popen(
            [sys.executable, "-c", "from postil.demo.lanes import main; main()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True, env=KEPT | os.environ,
        )  # fmt: skip
        lane = cls(process)
        lane._send([asdict(plan) | {"out": str(plan.out)}, threads])
        return lane

    def ask(self, job: str, name: str, watch: Watch) -> Any:
        """The answer to a job, as JSON has it. Raises RunError with what went wrong, or where the process ended."""
        self._send([job, name])
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what, value = json.loads(line)
            if what == "done":
                return value
            if what == "error":
                raise RunError(value)
            watch(*value)
        code = self.process.wait()
        why = "was killed, perhaps for want of memory" if code < 0 else f"ended with code {code}; it says why above"
        raise RunError(f"one of the demo's processes {why}. With OMP_NUM_THREADS=1 there is only one")

    def close(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass

    def _send(self, value: Sequence[Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading from it says so


@contextmanager
def lanes(count: int, plan: Plan, watch: Watch) -> Iterator[Submit]:
    """`count` processes, each on its part of the cores; one is this process itself. `watch` is called in threads of
    this process; what it raises, as what a job raises, comes out of the job's future. All are ended with the context.
    """
    if count == 1:
        yield lambda job, name: _here(plan, job, name, watch)
        return
    opened = [Lane.open(plan, max(torch.get_num_threads() // count, 1)) for _ in range(count)]
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in opened:
        free.put(lane)

    def run(job: str, name: str) -> Any:
        lane = free.get()
        try:
            return lane.ask(job, name, watch)
        finally:
            free.put(lane)

    pool = ThreadPoolExecutor(count, "postil-demo")
    try:
        yield lambda job, name: pool.submit(run, job, name)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for lane in opened:
            lane.close()
        pool.shutdown()


def _here(plan: Plan, job: str, name: str, watch: Watch) -> Future[dict[str, Any]]:
    """The job done at once."""
    future: Future[dict[str, Any]] = Future()
    try:
        future.set_result(run_job(plan, job, name, watch))
    except PostilError as error:
        future.set_exception(error)
    return future


def main() -> None:
    """The process: the plan and its number of threads, then jobs, until there are no more."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed is not for the parent

    def tell(what: str, value: Any) -> None:
        print(json.dumps([what, value]), file=out, flush=True)

    values, threads = json.loads(sys.stdin.readline())
    plan = Plan(**values | {"out": Path(values["out"])})
    try:
        torch.set_num_threads(threads)
        for line in sys.stdin:
            job, name = json.loads(line)
            tell("done", run_job(plan, job, name, lambda *event: tell("event", event)))
    except PostilError as error:
        tell("error", str(error))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
