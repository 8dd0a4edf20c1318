"""Every architecture: a pack's logits are each sequence's own, adapters mixed, and detaching leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import LoraConfig, attach, detach
from postil.base import live_digest
from postil.data import Sample
from postil.judging.asking.likelihoods import row_losses
from postil.kernels.layout import Layout, Span, Spans, positions_of

OWN_PATH = ("falcon", "bloom")
BY_LENGTH = ("phi3-longrope",)
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


def test_a_shared_beginning_equals_each_sequence_whole(architecture: str, lab: Any) -> None:
    """The third part follows the first, the fourth the second, the last the third, through windows of every kind."""
    model = attach(lab.tiny(architecture), LoraConfig(target_modules="all-linear"), name="a")
    lab.scramble(model, "a", seed=1)
    lengths, before, firsts = (9, 2, 6, 1, 3, 4), (None, None, 0, 1, 0, 2), (0, 0, 9, 2, 9, 15)
    ids = torch.randint(3, 101, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    parts = ids.split(lengths)
    positions = torch.cat([torch.arange(first, first + size) for first, size in zip(firsts, lengths, strict=True)])
    slot = model.resident("a").slot
    spans = Spans.of([Span(0, 9, slot), Span(11, 17, slot), Span(18, 25, slot)])
    with torch.no_grad(), model.using(Layout.packed(lengths, spans, before)):
        packed = model.logits(model.hidden(ids, positions), spans).split(lengths)
    for part, found, own in zip(range(6), packed, parts, strict=True):
        model.activate(*(["a"] if part in (0, 2, 4, 5) else []))
        whole, earlier = own, before[part]
        while earlier is not None:
            whole, earlier = torch.cat([parts[earlier], whole]), before[earlier]
        torch.testing.assert_close(found, lab.plain(model, whole)[-len(own) :], rtol=0, atol=1e-5)


def test_rows_with_one_prompt_score_as_each_alone(architecture: str, lab: Any) -> None:
    """Also where the longer ones have other rotary frequencies than their prompt alone, which then is not shared."""
    model = attach(lab.tiny(architecture))
    assert model.shares_beginnings == (architecture not in (*OWN_PATH, *BY_LENGTH))
    ids = np.random.default_rng(0).integers(3, 101, 40)
    rows = [
        Sample(np.array([*ids[:9], *tail], dtype=np.int32), np.repeat([0, 1], [9, len(tail)]).astype(np.float32), 1)
        for tail in (ids[9:10], ids[10:24], ids[24:26])
    ]
    for row, (total, count) in zip(rows, row_losses(model, rows, None), strict=True):
        logs = lab.plain(model, torch.from_numpy(row.ids).long()).log_softmax(-1)
        alone = [float(logs[t - 1, row.ids[t]]) for t in range(9, len(row.ids))]
        assert (total, count) == (pytest.approx(-sum(alone), rel=1e-5), len(alone))


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
