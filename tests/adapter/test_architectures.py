"""Every architecture: a pack's logits are each sequence's own, adapters mixed, and detaching leaves no trace."""

from __future__ import annotations

from typing import Any

import torch

from postil.adapter import LoraConfig, attach, detach
from postil.base import live_digest
from postil.kernels.layout import Layout, Span, Spans, positions_of

OWN_PATH = ("falcon", "bloom")
LENGTHS = (7, 1, 12, 3, 6)
USERS = ("a", None, "b", "a", "b")


def test_a_pack_of_mixed_adapters_equals_each_sequence_alone(architecture: str, lab: Any) -> None:
    base = lab.tiny(architecture)
    before = live_digest(base)
    bare = lab.plain(base, lab.ids)
    model = attach(base, LoraConfig(target_modules="all-linear"), name="a")
    attach(model, LoraConfig(r=3, alpha=5), name="b")
    assert model.packs == (architecture not in OWN_PATH)
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    ids = torch.randint(3, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    spans = Spans.of(
        Span(start, start + length, model.resident(user).slot)
        for start, length, user in zip(starts, LENGTHS, USERS, strict=True)
        if user
    )
    with torch.no_grad(), model.using(Layout.packed(LENGTHS, spans)):
        packed = model.logits(model.hidden(ids, positions_of(LENGTHS)), spans)
    for start, length, user in zip(starts, LENGTHS, USERS, strict=True):
        rows = slice(start, start + length)
        model.activate()
        without = lab.plain(model, ids[rows])
        model.activate(*([user] if user else []))
        alone = lab.plain(model, ids[rows])
        torch.testing.assert_close(packed[rows], alone, rtol=0, atol=1e-5)
        assert (user is None) == bool(torch.allclose(alone, without, atol=1e-3))
    detach(model)
    assert live_digest(base) == before
    assert torch.equal(lab.plain(base, lab.ids), bare)


def test_long_rope_follows_the_length_of_each_sequence(lab: Any) -> None:
    """The pack above holds sequences on both sides of longrope's limit; here the two kinds truly differ."""
    base = lab.tiny("phi3-longrope")
    model = attach(base)
    short, long = torch.arange(5, 10), torch.arange(5, 25)
    lengths = (5, 20)
    layout = Layout.packed(lengths)
    with torch.no_grad(), model.using(layout):
        packed = model.logits(model.hidden(torch.cat([short, long]), positions_of(lengths)), layout.spans)
    torch.testing.assert_close(packed[:5], lab.plain(model, short), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[5:], lab.plain(model, long), rtol=0, atol=1e-5)
    assert (packed[:5] - packed[5:10]).abs().max() > 1e-3  # the same tokens, other frequencies
