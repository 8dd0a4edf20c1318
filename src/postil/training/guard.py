"""The guard: prose and chat measured against the base while training, and the best state that leaves both whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from postil.adapter.bank import Resident
from postil.adapter.divergence import Bare, base_head, base_states
from postil.adapter.model import AdaptedModel
from postil.data import Sample, epoch_steps
from postil.kernels.layout import Layout
from postil.kernels.loss import cross_entropy, kl_divergence
from postil.kernels.loss.reference import Head
from postil.training.batch import spans_of, to_device
from postil.training.checkpoint import Progress
from postil.training.general import General
from postil.training.optimizer import Trainable
from postil.training.options import TrainOptions


@dataclass(frozen=True, slots=True)
class Guarded:
    """What a guard did. rise: nats per token above the base of prose or of chat, the larger; loss: held-out nats per
    target token.

    step, loss, rise: of the state that was kept (step 0 is the untouched one, which always may be);
    free_…: of the best held-out state, guard or none (None where no rows are held out). seconds: spent watching.
    """

    allowed: float
    step: int
    loss: float | None
    rise: float
    free_step: int
    free_loss: float | None
    free_rise: float | None
    seconds: float

    def sentence(self) -> str:
        """What was kept and what the guard cost, for the user."""
        spent = f"watching took {self.seconds:.0f} s"
        if self.step == 0:
            best = f" (step {self.free_step}, the best held-out one: {self.free_rise:+.3f})" if self.free_step else ""
            return (
                f"guard {self.allowed:g}: no state that was measured stays within it{best}, so the untouched state "
                "of step 0 was kept and nothing was learned; lower the learning rate, measure more often "
                f"(training.valid_every), set training.kl_weight, or allow more; {spent}"
            )
        loss = "" if self.loss is None else f"held-out loss {self.loss:.4f}, "
        kept = f"guard {self.allowed:g}: kept step {self.step} ({loss}general {self.rise:+.3f} nats)"
        if self.free_loss is None or self.free_rise is None:
            return f"{kept}; {spent}"
        if self.free_step == self.step:
            return f"{kept}, the best state of all; it cost nothing; {spent}"
        return (
            f"{kept}; without it step {self.free_step} ({self.free_loss:.4f}, {self.free_rise:+.3f}): "
            f"it cost {self.loss_lost:.4f} nats of held-out loss; {spent}"
        )

    def facts(self) -> dict[str, float | None]:
        """All but the seconds: what belongs on the adapter's card, where no clock stands."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}

    @property
    def loss_lost(self) -> float:
        """Held-out nats per target token that the best unguarded state is better by."""
        return 0.0 if self.loss is None or self.free_loss is None else self.loss - self.free_loss


@dataclass(slots=True)
class _Watched:
    """A pack of watched windows; base: the base's hidden states [targets, dim] before each target."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    base: torch.Tensor


@dataclass(slots=True)
class Gauge:
    """General nats per token and KL to the base over the watched windows; the base's part is computed once."""

    base_nats: float
    bare: Bare
    packs: list[_Watched]

    @classmethod
    @torch.no_grad()
    def of(cls, model: AdaptedModel, windows: Sequence[Sample], pack_tokens: int, bare: Bare) -> Gauge:
        """A gauge with the base's hidden states [tokens, dim] of all windows kept in its dtype."""
        gauge = cls(0.0, bare, [])
        nats = 0.0
        (packs,) = epoch_steps(
            windows, batch_size=len(windows), accumulation=1, pack_tokens=pack_tokens, seed=0, epoch=0, shuffle=False
        )
        for pack in packs:
            ids, positions, share = to_device(pack, model)
            targets = share.nonzero(as_tuple=True)[0]
            with model.using(Layout.packed(pack.lengths)):
                base = base_states(model, ids, positions, targets - 1, bare=bare)
                total, _ = cross_entropy(base, ids[targets], torch.ones_like(share[targets]), base_head(model, bare))
            gauge.packs.append(_Watched(ids, positions, targets, pack.lengths, base))
            nats += float(total)
        gauge.base_nats = nats / gauge.tokens
        return gauge

    @property
    def tokens(self) -> int:
        """The tokens that are measured."""
        return sum(len(pack.targets) for pack in self.packs)

    @torch.no_grad()
    def measure(self, model: AdaptedModel, resident: Resident | None) -> dict[str, float]:
        """general_nats, general_rise (over the base), general_kl (KL(base||adapted)) per token; watch_seconds."""
        began = time.perf_counter()
        nats = divergence = 0.0
        for pack in self.packs:
            rows, words = pack.targets - 1, pack.ids[pack.targets]
            with model.using(Layout.packed(pack.lengths, spans_of(resident, len(pack.ids)))):
                states = model.hidden(pack.ids, pack.positions).index_select(0, rows)
                losses: list[torch.Tensor] = []
                head = _noting(model.head_on(rows), words, losses)
                kl, _ = kl_divergence(pack.base, states, base_head(model, self.bare), head)
            nats += sum(float(loss) for loss in losses)
            divergence += float(kl)
        nats /= self.tokens
        return {
            "general_nats": nats,
            "general_rise": nats - self.base_nats,
            "general_kl": divergence / self.tokens,
            "watch_seconds": round(time.perf_counter() - began, 4),
        }


