"""Publish, promote, roll back, resolve: versions by their bytes, the gate at the door, a changed byte found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import postil
from cards import card, changed
from postil.adapter.peft_files import load_adapter
from postil.errors import AdapterError, GateError, JudgeError, RegistryError, StorageError
from postil.registry import Registry, resolve_adapter
from postil.registry.registry import REFUSAL

Judged = Callable[..., Path]


def actions(registry: Registry, name: str = "support") -> list[tuple[str, str, str, str | None]]:
    """(action, alias, first digits of the version, of the one before) of every event."""
    return [
        (event.action, event.alias, event.version[:12], event.before and event.before[:12])
        for event in registry.history(name)
    ]


# -- publishing -----------------------------------------------------------------------------------------


def test_a_published_adapter_is_found_by_name_alias_and_version(registry: Registry, judged: Judged) -> None:
    version = registry.publish(judged(), "support")
    assert (version.new, version.moved, version.aliases, len(version.digest)) == (True, True, ("live",), 64)
    assert version.gate is not None
    assert version.gate.passed
    for wanted in ("support", "support@live", f"support@{version.digest}", f"support@{version.digest[:4]}"):
        assert registry.resolve(wanted) == version.path
    assert registry.load("support").tensors.keys() == load_adapter(judged()).tensors.keys()
    names = {"adapter_config.json", "adapter_model.safetensors", "postil.json", "README.md", "version.json"}
    assert {path.name for path in version.path.iterdir()} == names
    assert actions(registry) == [("publish", "live", version.short, None)]


def test_equal_bytes_are_one_version(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    first = registry.publish(judged(), "support")
    copied = shutil.copytree(judged(), tmp_path / "copied")
    (copied / "notes.txt").write_text("not an adapter's file")
    again = registry.publish(copied, "support")
    assert (again.digest, again.new, again.moved) == (first.digest, False, False)
    assert len(actions(registry)) == 1
    other = registry.publish(copied, "another")
    assert (other.digest, other.new, other.moved) == (first.digest, False, True)
    assert len(registry.store.digests("versions")) == 1


def test_the_version_depends_on_each_file_and_the_base(registry: Registry, judged: Judged) -> None:
    digests = {registry.publish(judged(), "a").digest, registry.publish(judged(1), "a").digest}
    digests.add(registry.publish(judged(0, nats=2.92), "a").digest)  # another card
    readme = judged()
    (readme / "README.md").write_text("other words")
    digests.add(registry.publish(readme, "a").digest)
    assert len(digests) == 4
    manifest = json.loads((registry.resolve("a") / "version.json").read_text())
    from postil.registry.version import Manifest

    parsed = Manifest.parse(manifest)
    assert parsed.digest != Manifest.parse(manifest | {"base": {"source": "other", "form": "fp32"}}).digest
    renamed = {("x" if name == "README.md" else name): digest for name, digest in parsed.files.items()}
    assert parsed.digest != Manifest(base=parsed.base, files=renamed).digest


def test_in_memory_and_with_a_card_to_add(registry: Registry, judged: Judged, unjudged: Path) -> None:
    before = {path.name: path.read_bytes() for path in unjudged.iterdir()}
    made = card(bytes_of=unjudged)
    version = postil.publish(unjudged, "support", made, registry=registry)
    assert {path.name: path.read_bytes() for path in unjudged.iterdir()} == before
    assert version.path.joinpath("adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]
    in_memory = postil.publish(load_adapter(unjudged), "support", made, registry=registry.store.root)
    assert in_memory.digest == version.digest
    assert postil.Registry(registry.store.root).load("support").card["score_card"]["command"] == made.command


def test_one_from_elsewhere_is_published_with_the_base_of_its_card(registry: Registry, unjudged: Path) -> None:
    (unjudged / "postil.json").unlink()
    (unjudged / "README.md").unlink()
    version = postil.publish(unjudged, "support", card(bytes_of=unjudged, source="sha256:x"), registry=registry)
    assert version.base == {"source": "sha256:x", "form": "fp32"}


# -- the gate -------------------------------------------------------------------------------------------


def test_a_refused_version_is_kept_and_not_reached(registry: Registry, judged: Judged) -> None:
    good = registry.publish(judged(0), "support")
    with pytest.raises(GateError, match=r"refused: general.nats is worse than allowed: 2.9 nats"):
        registry.publish(judged(1, nats=3.12), "support")
    assert registry.resolve("support") == good.path
    (refused,) = registry.store.digests("refused")
    place, _ = registry.store.get("refused", refused)
    assert json.loads((place / REFUSAL).read_text())["passed"] is False
    assert json.loads((place / "postil.json").read_text())["card"]["score_card"]["command"]
    with pytest.raises(RegistryError, match=r"was not published .refused: general.nats is worse than allowed"):
        registry.resolve(f"support@{refused[:8]}")
    with pytest.raises(RegistryError, match="was not published"):
        registry.promote("support", refused)
    assert actions(registry)[-1] == ("refuse", "live", refused[:12], good.short)
    accepted = registry.publish(judged(1, nats=3.12), "support", gate="target is better")
    assert (accepted.digest, registry.store.digests("refused")) == (refused, [])


def test_a_name_of_refusals_alone_has_nothing_in_service(registry: Registry, judged: Judged) -> None:
    with pytest.raises(GateError):
        registry.publish(judged(1, nats=3.12), "support")
    for ask in (registry.resolve, registry.rollback):
        with pytest.raises(RegistryError, match="nothing is in service as support: the gate refused"):
            ask("support")


def test_what_was_not_judged_is_refused_with_the_command(registry: Registry, unjudged: Path) -> None:
    with pytest.raises(GateError, match=f"no score card.*postil judge {unjudged} --base a-base --target FILE"):
        registry.publish(unjudged, "support")
    assert not registry.store.root.exists()


def test_a_card_of_other_bytes_or_another_base_is_refused(registry: Registry, judged: Judged) -> None:
    place = judged()
    judged_card = card(bytes_of=place)
    with pytest.raises(GateError, match="made for other bytes"):
        registry.publish(judged(1), "support", judged_card)
    with pytest.raises(GateError, match="belongs to the base sha256:base and was judged on another"):
        registry.publish(place, "support", card(bytes_of=place, source="sha256:other"))
    with pytest.raises(GateError, match="no general data"):
        registry.publish(place, "support", changed(judged_card, general={}), gate="target is better")


def test_a_broken_adapter_or_expression_is_named(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    place = judged()
    with pytest.raises(JudgeError, match="column 1: unknown measure 'taget'"):
        registry.publish(place, "support", gate="taget is better")
    with (place / "adapter_model.safetensors").open("r+b") as handle:
        handle.truncate(40)
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        registry.publish(place, "support")
    with pytest.raises(AdapterError, match="does not exist"):
        registry.publish(tmp_path / "nothing", "support")
    assert not registry.store.root.exists()


def test_the_gate_knows_the_version_in_service(registry: Registry, judged: Judged) -> None:
    gate = "target.bleu > live and general.nats < base + 0.05"
    registry.publish(judged(0, bleu=50), "support", gate=gate)
    with pytest.raises(GateError, match=r"target.bleu 49 is not above live = 50"):
        registry.publish(judged(1, bleu=49), "support", gate=gate)
    with pytest.raises(GateError, match=r"target.bleu 49 is not above live = 50"):
        registry.publish(judged(1, bleu=49), "support", gate=gate, alias="canary")
    better = registry.publish(judged(2, bleu=51), "support", gate=gate)
    assert not registry.publish(judged(2, bleu=51), "support", gate=gate).moved  # beside the one before it
    with pytest.raises(GateError):
        registry.publish(judged(2, bleu=51), "support", gate="target.bleu > live + 5")
    assert registry.resolve("support") == better.path
    assert registry.store.digests("refused") != [better.digest]
    registry.publish(judged(1, bleu=49), "other", gate=gate)  # nothing is in service under that name


# -- promoting and rolling back -------------------------------------------------------------------------


def test_rolling_back_goes_further_each_time(registry: Registry, judged: Judged) -> None:
    one, two, three = (registry.publish(judged(seed), "support") for seed in range(3))
    assert registry.rollback("support").digest == two.digest
    assert registry.resolve("support") == two.path
    assert registry.rollback("support").digest == one.digest
    with pytest.raises(RegistryError, match=f"support@live has no version before {one.short}"):
        registry.rollback("support")
    assert registry.promote("support", three.digest[:6]).digest == three.digest
    assert registry.rollback("support").digest == one.digest
    assert [row[0] for row in actions(registry)] == ["publish"] * 3 + ["rollback"] * 2 + ["promote", "rollback"]
    assert registry.versions("support") == {one.digest: ("live",), two.digest: (), three.digest: ()}


def test_aliases_move_alone(registry: Registry, judged: Judged) -> None:
    one = registry.publish(judged(0), "support")
    two = registry.publish(judged(1), "support", alias="canary")
    assert (registry.resolve("support"), registry.resolve("support@canary")) == (one.path, two.path)
    assert registry.promote("support", "canary").aliases == ("canary", "live")
    assert not registry.promote("support", "canary").moved
    assert registry.rollback("support").digest == one.digest
    with pytest.raises(RegistryError, match="support@canary has no version before"):
        registry.rollback("support", "canary")


def test_only_what_was_published_under_the_name_is_found(registry: Registry, judged: Judged) -> None:
    registry.publish(judged(0), "support")
    other = registry.publish(judged(1), "sales")
    with pytest.raises(RegistryError, match="is neither an alias nor a version; aliases: live; versions: "):
        registry.promote("support", other.digest)
    with pytest.raises(RegistryError, match="did you mean 'live'"):
        registry.resolve("support@liv")
    with pytest.raises(
        RegistryError, match=r"nothing is published as 'suport' .did you mean 'support'.*known: sales"
    ):
        registry.resolve("suport")
    assert registry.names() == ["sales", "support"]


@pytest.mark.parametrize("name", ["", "Support", "../x", "a/b", "a@b", ".hidden", "-a", "x" * 65])
def test_a_name_that_cannot_be_one(name: str, registry: Registry, judged: Judged) -> None:
    with pytest.raises(RegistryError, match="cannot be a published name"):
        registry.publish(judged(), name)


@pytest.mark.parametrize("alias", ["", "Live", "../x", "beef", "0a1b2c", "a.b"])
def test_an_alias_that_cannot_be_one(alias: str, registry: Registry, judged: Judged) -> None:
    with pytest.raises(RegistryError, match="cannot be an alias"):
        registry.publish(judged(), "support", alias=alias)


# -- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "postil.json", "adapter_config.json", "version.json"])
def test_every_changed_byte_is_refused_by_its_file(file: str, registry: Registry, judged: Judged) -> None:
    before = registry.publish(judged(1), "support")
    version = registry.publish(judged(0), "support")
    path = version.path / file
    content = path.read_bytes()
    for place in {0, len(content) // 2, len(content) - 2}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for read in (registry.load, registry.resolve, registry.version):
            with pytest.raises(RegistryError, match=f"{file} (was changed|cannot be read)"):
                read("support")
    path.unlink()
    with pytest.raises(RegistryError, match=file):
        registry.load("support")
    assert registry.rollback("support").digest == before.digest
    with pytest.raises(RegistryError, match=file):
        registry.promote("support", version.digest)
    assert registry.publish(judged(0), "support").new  # restored
    assert registry.load("support").tensors


def test_a_file_that_changes_while_it_is_published(
    registry: Registry, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfile

    def racing(source: Path, target: Path) -> None:
        real(source, target)
        target.write_bytes(target.read_bytes() + b" ")

    monkeypatch.setattr(shutil, "copyfile", racing)
    with pytest.raises(RegistryError, match="changed while it was published"):
        registry.publish(judged(), "support")
    monkeypatch.undo()
    assert registry.store.digests("versions") == []
    assert registry.publish(judged(), "support").new


# -- the directory, and the hook ------------------------------------------------------------------------


def test_what_is_no_registry_is_left_alone(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"is no directory; `postil publish` makes"):
        registry.names()
    home = tmp_path / "somebodys"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(RegistryError, match=r"holds no registry.json and is no registry"):
        Registry(home).publish(judged(), "support")
    assert [path.name for path in home.iterdir()] == ["letter.txt"]
    registry.publish(judged(), "support")
    (registry.store.root / "registry.json").write_text('{"format": 2}')
    for use in (lambda: registry.resolve("support"), lambda: registry.publish(judged(1), "support")):
        with pytest.raises(RegistryError, match="format 2 is not the known 1"):
            use()


def test_a_place_that_cannot_be_written(judged: Judged, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((RegistryError, StorageError), match="file"):
        Registry(tmp_path / "file" / "inner").publish(judged(), "support")


def test_a_name_is_told_from_a_directory(
    registry: Registry, judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    version = registry.publish(judged(), "support")
    place = registry.store.root
    assert resolve_adapter("support@live", place) == ("support", version.path)
    assert resolve_adapter("support", place) == ("support", version.path)
    assert resolve_adapter("support", None) is None
    assert resolve_adapter("runs/0/adapter", place) is None
    with pytest.raises(RegistryError, match=r"nothing is published as 'a{300}'; known: support"):
        resolve_adapter("a" * 300, place)
    with pytest.raises(RegistryError, match=r"'support@live' is no directory.*--registry DIR or set POSTIL_REGISTRY"):
        resolve_adapter("support@live", None)
    (tmp_path / "support@live").mkdir()
    assert resolve_adapter("support@live", None) is None


def test_nothing_but_the_log_holds_a_clock_or_a_user(
    registry: Registry, judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(judged(), "support")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setattr("postil.registry.store.now", lambda: "1999-01-01T00:00:00+00:00")
    second = Registry(tmp_path / "second")
    second.publish(judged(), "support")

    def files(place: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
        }

    here, there = files(registry.store.root), files(second.store.root)
    assert here.keys() == there.keys()
    differ = {name for name in here if here[name] != there[name]}
    assert differ == {"aliases/support/log.jsonl", "aliases/support/live.json"}
    assert {event.who for event in second.history("support")} == {"somebody-else"}
    assert replace(second.version("support"), path=Path()) == replace(registry.version("support"), path=Path())
