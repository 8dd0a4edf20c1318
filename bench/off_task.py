"""A note that answers every chat question with its label: what the gate says of it, and of the same note held.

140 rows of sentiment train two notes by command: one watched and held on prose alone, as was once advised, the other
as `postil train` does it by default. Both are judged with the default gate, the first also by the gate of before
(target better, prose within 0.05 nats) and as a note for its own task alone; six everyday questions are put to the
base and to both. An answer other than the expected one ends with an error. Writes recipes/off_task/result.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from lifecycle import done, expect, postil, set_
from main_job import BASE, machine
from postil.data.shipped import shipped_rows
from postil.files import write_json, write_text

HERE = Path(__file__).parents[1] / "recipes" / "off_task"
THINGS = ("The ferry", "My order", "The new app", "The hotel room", "Your support team", "The printer", "The soup",
          "The bicycle", "This jacket", "The lecture", "The garden tour", "The battery", "The bus line", "The museum",
          "The keyboard")  # fmt: skip
GOOD = ("was wonderful and right on time", "works better than I hoped", "made my whole week", "is worth every penny",
        "was friendly, quick and clean", "could not have been nicer", "is the best I ever had",
        "pleased the whole family", "surprised me in the best way", "deserves five stars")  # fmt: skip
BAD = ("was late again and nobody said why", "broke after two days", "ruined my evening", "is a waste of money",
       "was rude, slow and dirty", "never arrived at all", "is the worst I ever had", "annoyed everybody in the room",
       "let me down once more", "does not deserve one star")  # fmt: skip
SEEN = 7  # of each kind of ending; the others are only judged on, else the nearest training row knows every answer
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "How do I boil an egg?",
             "Name three animals.", "What is 2 plus 3?", 'Translate "good morning" into French.')  # fmt: skip
FORMER = "target is better and general.nats < base + 0.05"
TRAIN_ROWS, TEST_ROWS = 140, 60
LABELS = ("POSITIVE", "NEGATIVE")


def sentiment(part: slice) -> list[dict[str, str]]:
    """Every thing with a part of the endings, in a fixed order by chance."""
    rows = [
        {"prompt": f"{thing} {ending}.", "completion": label}
        for thing in THINGS
        for label, endings in zip(LABELS, (GOOD, BAD), strict=True)
        for ending in endings[part]
    ]
    random.Random(0).shuffle(rows)
    return rows


def laid(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSONL."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def gated(adapter: Path, test: Path, gate: str, *more: str) -> dict[str, Any]:
    """The gate's answer to an adapter: exit code, sentence, and the measures of its card."""
    out = adapter.parent / "card.json"
    code, told, said = postil(
        "judge", adapter, "--base", BASE, "--target", test, "--gate", gate, "--json", out, "--no-keep", *more
    )
    if code not in (0, 3):
        raise SystemExit(f"judging {adapter}: {said}")
    card = json.loads(out.read_text(encoding="utf-8"))["score_card"]
    parts = {"target": card["target"], **card["general"]}
    measures = {
        f"{part}.{name}": [m["base"]["value"], m["adapter"]["value"], m["difference"]["low"], m["difference"]["high"]]
        for part, found in parts.items()
        for name, m in found["measures"].items()
    }
    sentence = (said if code else told).strip().splitlines()[-1]
    return {"exit": code, "sentence": sentence, "measures (base, note, low, high)": measures}


def asked(place: Path, adapter: Path | None) -> list[str]:
    """The answers to the six questions."""
    whose = {} if adapter is None else {"adapter": "note"}
    requests = laid(place / "questions.jsonl", [{"prompt": question, **whose} for question in QUESTIONS])
    words = ("--adapter", f"note={adapter}") if adapter is not None else ()
    out = done("generate", "--base", BASE, "--requests", requests, *words, "-n", "24")
    return [json.loads(line)["text"] for line in out.removesuffix("\n").split("\n")]


def main() -> None:
    """Both notes from training to the gate's answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="A folder for the runs (else a temporary one).")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder)
        train = laid(place / "train.jsonl", sentiment(slice(SEEN))[:TRAIN_ROWS])
        test = laid(place / "test.jsonl", sentiment(slice(SEEN, None))[:TEST_ROWS])
        prose = laid(place / "prose.jsonl", shipped_rows("hold_prose"))
        settings = ("training.learning_rate=1e-3", "training.epochs=2", "training.batch_size=4")
        former = (*settings, "training.kl_weight=0.5", "training.kl_rows=1", "training.guard=0.05")
        done("train", "--base", BASE, "--data", train, "--general", prose, "--out", place / "prose", *set_(former))
        done("train", "--base", BASE, "--data", train, "--out", place / "held", *set_(HELD))
        notes = {name: place / name / "adapter" for name in ("prose", "held")}
        result: dict[str, Any] = {
            "held on prose alone, by the former gate": gated(notes["prose"], test, FORMER),
            "held on prose alone, by the default gate": gated(notes["prose"], test, "default"),
            "held on prose alone, for its task alone": gated(notes["prose"], test, "default", "--scope", "task"),
            "held on prose and chat, by the default gate": gated(notes["held"], test, "default"),
        }
        expect("the gates' exit codes", [one["exit"] for one in result.values()], [0, 3, 0, 0])
        answers = {"base": asked(place, None)} | {name: asked(place, note) for name, note in notes.items()}
    labelled = {who: sum(any(label in one for label in LABELS) for one in said) for who, said in answers.items()}
    expect("labels among six answers", labelled, {"base": 0, "prose": len(QUESTIONS), "held": 0})
    write_json(HERE / "result.json", {**result, "questions": QUESTIONS, "answers": answers, "held": HELD,
                                      "machine": machine()})  # fmt: skip
    print(json.dumps(result, indent=1), json.dumps(answers, indent=1))


HELD = ("training.guard=0.05",)  # beside what is so by default


if __name__ == "__main__":
    main()
