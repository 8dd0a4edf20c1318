"""Tables of what was measured, from the JSON of recipes/ and bench/results/: the parts of docs/evidence.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
TEST, VALID = "wikitext2_test_32768x1024", "wikitext2_valid_16384x512"
Json = dict[str, Any]


def read(path: Path) -> Json:
    """A result file."""
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]) + "\n"


def main_job() -> str:
    """BLEU and general damage of each run of the main job, PEFT's at the same settings beside ours."""
    folder = ROOT / "recipes/main_job"
    base = read(folder / "base.json")
    better = max(base["zero_shot"]["bleu_630"], base["five_shot"]["bleu_630"])
    rows: list[list[object]] = []
    for kind in ("zero_shot", "five_shot"):
        one = base[kind]
        name = f"base, {kind.replace('_', '-')}"
        rows.append([name, "", "", "", f"{one['bleu_630']:.1f}", "", f"{one['bleu_200']:.1f}", "0", "0", ""])
    for path in sorted(folder.glob("*.json")):
        if path.stem == "base":
            continue
        one = read(path)
        training = one["recipe"]["training"]
        row: list[object] = [
            path.stem.replace(".peft", ", by PEFT").replace(".torch", ", by torch"), one["recipe"]["rows"],
            f"{training['learning_rate']:g}", f"{one['valid_nats']:.3f}",
        ]  # fmt: skip
        if "bleu_630" in one:
            row += [
                f"{one['bleu_630']:.1f}",
                f"{one['bleu_630'] - better:+.1f}",
                f"{one['bleu_200']:.1f}" if "bleu_200" in one else "",
            ]
            row += [f"{one['general'][key] - base['general'][key]:+.3f}" for key in (TEST, VALID)]
        else:
            row += [""] * 5
        rows.append([*row, f"{one['train_seconds']:.0f}"])
    heads = ("run", "rows", "learning rate", "valid nats", "BLEU, 630", "over the better base", "BLEU, 200",
             "general, test", "general, valid", "seconds")  # fmt: skip
    return markdown(heads, rows)


def shown(comparison: Json) -> str:
    """A measure's adapter value with its difference from the base and that difference's interval."""
    gap = comparison["difference"]
    digits = 3 if "nats" in comparison["unit"] else 1
    inner = f"{gap['value']:+.{digits}f}, {gap['low']:+.{digits}f} to {gap['high']:+.{digits}f}"
    return f"{comparison['adapter']['value']:.{digits}f} ({inner})"


def evidence() -> str:
    """A table for each set of recipes/evidence that has a result."""
    parts = []
    for folder in sorted((ROOT / "recipes/evidence").iterdir()):
        results = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
        if results:
            parts.append(evidence_set(folder, results))
    return "\n".join(parts) or "No run of a set has been made yet.\n"


def cost(result: Json) -> str:
    """Seconds of the steps, with the share that the KL took, and those of the guard's looks."""
    found = result.get("costs")
    if found is None:
        return f"{result['train_seconds']:.0f}"
    text = f"{found['seconds']:.0f}"
    if found["kl_seconds"]:
        text += f", KL {found['kl_seconds'] / found['seconds']:.0%} of them"
    return text + (f", and {found['watch_seconds']:.0f} watching" if found["watch_seconds"] else "")


def evidence_set(folder: Path, results: dict[str, Json]) -> str:
    """One set: what it is, the bare base, then every run; intervals are of the difference from the base."""
    lead = [
        line.removeprefix("#").strip()
        for line in (folder / "common.yaml").read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ]
    refused = {name: result for name, result in results.items() if "refused" in result}
    results = {name: result for name, result in results.items() if name not in refused}
    first = next(iter(results.values()))["card"]
    columns = [("target", name) for name in first["target"]["measures"]]
    columns += [(part, name) for part, one in first["general"].items() for name in one["measures"]]

    def measure(card: Json, part: str, name: str) -> Json | None:
        inner = card["target"] if part == "target" else card["general"].get(part)
        found: Json | None = (inner or {}).get("measures", {}).get(name)
        return found

    rows: list[list[object]] = []
    for form in sorted({result["card"]["base"]["form"] for result in results.values()}):
        cards = [result["card"] for result in results.values() if result["card"]["base"]["form"] == form]
        row: list[object] = [f"bare base, {form}"]
        for part, name in columns:
            one = next((found for card in cards if (found := measure(card, part, name))), None)
            few = next((found for card in cards if part == "target"
                        and (found := card["target"]["few_shot"].get(name))), None)  # fmt: skip
            digits = 3 if one and "nats" in one["unit"] else 1
            cell = f"{one['base']['value']:.{digits}f}" if one else ""
            row.append(cell + (f"; few-shot {few['value']:.{digits}f}" if few else ""))
        rows.append([*row, "", "", ""])
    few_shots = [result["card"]["target"]["few_shot"].get(first["target"]["main"]) for result in results.values()]
    best_few = max((found["value"] for found in few_shots if found), default=0.0)
    for name, result in results.items():
        cells = [measure(result["card"], *column) for column in columns]
        main = result["card"]["target"]["measures"][result["card"]["target"]["main"]]
        gain = main["adapter"]["value"] - max(main["base"]["value"], best_few)
        rows.append([name, *(shown(cell) if cell else "" for cell in cells), f"{gain:+.1f}", main["verdict"],
                     cost(result)])  # fmt: skip
    for name, result in refused.items():
        rises = sorted(look["general_rise"] for look in result["looks"])
        told = (
            f"no note: {len(rises)} states measured, {rises[0]:+.3f} to {rises[-1]:+.3f} nats, none within the guard"
        )
        rows.append([name, told, *[""] * len(columns), "refused", cost(result)])
    heads = ["run", *(f"{part} {name}" if part != name else part for part, name in columns),
             f"{first['target']['main']} over the better base", "target", "seconds"]  # fmt: skip
    shown_in = f"![Gain against damage](img/{folder.name}.svg)"
    return f"### {folder.name}\n\n{' '.join(lead)}\n\n{shown_in}\n\n{markdown(heads, rows)}"


