"""The log of a run: log.jsonl and TensorBoard events, cut back to the step that a run resumes from."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from postil.errors import StorageError
from postil.files import write_text


class RunLog:
    """Append-only lines {"step", …} of one run, and the same numbers as TensorBoard scalars.

    Both are written at once, in the caller's thread, so that a full disk is a StorageError at the step it struck.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept if line))
        board = run / "tensorboard"
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        try:
            board.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._board = (board / name).open("ab")
            self._event(file_version="brain.Event:2")
            if step:  # what a killed run wrote after this step is not shown
                self._event(step=step + 1, session_log={"status": "START"})
        except OSError as error:
            raise self._storage_error(error) from error

    def write(self, step: int, **values: Any) -> None:
        """One line; numbers go to TensorBoard too. Raises StorageError when the system refuses."""
        scalars = {key: value for key, value in values.items() if isinstance(value, int | float)}
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for key, value in scalars.items():
                self._event(step=step, summary={"value": [{"tag": key, "simple_value": float(value)}]})
        except OSError as error:
            raise self._storage_error(error) from error

    def total(self, key: str) -> float:
        """The sum of a number over all lines, those of earlier processes too."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return float(sum(json.loads(line).get(key, 0.0) for line in lines))

    def _event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._board).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._board.flush()

    def _storage_error(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path.parent} could not be written to ({error.strerror or error}); its last checkpoint is whole: "
            "free some space and run the same command again"
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._board):
            with suppress(OSError):  # what could not be flushed was an error of `write` already
                file.close()


def _step(line: str) -> int:
    """The step of a line; a line cut off by a kill belongs to no step that is kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
