"""The fold of events into the state of a name: aliases with their revisions, what was retired, what is asked."""

from __future__ import annotations

from typing import Any

import pytest

from postil.errors import RegistryError
from postil.registry import Policy
from postil.registry.state import DEPTH, Event, State, applied


def state(*events: tuple[str, str] | dict[str, Any], alias: str = "live") -> State:
    """The state after (action, version) or whole events, numbered from 1."""
    made = []
    for number, event in enumerate(events, 1):
        fields = event if isinstance(event, dict) else {"action": event[0], "version": event[1], "alias": alias}
        made.append(Event(number=number, **fields))
    return applied(State(), made)


def test_the_way_back_of_an_alias() -> None:
    assert state(("publish", "a"), ("publish", "b"), ("rollback", "a")).stack("live") == ["a"]
    assert state(("publish", "a"), ("promote", "b"), ("promote", "a")).stack("live") == ["a", "b", "a"]
    assert state(("publish", "a"), ("refuse", "c"), ("publish", "b")).stack("live") == ["a", "b"]
    assert state(("publish", "a"), ("publish", "a")).stack("live") == ["a"]


def test_a_log_restored_from_an_old_copy_still_knows_where_the_alias_is() -> None:
    assert state(("publish", "a"), ("rollback", "a")).stack("live") == ["a"]
    assert state(("rollback", "a")).stack("live") == ["a"]
    assert state(("publish", "a"), ("rollback", "x")).stack("live") == ["x"]


def test_an_alias_remembers_so_many() -> None:
    found = state(*(("publish", f"v{number}") for number in range(DEPTH + 9)))
    assert len(found.aliases["live"].before) == DEPTH
    assert found.stack("live")[-2:] == [f"v{DEPTH + 7}", f"v{DEPTH + 8}"]
    assert len(found.served) == DEPTH + 9


def test_each_move_has_a_revision_of_its_own() -> None:
    once = state(("publish", "a"))
    again = state(("publish", "a"), ("promote", "b"), ("promote", "a"))
    assert once.live == again.live == {"live": "a"}
    assert once.aliases["live"].revision != again.aliases["live"].revision
    back = state(("publish", "a"), {"action": "delete", "alias": "live"}, ("promote", "a"))
    assert back.live == {"live": "a"}
    assert back.aliases["live"].revision == 3


def test_a_deleted_alias_is_gone_and_its_policy_stays() -> None:
    found = state(
        {"action": "policy", "alias": "live", "policy": Policy(scope="assistant")},
        ("publish", "a"), ("publish", "b"), {"action": "delete", "alias": "live"},
    )  # fmt: skip
    assert (found.live, found.stack("live"), found.served) == ({}, [], ["a", "b"])
    assert found.policy("live").scope == "assistant"
    assert found.policy("other") == Policy()


def test_what_was_retired_is_not_served_until_it_is_published_again() -> None:
    events = [("publish", "a"), ("publish", "b"), {"action": "retire", "version": "a"}]
    assert state(*events).served == ["b"]
    again = state(*events, ("publish", "a"))
    assert (again.served, again.published["a"].number) == (["a", "b"], 1)


def test_the_first_publication_binds_the_base() -> None:
    one = {"action": "publish", "alias": "live", "version": "a", "base": "x", "scope": "task"}
    assert state(one).base == "x"
    assert state(one).published["a"].scope == "task"
    assert state(one, one | {"version": "b", "base": "y"}).base == "x"
    assert state(one, {"action": "rebind", "base": "y"}).base == "y"


def test_the_order_of_versions_survives_a_file_with_sorted_keys() -> None:
    found = state(("publish", "z"), ("publish", "a"), ("publish", "m"))
    parsed: State = State.parse({"published": dict(sorted(found.model_dump(mode="json")["published"].items()))})
    assert parsed.served == ["z", "a", "m"]


def test_events_know_their_keys() -> None:
    with pytest.raises(RegistryError, match=r"log of the registry: .*unknown key 'versoin' .did you mean 'version'"):
        Event.parse({"number": 1, "action": "publish", "alias": "live", "versoin": "a"})
