"""What a registry stands on: a catalog of names, versions and events, and a store of their bytes, each a port.

A directory is both today (`directory`, `blobs`); a database with blobs elsewhere offers the same methods, and
tests/registry/test_ports.py asks the same of each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from postil.registry.state import Act, Event, State
from postil.registry.version import Record


class Sweep(Protocol):
    """Remove the blobs that nobody needs: Blobs.sweep with its times filled in. Returns the bytes freed."""

    def __call__(self, keep: Collection[str]) -> int: ...


class Catalog(Protocol):
    """Names, versions, events: one tenant's. Raises NotFound where there is no registry, Unavailable where it cannot
    be read, Corrupt for what was changed."""

    def check(self) -> None:
        """Raise NotFound or RegistryError where there is no registry that this postil knows."""

    def check_own(self) -> None:
        """As check, but a place where a registry may be made passes."""

    def make(self) -> None:
        """Make the registry where there is none yet."""

    def names(self) -> list[str]:
        """The names to which anything was done, sorted."""

    def state(self, name: str) -> State:
        """The name as it stands; revision 0 for one that nothing was done to."""

    def events(self, name: str, since: int = 0, limit: int | None = None) -> list[Event]:
        """The events of a name numbered above `since`, in order, `limit` at most."""

    def record(self, digest: str) -> Record | None:
        """What is kept of a version; None for one that is not known, or was collected."""

    def commit(
        self, name: str, expected: int, acts: Sequence[Act], actor: str, record: Record | None = None
    ) -> State:
        """Do all the acts, and keep the record, or nothing: one step, at whatever point a kill comes.

        Each act becomes an event with the next number, the time and the actor; without an act the record alone is
        kept. Raises RegistryConflict, and does
        nothing, where the name is no longer at the revision `expected`, or where a file of the record is not in the
        blob store (it was collected meanwhile: put it again).
        """

    def collect(self, before: float, sweep: Sweep, dry: bool = False) -> tuple[list[str], int]:
        """Forget the versions that no name serves and that were last touched before the time `before` (seconds), then
        sweep the blobs that no version left needs, in one step with it. Returns the versions and the bytes freed;
        dry: what it would be."""


class Blobs(Protocol):
    """Bytes by their SHA-256, written before the commit that needs them."""

    def has(self, digest: str) -> bool:
        """Whether a blob is there (its bytes are not looked at)."""

    def put(self, digest: str, source: Path) -> bool:
        """Keep the bytes of a file, verified as they are copied; those that lie here whole count as new again, and
        False is returned.

        Raises RegistryError where the file no longer has that digest, StorageError where the system refuses.
        """

    def fetch(self, digest: str, target: Path) -> None:
        """Write a blob to a new file, verified as it is copied. Raises Corrupt, leaving nothing to be trusted."""

    def verify(self, digest: str) -> None:
        """Read a blob through. Raises Corrupt where it is not there, or not what it was."""

    def sweep(self, keep: Collection[str], before: float, dry: bool = False) -> int:
        """Remove the blobs that are not in `keep` and were last put before the time `before`, and what killed writers
        left until then; returns the bytes freed (dry: that it would free)."""
