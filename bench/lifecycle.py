"""The life of a note on the real base, by commands: judged, refused, published, served, changed, rolled back.

Trains a note that is over-trained on purpose, which the gate must refuse. A guarded run of bench/evidence.py is
published; cut to a small rank it takes its own place. Every step is a `postil` command in a process of its own; an
answer other than the expected one ends with an error. Writes bench/results/lifecycle.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evidence import laid, questions, rows_of
from main_job import BASE, machine, test_set
from postil.files import write_json, write_text
from postil.registry import Registry
from postil.registry.cache import versions_directory

HERE = Path(__file__).parent
QUESTIONS = 24
SECOND_RANK = 2  # half the rank of 64 gave the same answers to 8 questions, which a roll-back would not show
ROWS, TOKENS = 100, 8192  # that each adapter is judged on
RATE, TRAIN_ROWS = 0.01, 300  # ten times the rate that is good for these rows


def postil(*words: str | Path) -> tuple[int, str, str]:
    """A command's exit code, what it printed and what it said."""
    done = subprocess.run([sys.executable, "-m", "postil", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def done(*words: str | Path) -> str:
    """What a command that must succeed printed."""
    code, out, said = postil(*words)
    if code:
        raise SystemExit(f"{' '.join(map(str, words))}: {said}")
    return out


def judge(adapter: Path, target: Path, general: Path) -> str:
    """Give the adapter a card, of fewer rows than the evidence's; what it says in a sentence."""
    settings = ("metrics=[bleu]", f"limit={ROWS}", "max_new_tokens=80", "batch=64", f"general.tokens={TOKENS}")
    said = done(
        "judge", adapter, "--base", BASE, "--target", target, "--general", general,
        *set_(settings),
    )  # fmt: skip
    return said.strip().splitlines()[-1]


def set_(settings: tuple[str, ...]) -> list[str]:
    """Settings as words of a command."""
    return [word for setting in settings for word in ("--set", setting)]


def expect(what: str, found: object, wanted: object) -> None:
    """Stop where a step did not do what it must."""
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}")


def changed(path: Path) -> None:
    """One bit of the file's middle byte turned over."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def main() -> None:
    """Run all steps and write what each one said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence/e2e_nlg"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--guarded", default="guard_r64_kl_0.5")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        over, train, test = place / "over", place / "train.jsonl", place / "test.jsonl"
        laid(train, rows_of(given.data / "e2e_nlg/train.jsonl.gz", TRAIN_ROWS))
        laid(test, questions(rows_of(given.data / "e2e_nlg/test.jsonl", None)))
        settings = (f"training.learning_rate={RATE}", "rows.format=raw", "dtype=bfloat16", "valid_share=0")
        done("train", "--base", BASE, "--data", train, "--out", over, *set_(settings))
        first = shutil.copytree(given.runs / given.guarded / "run/adapter", place / "first")
        second = place / "second"
        done("shrink", first, "--rank", str(SECOND_RANK), "--out", second)
        notes = {"over": over / "adapter", "first": first, "second": second}
        general = given.data / "general/wikitext2_test.jsonl"
        said = {name: judge(adapter, test, general) for name, adapter in notes.items()}
        asked = test_set(given.data)[0][:: 630 // QUESTIONS]
        result = {"judged": said} | lived(place, over / "adapter", first, second, asked)
    write_json(HERE / "results/lifecycle.json", {"runs": vars(given) | {"runs": "", "data": ""}, **result,
                                                 "machine": machine()})  # fmt: skip
    print(json.dumps(result, indent=1))


def lived(place: Path, over: Path, first: Path, second: Path, prompts: list[str]) -> dict[str, Any]:
    """The steps in a registry at `place`; what each one said."""
    registry = place / "notes"
    requests = place / "requests.jsonl"
    write_text(
        requests, "".join(json.dumps({"prompt": p + "\n", "adapter": "note", "stop": ["\n"]}) + "\n" for p in prompts)
    )

    def answers(adapter: str | Path, where: Path = registry) -> list[str]:
        out = done(
            "generate", "--base", BASE, "--requests", requests, "--adapter", f"note={adapter}", "--registry", where,
            "--raw", "-n", "40",
        )  # fmt: skip
        return [json.loads(line)["text"] for line in out.removesuffix("\n").split("\n")]

    def publish(adapter: Path) -> tuple[int, str]:
        code, out, said = postil(
            "publish", adapter, "--as", "restaurants", "--registry", registry, "--json", place / "gate.json",
            "--junit", place / "gate.xml",
        )  # fmt: skip
        return code, " ".join((said or out).split())

    code, refusal = publish(over)
    expect("publishing the over-trained run", code, 3)
    verdict = json.loads((place / "gate.json").read_text(encoding="utf-8"))
    junit = "<failure" in (place / "gate.xml").read_text(encoding="utf-8")
    expect("the refusal's JUnit", junit, True)
    served = []
    for adapter in (first, second):
        code, said = publish(adapter)
        expect(f"publishing {adapter} ({said})", code, 0)
        served.append(answers("restaurants@live"))
    if served[0] == served[1]:
        raise SystemExit("the two versions give equal answers, so a roll-back would show nothing")
    code, _, said = postil("registry", "rollback", "restaurants", "--registry", registry)
    expect(f"rollback ({said})", code, 0)
    expect("answers after the roll-back", answers("restaurants@live"), served[0])
    refused = {}
    version = Registry(registry).version("restaurants@live")
    for file in ("adapter_model.safetensors", "postil.json"):
        copy = place / f"changed_{file}"
        shutil.copytree(registry, copy)
        changed(copy / "blobs" / version.files[file])
        expect("answers of bytes fetched before", answers("restaurants@live", copy), served[0])
        shutil.rmtree(versions_directory() / version.digest)  # as on a machine that has not fetched it yet
        code, _, said = postil(
            "generate", prompts[0], "--base", BASE, "--adapter", "restaurants@live", "--registry", copy, "--raw"
        )
        expect(f"a changed byte in {file} ({said})", code, 2)
        refused[file] = " ".join(said.replace(str(copy), "REGISTRY").split())
        expect("answers of the registry itself", answers("restaurants@live"), served[0])
    return {
        "refusal": {"exit": 3, "said": refusal.replace(str(place), "PLACE"), "json": verdict, "junit": junit},
        "answers": {"first": served[0][:3], "second": served[1][:3], "after roll-back": "equal to the first's"},
        "changed byte": refused,
    }


if __name__ == "__main__":
    main()
