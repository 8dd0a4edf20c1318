"""Publish, promote, roll back, resolve: versions by their bytes, a changed byte found, what is kept and what goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import postil
from cards import card, changed
from postil.adapter.peft_files import load_adapter
from postil.errors import (
    AdapterError,
    Corrupt,
    GateError,
    JudgeError,
    NotFound,
    Refused,
    RegistryError,
    StorageError,
    Unavailable,
)
from postil.registry import Policy, Registry, resolve_adapter
from postil.registry.version import Manifest

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
        assert registry.resolve(wanted).name == version.digest
    assert registry.load("support").tensors.keys() == load_adapter(judged()).tensors.keys()
    names = {"adapter_config.json", "adapter_model.safetensors", "postil.json", "README.md", "version.json"}
    assert {path.name for path in registry.resolve("support").iterdir()} == names
    assert set(version.files) == names - {"version.json"}
    assert registry.version("support@live").card == version.card
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
    assert registry.version("another").files == registry.version("support").files


def test_the_version_depends_on_each_file_and_the_base(registry: Registry, judged: Judged) -> None:
    digests = {registry.publish(judged(), "a").digest, registry.publish(judged(1), "a").digest}
    digests.add(registry.publish(judged(0, nats=2.92), "a").digest)  # another card
    readme = judged()
    (readme / "README.md").write_text("other words")
    digests.add(registry.publish(readme, "a").digest)
    assert len(digests) == 4
    manifest = json.loads((registry.resolve("a") / "version.json").read_text())
    parsed = Manifest.parse(manifest)
    assert parsed.digest != Manifest.parse(manifest | {"base": {"source": "other", "form": "fp32"}}).digest
    renamed = {("x" if name == "README.md" else name): digest for name, digest in parsed.files.items()}
    assert parsed.digest != Manifest(base=parsed.base, files=renamed).digest


def test_in_memory_and_with_a_card_to_add(registry: Registry, unjudged: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in unjudged.iterdir()}
    made = card(bytes_of=unjudged)
    version = postil.publish(unjudged, "support", made, registry=registry)
    assert {path.name: path.read_bytes() for path in unjudged.iterdir()} == before
    weights = registry.resolve("support") / "adapter_model.safetensors"
    assert weights.read_bytes() == before["adapter_model.safetensors"]
    in_memory = postil.publish(load_adapter(unjudged), "support", made, registry=tmp_path / "registry")
    assert in_memory.digest == version.digest
    assert postil.Registry(str(tmp_path / "registry")).load("support").card["score_card"]["command"] == made.command


def test_one_from_elsewhere_is_published_with_the_base_of_its_card(registry: Registry, unjudged: Path) -> None:
    (unjudged / "postil.json").unlink()
    (unjudged / "README.md").unlink()
    version = postil.publish(unjudged, "support", card(bytes_of=unjudged, source="sha256:x"), registry=registry)
    assert version.base == {"source": "sha256:x", "form": "fp32"}


# -- what is refused ------------------------------------------------------------------------------------


def test_a_refused_version_is_kept_and_not_reached(registry: Registry, judged: Judged) -> None:
    good = registry.publish(judged(0), "support")
    with pytest.raises(Refused, match=r"refused: .*general.nats") as refusal:
        registry.publish(judged(1, nats=3.12), "support")
    assert refusal.value.exit_code == 3
    assert registry.version("support").digest == good.digest
    event = registry.history("support")[-1]
    assert (event.action, event.alias, event.before) == ("refuse", "live", good.digest)
    assert event.result is not None
    assert event.result["passed"] is False
    kept = registry.catalog.record(event.version)
    assert kept is not None
    assert all(registry.blobs.has(digest) for digest in kept.manifest.files.values())
    with pytest.raises(NotFound, match=r"was not published .refused: .*general.nats"):
        registry.resolve(f"support@{event.version[:8]}")
    with pytest.raises(NotFound, match="was not published"):
        registry.promote("support", event.version)
    accepted = registry.publish(judged(1, nats=3.12), "support", override="the bound is wrong for this text")
    assert (accepted.digest, accepted.overridden) == (event.version, True)
    assert registry.resolve("support").name == accepted.digest


def test_a_name_of_refusals_alone_has_nothing_in_service(registry: Registry, judged: Judged) -> None:
    with pytest.raises(GateError):
        registry.publish(judged(1, nats=3.12), "support")
    for ask in (registry.resolve, registry.rollback):
        with pytest.raises(NotFound, match="nothing is in service as support: nothing that was published passed"):
            ask("support")


def test_a_refusal_under_one_name_leaves_another_names_record(registry: Registry, judged: Judged) -> None:
    registry.set_policy("strict", Policy(gate="target.bleu > base + 1000"))
    with pytest.raises(Refused):
        registry.publish(judged(0), "strict")
    registry.publish(judged(0), "support")
    registry.collect(grace=0)
    (_, refused) = registry.history("strict")
    assert (refused.action, refused.version) == ("refuse", registry.version("support").digest)
    with pytest.raises(NotFound, match="was not published"):
        registry.resolve(f"strict@{refused.version}")


def test_what_was_not_judged_is_refused_with_the_command(registry: Registry, unjudged: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=f"no score card.*postil judge {unjudged} --base a-base --target FILE"):
        registry.publish(unjudged, "support")
    assert not (tmp_path / "registry").exists()


def test_a_card_of_other_bytes_or_another_base_is_refused(registry: Registry, judged: Judged) -> None:
    place = judged()
    judged_card = card(bytes_of=place)
    with pytest.raises(GateError, match="made for other bytes"):
        registry.publish(judged(1), "support", judged_card)
    with pytest.raises(GateError, match="belongs to the base sha256:base and was judged on another"):
        registry.publish(place, "support", card(bytes_of=place, source="sha256:other"))
    registry.set_policy("support", Policy(gate="target is better"))
    with pytest.raises(GateError, match="no general data"):
        registry.publish(place, "support", changed(judged_card, general={}))


def test_a_broken_adapter_or_expression_is_named(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    place = judged()
    with pytest.raises(JudgeError, match="column 1: unknown measure 'taget'"):
        registry.set_policy("support", Policy(gate="taget is better"))
    with (place / "adapter_model.safetensors").open("r+b") as handle:
        handle.truncate(40)
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        registry.publish(place, "support")
    with pytest.raises(AdapterError, match="does not exist"):
        registry.publish(tmp_path / "nothing", "support")
    with pytest.raises(RegistryError, match="an override needs a reason"):
        registry.publish(judged(0), "support", override=" ")
    assert not (tmp_path / "registry").exists()


# -- promoting and rolling back -------------------------------------------------------------------------


def test_rolling_back_goes_further_each_time(registry: Registry, judged: Judged) -> None:
    one, two, three = (registry.publish(judged(seed), "support") for seed in range(3))
    assert registry.rollback("support").digest == two.digest
    assert registry.resolve("support").name == two.digest
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
    assert (registry.version("support").digest, registry.version("support@canary").digest) == (one.digest, two.digest)
    assert registry.promote("support", "canary").aliases == ("canary", "live")
    assert not registry.promote("support", "canary").moved
    assert registry.rollback("support").digest == one.digest
    with pytest.raises(RegistryError, match="support@canary has no version before"):
        registry.rollback("support", "canary")
    assert len(registry.history("support")) == 4


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


def test_an_at_sign_with_nothing_after_it(registry: Registry, judged: Judged) -> None:
    registry.publish(judged(0), "support")
    for ask in (registry.resolve, registry.version, registry.load):
        with pytest.raises(
            NotFound, match="names no alias and no version after the @; write support for support@live"
        ):
            ask("support@")
    with pytest.raises(NotFound, match="after the @"):
        resolve_adapter("support@", "registry")
    for wanted in ("support@../../x", "support@live@x", "@live", "../../etc@live"):
        with pytest.raises(NotFound):
            registry.resolve(wanted)


# -- keeping --------------------------------------------------------------------------------------------


def test_a_retired_version_is_served_no_more(registry: Registry, judged: Judged) -> None:
    one, two, three = (registry.publish(judged(seed), "support") for seed in range(3))
    with pytest.raises(RegistryError, match=r"support@live points at .* move it first"):
        registry.retire("support", three.short)
    assert registry.retire("support", two.short, "trained on the wrong rows") == two.digest
    for ask in (lambda: registry.resolve(f"support@{two.short}"), lambda: registry.promote("support", two.short)):
        with pytest.raises(NotFound, match="was retired; publish its adapter again"):
            ask()
    with pytest.raises(NotFound, match="was retired"):
        registry.retire("support", two.short)
    assert list(registry.versions("support")) == [one.digest, three.digest]
    assert registry.history("support")[-1].reason == "trained on the wrong rows"
    assert registry.rollback("support").digest == one.digest  # the retired one is passed over
    assert registry.collect(grace=1) == ([], 0)
    gone, freed = registry.collect(grace=0)
    assert (gone, freed > 0) == ([two.digest], True)
    assert registry.verify() == []
    again = registry.publish(judged(1), "support")
    assert (again.digest, again.new, again.moved) == (two.digest, True, True)
    assert registry.load("support").tensors


def test_a_roll_back_passes_over_a_retired_version_to_another_one(registry: Registry, judged: Judged) -> None:
    one, two, three = (registry.publish(judged(seed), "support") for seed in range(3))
    registry.promote("support", two.short)
    registry.retire("support", three.short)
    assert registry.rollback("support").digest == one.digest  # not to two, where it is


def test_an_alias_is_deleted(registry: Registry, judged: Judged) -> None:
    one = registry.publish(judged(0), "support")
    registry.publish(judged(1), "support", alias="canary")
    registry.delete_alias("support", "canary", "the trial is over")
    assert registry.state("support").live == {"live": one.digest}
    assert (registry.history("support")[-1].action, len(registry.versions("support"))) == ("delete", 2)
    with pytest.raises(NotFound, match="has no alias 'canary'; it has live"):
        registry.delete_alias("support", "canary")
    with pytest.raises(NotFound, match="neither an alias nor a version"):
        registry.rollback("support", "canary")
    assert registry.publish(judged(1), "support", alias="canary").moved


def test_a_name_is_unpublished(registry: Registry, judged: Judged) -> None:
    digests = {registry.publish(judged(seed), "support").digest for seed in range(2)}
    other = registry.publish(judged(0), "other")
    registry.unpublish("support", "the product ended")
    assert (registry.versions("support"), registry.state("support").live) == ({}, {})
    assert [event.action for event in registry.history("support")][2:] == ["delete", "retire", "retire"]
    with pytest.raises(NotFound, match="nothing is in service as support: its versions were retired"):
        registry.resolve("support")
    registry.unpublish("support")  # nothing is left to do
    assert len(registry.history("support")) == 5
    assert registry.collect(grace=0)[0] == sorted(digests - {other.digest})
    assert registry.resolve("other").name == other.digest


# -- bytes ----------------------------------------------------------------------------------------------


def stored(root: Path, registry: Registry, file: str) -> Path:
    """Where the registry keeps a file of support@live."""
    version = registry.version("support")
    return root / "versions" / f"{version.digest}.json" if file == "record" else root / "blobs" / version.files[file]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "postil.json", "adapter_config.json", "record"])
def test_every_changed_byte_is_refused_by_its_file(
    file: str, registry: Registry, judged: Judged, tmp_path: Path
) -> None:
    before = registry.publish(judged(1), "support")
    version = registry.publish(judged(0), "support")
    path = stored(tmp_path / "registry", registry, file)
    content = path.read_bytes()
    said = "record" if file == "record" else f"it is {file} of version {version.short}"
    for place in {0, len(content) // 2, len(content) - 3}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for read in (registry.load, registry.resolve):
            with pytest.raises(Corrupt, match=f"{path} (was changed|cannot be read)") as fault:
                read("support")
            assert said in str(fault.value) or file == "record"
        (fault_told,) = registry.verify()
        assert fault_told.startswith(f"support: {path}")
    path.unlink()
    with pytest.raises(Corrupt, match="publish the adapter again to restore it, or promote another version"):
        registry.load("support")
    assert registry.rollback("support").digest == before.digest
    with pytest.raises(Corrupt, match="publish the adapter again"):
        registry.promote("support", version.digest)
    path.write_bytes(content[:-3])
    with pytest.raises(Corrupt, match="publish the adapter again"):
        registry.promote("support", version.digest)
    assert registry.publish(judged(0), "support").new  # restored
    assert registry.load("support").tensors
    assert registry.verify() == []


def test_a_version_in_service_is_restored_by_its_bytes(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    registry.publish(judged(0), "support")
    for file in ("adapter_model.safetensors", "record"):
        path = stored(tmp_path / "registry", registry, file)
        path.write_bytes(path.read_bytes()[:-5])
        restored = registry.publish(judged(0), "support")
        assert (restored.new, restored.moved, registry.verify()) == (True, False, [])
    assert len(registry.history("support")) == 1


def test_a_file_that_changes_while_it_is_published(
    registry: Registry, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postil.registry import blobs

    real = blobs.copied

    def racing(source: Path, target: Path) -> str:
        source.write_bytes(source.read_bytes() + b" ")
        return real(source, target)

    monkeypatch.setattr(blobs, "copied", racing)
    with pytest.raises(RegistryError, match="changed while it was published"):
        registry.publish(judged(), "support")
    monkeypatch.undo()
    assert registry.names() == []
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
    (tmp_path / "registry/registry.json").write_text('{"format": 3}')
    for use in (lambda: registry.resolve("support"), lambda: registry.publish(judged(1), "support")):
        with pytest.raises(RegistryError, match="format 3 is not the known 2"):
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
    place = str(tmp_path / "registry")
    for given in ("support@live", "support", f"support@{version.short}"):
        assert resolve_adapter(given, place) == ("support", registry.resolve("support"))
    assert resolve_adapter("support", Path(place)) == ("support", registry.resolve("support"))
    assert resolve_adapter("support", None) is None
    assert resolve_adapter("support", "") is None
    assert resolve_adapter("runs/0/adapter", place) is None
    assert resolve_adapter("nothing/support@live", place) is None
    with pytest.raises(RegistryError, match=r"nothing is published as 'a{300}'; known: support"):
        resolve_adapter("a" * 300, place)
    with pytest.raises(RegistryError, match=r"'support@live' is no directory.*--registry DIR or set POSTIL_REGISTRY"):
        resolve_adapter("support@live", None)
    (tmp_path / "support@live").mkdir()
    assert resolve_adapter("support@live", None) is None


@pytest.mark.parametrize("url", ["postgresql+psycopg://me:secret@host/db", "s3://bucket/x", "sqlite:///x.db"])
def test_a_place_of_another_kind_is_refused_and_its_password_not_told(url: str) -> None:
    with pytest.raises(RegistryError, match=f"of the kind {url.partition('://')[0].replace('+', '.')}://") as refusal:
        Registry(url)
    assert "secret" not in str(refusal.value)


def test_a_place_as_a_file_url(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    version = registry.publish(judged(), "support")
    assert Registry(f"file://{tmp_path / 'registry'}").version("support").digest == version.digest
    with pytest.raises(RegistryError, match="without a blob store"):
        Registry(registry.catalog)


def test_what_is_out_of_reach_is_told_from_what_is_wrong(
    registry: Registry, judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(judged(), "support")
    read = Path.read_text

    def refused(path: Path, *words: str, **more: str) -> str:
        if path.name == "state.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(Unavailable, match=r"cannot be read .Permission denied") as fault:
        registry.resolve("support")
    assert fault.value.exit_code == 4


def test_nothing_but_the_log_holds_a_clock_or_a_user(
    registry: Registry, judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(judged(), "support")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setattr("postil.registry.directory.now", lambda: "1999-01-01T00:00:00+00:00")
    second = Registry(tmp_path / "second")
    second.publish(judged(), "support")

    def files(place: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
        }

    here, there = files(tmp_path / "registry"), files(tmp_path / "second")
    assert here.keys() == there.keys()
    differ = {name for name in here if here[name] != there[name]}
    assert differ == {"names/support/log.jsonl", "names/support/state.json"}
    assert {event.who for event in second.history("support")} == {"somebody-else"}
    assert second.version("support") == registry.version("support")
