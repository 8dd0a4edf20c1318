"""The demo's processes: each holds the base, takes jobs as lines of JSON on its input and answers on its output."""

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

from postil.adapter import attach
from postil.demo.teams import BY_NAME
from postil.demo.work import Plan, Trained, Watch, losses, train_team
from postil.errors import PostilError, RunError
from postil.judging.asking.likelihoods import Losses

# glibc keeps freed memory for the next step instead of giving it back and taking it anew, page by page
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

Submit = Callable[[str, str | None], Future[Any]]  # "train" or "losses", and the team's name


@dataclass(frozen=True, slots=True)
class Lane:
    """One process. It ends when its input does, or when nobody reads its output: with its parent at the latest."""

    process: subprocess.Popen[str]

    @classmethod
    def open(cls, plan: Plan, threads: int) -> Lane:
        """Start it; the base is opened before the first job."""
        process = subprocess.Popen(
            [sys.executable, "-c", "from postil.demo.lanes import main; main()"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True, env=KEPT | os.environ,
        )  # fmt: skip
        lane = cls(process)
        lane._send([asdict(plan) | {"out": str(plan.out)}, threads])
        return lane

    def ask(self, job: str, team: str | None, watch: Watch | None) -> Any:
        """The answer to a job, as JSON has it. Raises RunError with what went wrong, or where the process ended."""
        self._send([job, team])
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what, value = json.loads(line)
            if what == "done":
                return value
            if what == "error":
                raise RunError(value)
            if watch is not None:
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
def lanes(count: int, plan: Plan, watch: Watch | None) -> Iterator[Submit]:
    """`count` processes, each on its part of the cores. `watch` is called in threads of this process; what it
    raises, as what a job raises, comes out of the job's future. All processes are ended with the context."""
    opened = [Lane.open(plan, max(torch.get_num_threads() // count, 1)) for _ in range(count)]
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in opened:
        free.put(lane)

    def run(job: str, team: str | None) -> Any:
        lane = free.get()
        try:
            return lane.ask(job, team, watch)
        finally:
            free.put(lane)

    pool = ThreadPoolExecutor(count, "postil-demo")
    try:
        yield lambda job, team: pool.submit(run, job, team)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for lane in opened:
            lane.close()
        pool.shutdown()


def trained_of(answer: dict[str, Any]) -> Trained:
    """What "train" answers."""
    return Trained(**answer | {"curve": [(step, loss) for step, loss in answer["curve"]]})


def losses_of(answer: dict[str, Any]) -> dict[str, Losses]:
    """What "losses" answers."""
    return {name: [(nats, count) for nats, count in rows] for name, rows in answer.items()}


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
        model = attach(plan.open())
        for line in sys.stdin:
            job, name = json.loads(line)
            team = BY_NAME.get(name)
            if job == "train":
                assert team is not None
                done = train_team(model, plan, team, lambda *event: tell("event", event))
                tell("done", asdict(done))
            else:
                tell("done", losses(model, plan, team))
    except PostilError as error:
        tell("error", str(error))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