def many_tasks() -> str:
    """The default of the half not chosen on beside the best point of its grid, task by task, then the medians."""
    found = [read(path) for path in sorted((ROOT / "recipes/many_tasks").glob("*.json"))]
    done = [one for one in found if one["half"] == "B" and "default" in one and one["grid"]]
    if not done:
        return "No task of the half not chosen on has been run yet.\n"
    plain, points = [one["default"] for one in done], [list(one["grid"].values()) for one in done]
    best = [max(group, key=lambda point: (point["score"], -point["valid_loss"])) for group in points]
    seen = [min(group, key=lambda point: point["valid_loss"]) for group in points]
    pairs = list(zip(plain, best, strict=True))
    columns: dict[str, tuple[str, list[float]]] = {
        "default": (".1f", [one["score"] for one in plain]),
        "grid's best": (".1f", [one["score"] for one in best]),
        "default less best": ("+.1f", [one["score"] - other["score"] for one, other in pairs]),
        "grid, by held-out loss": (".1f", [one["score"] for one in seen]),
        "WikiText, default": ("+.3f", [one["wikitext_rise"] for one in plain]),
        "WikiText, best": ("+.3f", [one["wikitext_rise"] for one in best]),
        "seconds, default": (".0f", [one["seconds"] for one in plain]),
        "seconds, best": (".0f", [one["seconds"] for one in best]),
        "seconds, all points": (".0f", [sum(one["seconds"] for one in group) for group in points]),
    }
    rows: list[list[object]] = [
        [one["task"], one["metric"], _judged(one), f"{top['rate']:g} × {top['epochs']}, of {len(one['grid'])} points",
         *(f"{values[n]:{form}}" for form, values in columns.values())]
        for n, (one, top) in enumerate(zip(done, best, strict=True))
    ]  # fmt: skip
    rows.append(["median", "", "", "", *(f"{median(values):{form}}" for form, values in columns.values())])
    near = sum(gap >= -5 for gap in columns["default less best"][1])
    whole = sum("grid_done" in one for one in done)
    told = (
        f"{len(done)} of the half's 25 tasks, {whole} with their whole grid; on {near} the default lies within 5 "
        "points of the best point that was run."
    )
    for settings in sorted({" ".join(one["set"]) for one in plain if one["set"]}):
        told += f" Not by the plain command, but with `--set {settings}`: " + ", ".join(
            one["task"] for one in done if " ".join(one["default"]["set"]) == settings
        )
    return f"{told}\n\n{markdown(('task', 'measure', 'judged', 'best at', *columns), rows)}"


def _judged(one: Json) -> str:
    """A verdict with the best baseline that needs no learning, or nothing."""
    found = one.get("verdict")
    return f"{found['verdict']}; {found['baseline']} {found['baseline_value']:.1f}" if found else ""


def benches() -> str:
    """The figures of bench/results that stand by themselves."""
    mixed, kill = (read(ROOT / f"bench/results/{name}.json") for name in ("mixed_batch", "kill"))
    equality = mixed["equality"]
    rows: list[list[object]] = [
        ["mixed batch: decisions that differ from the merged solo run", "`bench/mixed_batch.py`",
         f"{equality['differences']} of {equality['positions']:,}, {equality['near_ties']} near ties"],
        ["32 requests together over 32 one by one", "`bench/mixed_batch.py`", f"{mixed['ratio']:.3f}"],
        ["kill -9, resumed: bytes equal the unbroken run's", "`bench/kill.py`",
         f"{'all' if kill['equal'] else 'not all'} of {kill['kills']} kills"],
    ]  # fmt: skip
    life = read(ROOT / "bench/results/lifecycle.json")
    rows += [
        ["the over-trained note at the default gate", "`bench/lifecycle.py`",
         f"exit {life['refusal']['exit']}: {life['refusal']['json']['sentence']}"],
        ["a guarded note, then it at rank 2, published; answers after a roll-back", "`bench/lifecycle.py`",
         life["answers"]["after roll-back"]],
        ["one bit of weights or card changed", "`bench/lifecycle.py`", f"{len(life['changed byte'])} of 2 refused"],
    ]  # fmt: skip
    plan = ROOT / "bench/results/plan.json"
    if plan.is_file():
        for name, case in read(plan)["cases"].items():
            rows.append([f"planned over measured peak of memory, {name}", "`bench/plan_memory.py`",
                         f"{case['ratio']:.3f}"])  # fmt: skip
    return markdown(("what", "command", "measured"), rows)


def off_task() -> str:
    """What the gates say of a note that answers all with its label, and of the same note held to chat."""
    told = read(ROOT / "recipes/off_task/result.json")
    names = {
        "target.accuracy": "accuracy, %", "nats.nats": "prose, nats", "chat.nats": "chat, nats",
        "chat.kl": "chat, KL", "chat.same_start": "begins as the base, %", "chat.alike": "one same answer, %",
    }  # fmt: skip
    rows = []
    for name, one in told.items():
        if isinstance(one, dict) and "exit" in one:
            found = one["measures (base, note, low, high)"]
            values = [f"{found[path][0]:.3g} → {found[path][1]:.3g}" for path in names]
            rows.append([name, "refused" if one["exit"] else "passed", *values])
    return markdown(("note and gate", "", *names.values()), rows)
