"""Parts: slices by column and by tag, small ones left out, and intervals corrected for all that were looked at."""

from __future__ import annotations

from typing import Any

import pytest

from postil.errors import InternalError, JudgeError
from postil.judging.card.build import ACCURACY, NATS, OTHERS, Draw, check_columns, hits, part_of, slices_of, stats_of
from postil.judging.card.model import DataUsed

ROWS: list[dict[str, Any]] = [
    {
        "intent": "refund" if n % 2 else "order",
        "tags": ["all", "odd"] if n % 2 else ["all"],
        "rare": n == 0,
        "deep": {},
    }
    for n in range(20)
]


def test_slices_hold_the_units_of_each_value() -> None:
    slices, small = slices_of(ROWS, ["intent", "tags", "rare", "deep", "none"], 5)
    assert {value: units.tolist() for value, units in slices["intent"].items()} == {
        "order": list(range(0, 20, 2)), "refund": list(range(1, 20, 2))
    }  # fmt: skip
    assert {value: len(units) for value, units in slices["tags"].items()} == {"all": 20, "odd": 10}
    assert small == {"rare": ["True"]}
    assert set(slices) == {"intent", "tags", "rare"}
    twice, _ = slices_of([{"tags": ["a", "a"]}, {"tags": ["a", 1, "1"]}], ["tags"], 1)  # a tag named twice is one
    assert {value: units.tolist() for value, units in twice["tags"].items()} == {"a": [0, 1], "1": [1]}
    with pytest.raises(
        JudgeError, match=r"a value of intent holds half a surrogate pair, which is no text: 'x.ud83d'"
    ):
        slices_of([{"intent": "x\ud83d"}], ["intent"], 1)


def test_small_values_are_looked_at_together() -> None:
    """The one row of True is too few even alone among the small ones: the next rarest value fills up their slice."""
    slices, small = slices_of(ROWS, ["rare"], 5)
    assert {value: len(units) for value, units in slices["rare"].items()} == {"False": 19, OTHERS: 20}
    assert small == {"rare": ["True"]}
    rows = [{"intent": name} for name in "aaaaaaaabbbcccdde" + "f" * 9]
    slices, small = slices_of(rows, ["intent"], 8)
    assert {value: units.tolist() for value, units in slices["intent"].items()} == {
        "a": list(range(8)), "f": list(range(17, 26)), OTHERS: list(range(8, 17))
    }  # fmt: skip
    assert small == {"intent": ["b", "c", "d", "e"]}
    slices, _ = slices_of([{"intent": n} for n in range(4)], ["intent"], 8)  # every value is rare
    assert {value: units.tolist() for value, units in slices["intent"].items()} == {OTHERS: [0, 1, 2, 3]}
    called_so = [{"intent": OTHERS}] * 9 + [{"intent": "b"}]
    assert {value: len(units) for value, units in slices_of(called_so, ["intent"], 8)[0]["intent"].items()} == {
        OTHERS: 10
    }


def test_a_part_corrects_for_every_slice_and_shows_a_collapse_that_the_whole_hides() -> None:
    base = hits([n % 2 == 1 for n in range(40)])
    adapter = hits([n % 2 == 0 for n in range(40)])  # as many right, other ones
    rows = [{"intent": "refund" if n % 2 else "order"} for n in range(40)]
    slices, _ = slices_of(rows, ["intent"], 5)
    data = DataUsed(name="x", sha256="y", rows=40)
    part = part_of(data, "accuracy", {"accuracy": ACCURACY}, {"accuracy": base}, {"accuracy": adapter}, Draw(),
                   slices=slices, few_shot={"accuracy": base}, shots=3)  # fmt: skip
    assert part.measures["accuracy"].verdict == "no evidence"
    assert part.slices["intent"]["refund"]["accuracy"].verdict == "worse"
    assert part.slices["intent"]["order"]["accuracy"].verdict == "better"
    assert part.measures["accuracy"].level == 0.95
    order = part.slices["intent"]["order"]["accuracy"]
    assert order.corrected is not None
    assert order.corrected.low <= order.difference.low
    assert part.measures["accuracy"].corrected is None
    assert (part.few_shot["accuracy"].value, part.shots) == (50, 3)


def test_a_column_that_no_row_has() -> None:
    check_columns(["intent"], [[], ROWS])
    with pytest.raises(
        JudgeError, match=r"no row has a column 'intnt' \(did you mean 'intent'\?\); there are: intent"
    ):
        check_columns(["intnt"], [[], ROWS])


def test_what_is_measured_by_likelihood_scores_no_answers() -> None:
    assert float(NATS.value(stats_of([(4.0, 1), (2.0, 5)]).sum(0))) == 1.0
    with pytest.raises(InternalError, match="nats is measured by likelihood"):
        NATS.statistics([""], [{}])