@dataclass(slots=True)
class Gauges:
    """A gauge of each kind that is watched: "prose" and "chat"."""

    kinds: dict[str, Gauge]

    @classmethod
    def of(cls, model: AdaptedModel, general: General, pack_tokens: int, bare: Bare) -> Gauges:
        """Gauges with the base's hidden states kept."""
        found = {"prose": general.watched, "chat": general.chat_watched}
        return cls({kind: Gauge.of(model, rows, pack_tokens, bare) for kind, rows in found.items() if rows})

    def measure(self, model: AdaptedModel, resident: Resident | None) -> dict[str, float]:
        """Each kind's nats, rise and kl (general_… for prose, as for whatever is watched alone, else chat_…);
        general_rise is the larger rise; watch_seconds."""
        found = {kind: gauge.measure(model, resident) for kind, gauge in self.kinds.items()}
        first = next(iter(found.values()))
        event = dict(first)
        event["general_rise"] = max(one["general_rise"] for one in found.values())
        event["watch_seconds"] = round(sum(one["watch_seconds"] for one in found.values()), 4)
        if len(found) > 1:
            event["prose_rise"] = first["general_rise"]
            event |= {f"chat_{name}": found["chat"][f"general_{name}"] for name in ("nats", "rise", "kl")}
        return event

    def verdict(
        self, model: AdaptedModel, resident: Resident | None, progress: Progress, allowed: float, seconds: float
    ) -> Guarded:
        """What the guard did in a run that has ended and put the kept state back; seconds: spent in `measure`."""
        rise = progress.best_rise
        if rise is None:  # the untouched state: an adapter that came in may lie above the base already
            rise = self.measure(model, resident)["general_rise"]
        return Guarded(
            allowed, progress.best_step, progress.best_loss, rise,
            progress.free_step, progress.free_loss, progress.free_rise, seconds,
        )  # fmt: skip


def _noting(head: Head, words: torch.Tensor, losses: list[torch.Tensor]) -> Head:
    """The head, with the sum of nll of the words of each chunk noted as it goes by."""

    def noting(chunk: torch.Tensor, start: int, end: int) -> torch.Tensor:
        logits = head(chunk, start, end)
        losses.append(F.cross_entropy(logits.float(), words[start:end], reduction="sum"))
        return logits

    return noting


def keep(
    progress: Progress, weights: Trainable, options: TrainOptions, loss: float | None, rise: float | None
) -> None:
    """Take the state of now for the one to keep where it is the best held-out state (the newest, where nothing is
    held out) of those whose general rise is at most options.guard; note the best of all beside it. A held-out loss
    that is not finite is never the best."""
    if loss is not None and not math.isfinite(loss):
        progress.since_best += 1
        return
    if loss is not None and (progress.free_loss is None or loss < progress.free_loss):
        progress.free_step, progress.free_loss, progress.free_rise = progress.step, loss, rise
    passes = options.guard is None or (rise is not None and rise <= options.guard)
    if passes and (loss is None or progress.best_loss is None or loss < progress.best_loss):
        progress.best_step, progress.best_loss, progress.best_rise, progress.since_best = progress.step, loss, rise, 0
        if progress.best is None:
            progress.best = torch.empty_like(weights.flat)
        progress.best.copy_(weights.flat.detach())  # into the same memory: a second copy of a whole model is much
    else:
        progress.since_best += 1
