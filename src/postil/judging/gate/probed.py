"""Leakage and contamination in the gate: what came back word for word, and rows judged on that were trained on."""

from __future__ import annotations

from postil.errors import JudgeError, nearest
from postil.judging.card.model import Contamination, Estimate, Leakage, ScoreCard
from postil.judging.gate.comparisons import answered
from postil.judging.gate.expression import Compare, Judged, Leaf
from postil.judging.gate.items import Condition, NoAnswer, ends
from postil.judging.gate.margins import LEAKED
from postil.judging.gate.verdicts import apart

LEAKAGE = ("adapter", "base", "held_out")
CONTAMINATION = ("target", "general")


def leaked(leaf: Leaf, card: ScoreCard) -> Condition:
    """`leakage is [not] kept`, `leakage[.adapter | .base | .held_out] sign right`.

    Kept: by the harmful end of the difference to what skill alone repeats (rows never learned) or the base says
    anyway, whichever is more, no more than LEAKED points of the rows come back. Raises NoAnswer where leakage was not
    measured.
    """
    if card.leakage is None:
        raise NoAnswer("leakage was not measured; judge the adapter again with --leakage TRAINING_FILE")
    if isinstance(leaf, Judged):
        return _kept(leaf, card.leakage)
    name = leaf.path.partition(".")[2] or "adapter"
    found: Estimate | None = getattr(card.leakage, name) if name in LEAKAGE else None
    if name not in LEAKAGE:
        raise JudgeError(
            f"gate expression, column {leaf.column}: leakage has no {name!r}{nearest(name, LEAKAGE)}; it has "
            f"{', '.join(LEAKAGE)}"
        )
    if found is None:
        raise NoAnswer("leakage was not measured on held-out rows; judge the adapter again with --target FILE too")
    left = getattr(found, leaf.end or "value")
    right = (card.leakage.base.value if leaf.anchor else 0.0) + leaf.offset
    return answered(leaf, f"leakage.{name}", left, right)


def _kept(leaf: Judged, found: Leakage) -> Condition:
    if not found.rows:
        raise NoAnswer("leakage was tried on no rows; judge the adapter again with rows that are long enough")
    rivals = {"the base": found.base} | ({"rows never learned": found.held_out} if found.held_out is not None else {})
    whose, other = max(rivals.items(), key=lambda one: one[1].value)
    gap = apart(found.adapter, other)
    kept = gap.high <= LEAKED
    told = "kept" if kept else "worse" if gap.value > LEAKED else "too few rows to say"
    what = {"kept": "leakage is kept", "worse": "leakage is more than allowed"}.get(
        told, "leakage may be more than allowed"
    )
    sentence = (
        f"leakage {what}: {found.adapter.value:.3g}% of {found.rows:,} training rows come back word for word, "
        f"of {whose} {other.value:.3g}%, difference {ends(gap)}, and +{LEAKED:g} points are allowed"
    )
    if told == "too few rows to say":
        sentence += "; try more rows (--set leakage.rows), or say a bound of your own: leakage.adapter < base + 10"
    return Condition("", told, f"{'not ' if leaf.negated else ''}kept", kept is not leaf.negated, sentence)


def contaminated(leaf: Leaf, card: ScoreCard) -> Condition:
    """`contamination is [not] none`, `contamination[.target | .general] sign number`, counted in rows.

    Raises NoAnswer where the adapter does not tell what it was trained on.
    """
    found = card.contamination
    if found is None:
        raise NoAnswer(
            "contamination is unknown: the adapter does not tell which rows it was trained on; train it with postil, "
            "or ask a gate without it"
        )
    name = leaf.path.partition(".")[2]
    if name not in ("", *CONTAMINATION):
        raise JudgeError(
            f"gate expression, column {leaf.column}: contamination has no {name!r}{nearest(name, CONTAMINATION)}; it "
            f"has {', '.join(CONTAMINATION)}"
        )
    count = {"target": found.target, "general": found.general}.get(name, found.target + found.general)
    if isinstance(leaf, Compare):
        return answered(leaf, leaf.path, float(count), leaf.offset)
    clean = count == 0
    return Condition("", f"{count} rows", f"{'not ' if leaf.negated else ''}none", clean is not leaf.negated,
                     _counted(leaf.path, name, found, clean))  # fmt: skip


def _counted(path: str, name: str, found: Contamination, clean: bool) -> str:
    told = []
    if name != "general":
        told.append(f"{found.target:,} of {found.target_rows:,} target rows were trained on")
    if name != "target":
        told.append(f"{found.general:,} of {found.general_rows:,} general rows were trained on or guarded with")
    if clean:
        return f"{path} is none: {' and '.join(told)}"
    return (
        f"{path}: {' and '.join(told)}, so they are no test; judge on rows that were held out (or allow them in an "
        f"expression: contamination.target <= {found.target} and contamination.general <= {found.general})"
    )
