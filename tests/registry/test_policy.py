"""The policy of an alias: who asks what of which card, overrides and their log, the base that a name is bound to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cards import card
from postil.errors import Refused, RegistryConflict, RegistryError
from postil.registry import Policy, Registry
from postil.registry.policy import ask

Judged = Callable[..., Path]
LAX = Policy(gate="general.nats < base + 100")


def actions(registry: Registry, name: str = "support") -> list[str]:
    return [event.action for event in registry.history(name)]


def test_the_gate_knows_the_version_in_service(registry: Registry, judged: Judged) -> None:
    gate = Policy(gate="target.bleu > live and general.nats < base + 0.05")
    for name, alias in (("support", "live"), ("support", "canary"), ("other", "live")):
        registry.set_policy(name, gate, alias)
    registry.publish(judged(0, bleu=50), "support")
    with pytest.raises(Refused, match=r"target.bleu 49 is not above live = 50"):
        registry.publish(judged(1, bleu=49), "support")
    with pytest.raises(Refused, match=r"target.bleu 49 is not above live = 50"):
        registry.publish(judged(1, bleu=49), "support", alias="canary")
    better = registry.publish(judged(2, bleu=51), "support")
    assert not registry.publish(judged(2, bleu=51), "support").moved  # held beside the one before it
    registry.set_policy("support", Policy(gate="target.bleu > live + 5"))
    with pytest.raises(Refused):
        registry.publish(judged(2, bleu=51), "support")
    assert registry.version("support").digest == better.digest
    registry.publish(judged(1, bleu=49), "other")  # nothing is in service under that name


def test_a_lax_alias_is_no_way_round_a_strict_one(registry: Registry, judged: Judged) -> None:
    good = registry.publish(judged(0), "support")
    harmful = judged(1, nats=4.9)
    with pytest.raises(Refused):
        registry.publish(harmful, "support")
    registry.set_policy("support", LAX, "staging")
    staged = registry.publish(harmful, "support", alias="staging")
    for wanted in ("staging", staged.short):
        with pytest.raises(Refused, match=r"refused: .*general.nats") as refusal:
            registry.promote("support", wanted)
        assert refusal.value.exit_code == 3
    assert registry.state("support").live == {"live": good.digest, "staging": staged.digest}
    last = registry.history("support")[-1]
    assert (last.action, last.alias, last.version, last.before) == ("refuse", "live", staged.digest, good.digest)
    assert registry.resolve(f"support@{staged.short}").name == staged.digest  # it is published all the same


def test_the_publisher_brings_no_gate(registry: Registry, judged: Judged) -> None:
    with pytest.raises(TypeError, match="gate"):
        registry.publish(judged(1, nats=4.9), "support", gate="general.nats < base + 100")  # type: ignore[call-arg]


def test_a_promotion_asks_the_stored_card(registry: Registry, judged: Judged) -> None:
    registry.set_policy("support", LAX, "staging")
    registry.publish(judged(0), "support")
    staged = registry.publish(judged(1, nats=4.9), "support", alias="staging")
    own = judged(1) / "postil.json"  # the adapter's directory says something else by now
    assert json.loads(own.read_text())["card"]["score_card"]["general"]["nats"]
    with pytest.raises(Refused, match=r"4\.9"):
        registry.promote("support", staged.short)


def test_a_roll_back_asks_too_and_holds_it_beside_what_was_before(registry: Registry, judged: Judged) -> None:
    registry.set_policy("support", Policy(gate="target.bleu > live + 1 and general.nats < base + 1"))
    one, two, three = (registry.publish(judged(seed, bleu=50 + 5 * seed), "support") for seed in range(3))
    assert registry.rollback("support").digest == two.digest  # better than one, as it was then; three is not asked
    assert registry.promote("support", three.short).moved
    registry.set_policy("support", Policy(gate="target.bleu > base + 26"))
    with pytest.raises(Refused, match=r"target.bleu 55 is not above base"):
        registry.rollback("support", override=None)
    back = registry.rollback("support", override="three answers in the wrong language")
    assert (back.digest, back.overridden) == (two.digest, True)
    assert actions(registry)[-3:] == ["refuse", "override", "rollback"]
    assert one.digest in registry.versions("support")


def test_an_override_is_an_act_of_its_own(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    registry.publish(judged(0), "support")
    alice = Registry(tmp_path / "registry", actor="alice")
    version = alice.publish(judged(1, nats=3.5), "support", override="a demo tomorrow")
    assert (version.moved, version.overridden) == (True, True)
    assert version.gate is not None
    assert not version.gate.passed
    override, moved = registry.history("support")[-2:]
    assert (override.action, override.who, override.reason, override.version) == (
        "override", "alice", "a demo tomorrow", version.digest
    )  # fmt: skip
    assert override.sentence == moved.sentence == version.gate.sentence
    assert override.result is not None
    assert override.result["passed"] is False
    assert (moved.action, moved.who) == ("publish", "alice")
    with pytest.raises(RegistryError, match='an override needs a reason, which is logged: --override "why"'):
        registry.promote("support", version.short, override="")


def test_an_override_that_was_not_needed_is_not_logged(registry: Registry, judged: Judged) -> None:
    assert not registry.publish(judged(0), "support", override="to be sure").overridden
    assert actions(registry) == ["publish"]


def test_who_may_override(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    registry.set_policy("support", Policy(overriders=("alice",)))
    registry.publish(judged(0), "support")
    harmful = judged(1, nats=3.5)
    bob = Registry(tmp_path / "registry", actor="bob")
    with pytest.raises(Refused, match="bob may not override the policy of support@live; those who may: alice"):
        bob.publish(harmful, "support", override="I like it")
    assert actions(registry) == ["policy", "publish", "refuse"]
    registry.set_policy("support", Policy(overriders=()))
    with pytest.raises(Refused, match="those who may: none"):
        Registry(tmp_path / "registry", actor="alice").publish(harmful, "support", override="I like it")
    registry.set_policy("support", Policy())
    assert bob.publish(harmful, "support", override="I like it").overridden


def test_what_was_not_judged_cannot_be_overridden(registry: Registry, unjudged: Path) -> None:
    with pytest.raises(Refused, match="no score card"):
        registry.publish(unjudged, "support", override="trust me")


def test_a_policy_is_kept_logged_and_may_come_first(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    assert registry.policy("support") == Policy()
    assert not (tmp_path / "registry").exists()
    wanted = Policy(gate="target.bleu > base + 1000", scope="assistant", overriders=("alice",))
    registry.set_policy("support", wanted, reason="agreed on Monday")
    assert Registry(tmp_path / "registry").policy("support") == wanted
    assert registry.policy("support", "canary") == Policy()
    registry.set_policy("support", wanted)  # as it was: nothing to log
    (event,) = registry.history("support")
    assert (event.action, event.policy, event.reason) == ("policy", wanted, "agreed on Monday")
    with pytest.raises(Refused):
        registry.publish(judged(0), "support")
    assert registry.publish(judged(0), "support", alias="canary").moved


def test_two_who_set_a_policy_at_once(registry: Registry, judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish(judged(0), "support")
    state, overtaken = registry.catalog.state, []

    def slow(name: str) -> object:
        found = state(name)
        if not overtaken:
            overtaken.append(True)
            registry.set_policy("support", Policy(scope="assistant"))
        return found

    monkeypatch.setattr(registry.catalog, "state", slow)
    with pytest.raises(RegistryConflict, match="set the policy of support@live meanwhile"):
        registry.set_policy("support", LAX)
    assert registry.policy("support") == Policy(scope="assistant")


def test_a_name_is_bound_to_its_base(registry: Registry, judged: Judged) -> None:
    first = registry.publish(judged(0), "support")
    assert registry.state("support").base == "sha256:base"
    foreign = judged(1, source="sha256:other")
    with pytest.raises(
        Refused, match=r"bound to the base sha256:base and this version belongs to sha256:other; .*--new-base"
    ):
        registry.publish(foreign, "support")
    with pytest.raises(Refused, match="bound to the base"):
        registry.publish(foreign, "support", alias="canary")
    with pytest.raises(Refused, match="bound to the base"):  # an override is of the gate, not of the base
        registry.publish(foreign, "support", override="it will do")
    assert registry.version("support").digest == first.digest
    moved = registry.publish(foreign, "support", new_base=True)
    rebind, published = registry.history("support")[-2:]
    assert (rebind.action, rebind.base, published.action) == ("rebind", "sha256:other", "publish")
    assert registry.state("support").base == "sha256:other"
    with pytest.raises(Refused, match="bound to the base sha256:other"):
        registry.rollback("support")
    with pytest.raises(Refused, match="bound to the base sha256:other"):
        registry.promote("support", first.short)
    assert registry.rollback("support", new_base=True).digest == first.digest
    assert registry.state("support").base == "sha256:base"
    assert registry.publish(foreign, "elsewhere").digest == moved.digest  # a name of its own


def test_an_alias_may_be_of_another_base(registry: Registry, judged: Judged) -> None:
    registry.publish(judged(0), "support")
    registry.set_policy("support", Policy(base="sha256:other"), "next")
    foreign = judged(1, source="sha256:other")
    assert registry.publish(foreign, "support", alias="next").moved
    assert registry.state("support").base == "sha256:base"
    with pytest.raises(Refused, match=r"change that with `postil registry policy support --alias next --base`"):
        registry.promote("support", "live", "next", new_base=True)
    with pytest.raises(Refused, match="bound to the base sha256:base"):
        registry.promote("support", "next")


def test_a_note_for_its_task_alone(registry: Registry, judged: Judged) -> None:
    note = judged(0, scope="task")
    version = registry.publish(note, "support")
    assert version.scope == registry.version("support").scope == "task"
    assert registry.state("support").published[version.digest].scope == "task"
    assert registry.history("support")[-1].scope == "task"
    registry.set_policy("support", Policy(scope="assistant"), "chat")
    with pytest.raises(Refused, match="the card's scope is task"):
        registry.promote("support", "live", "chat")
    assert registry.publish(judged(1), "support", alias="chat").scope == "assistant"


def test_a_scope_that_is_refused_is_a_condition_beside_the_gates_own() -> None:
    note = card().model_copy(update={"scope": "task"})
    result = ask(Policy(gate="target.bleu > base", scope="assistant"), note, None)
    assert (result.passed, [c.text for c in result.conditions if c.broke]) == (False, ["scope"])
    both = ask(Policy(gate="target.bleu > base + 1000", scope="assistant"), note, None)
    assert "is not above base" in both.sentence
    assert "scope is task" in both.sentence
    assert "<failure" in both.junit()
    assert ask(Policy(gate="target.bleu > base"), note, None).passed


def test_a_policy_that_is_none() -> None:
    with pytest.raises(RegistryError, match=r"policy: scope: .*'assistant' or 'task'"):
        Policy(scope="all")  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match=r"policy: unknown key 'gaet' .did you mean 'gate'"):
        Policy.parse({"gaet": "target is better"})
