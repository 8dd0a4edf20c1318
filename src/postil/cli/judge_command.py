"""postil judge: base and adapter side by side, as a table, one sentence, and the gate's answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.words import Code
from postil.errors import JudgeError

if TYPE_CHECKING:
    from rich.text import Text

    from postil.judging.card.model import Comparison, Part, ScoreCard
    from postil.judging.job import Watch

_STYLES = {"better": "green", "worse": "red"}
_SLICES = 10  # that the table shows; all are in the card


def judge(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory, or a fine-tuned model's.")],
    base: Annotated[str, typer.Option("--base", "-b", help="Model directory, known base, hub name, GGUF.")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Held-out rows of its task.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Measures of answers, a,b (docs/judging.md); the first decides (else the rows)."),
    ] = None,
    general: Annotated[
        str, typer.Option(help='Rows {"text"} of what must not get worse; none leaves it out.')
    ] = "shipped",
    chat: Annotated[
        str, typer.Option(help='Rows {"prompt"} to answer as the base does; none leaves them out.')
    ] = "shipped",
    choices: Annotated[str | None, typer.Option(help='Rows {"context", "choices", "answer"}.')] = None,
    pairs: Annotated[str | None, typer.Option(help='Rows {"good", "bad"}: minimal pairs.')] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval (an extra), a,b, or a task's YAML.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples in the base's few-shot prompt (4 where --train is known).")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="The rows it learned, for examples and baselines (else its recipe's).")
    ] = None,
    slices: Annotated[str | None, typer.Option(help="Columns to look at value by value, a,b.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="task: the adapter is only ever asked its own task (else assistant).")
    ] = None,
    null: Annotated[int, typer.Option(help="Random adapters of equal norm: the noise floor.")] = 0,
    curve: Annotated[bool, typer.Option("--curve", help="Scale the adapter's term from 0 to 1.25.")] = False,
    leakage: Annotated[
        str | None, typer.Option(help="Training rows, tried for what comes back word for word.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL.")] = None,
    gate: Annotated[
        str | None, typer.Option(help='Refuse (exit 3) unless this holds: an expression, or "default".')
    ] = None,
    live: Annotated[
        Path | None, typer.Option(help="The judged adapter in service, `live` in the expression.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write card and gate as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gate's answer as JUnit XML.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key, e.g. rows.format=raw.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    quant: Annotated[str | None, typer.Option(help="nf4 holds the base in 4 bits.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    keep: Annotated[bool, typer.Option(help="Put the score card into the adapter's postil.json.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Take an adapter made for another base.")] = False,
    trust_remote_code: Code = False,
) -> None:
    """Judge an adapter beside its base: on its task, and on what it should not have lost.

    A verdict is better, no evidence or worse, by a paired bootstrap; the score card goes into postil.json.
    Example: postil judge runs/support/adapter --base smollm2-135m-instruct --target test.jsonl
    """
    from postil.base import load_base
    from postil.files import write_json, write_text
    from postil.judging.gate.gate import DEFAULT, check, refusal
    from postil.judging.judge import judge as run
    from postil.judging.options import SCALES, JudgeOptions
    from postil.reporting.report import write_beside
    from postil.settings import with_settings

    flags: dict[str, Any] = {
        "metrics": _words(metrics), "slices": _words(slices), "null": null,
        "curve": SCALES if curve else (), "scope": scope,
    }  # fmt: skip
    if lm_eval is not None:
        flags["lm_eval"] = {"tasks": _words(lm_eval)}
    given = {key: value for key, value in flags.items() if value} | ({"shots": shots} if shots is not None else {})
    values = with_settings(given, set_ or [])
    options = JudgeOptions.parse(values)
    expression = DEFAULT if gate == "default" else gate
    in_service = _checked(expression, live, junit)
    opened = load_base(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quant=quant)
    with _progress() as watch:
        card = run(
            opened, adapter, target=target, general=None if general == "none" else general,
            chat=None if chat == "none" else chat, choices=choices, pairs=pairs, train=train, leaks=leakage,
            options=options, gate=expression, predictions=predictions, watch=watch, keep=keep, force=force,
        )  # fmt: skip
    _print(card)
    result = check(card, expression, in_service) if expression is not None else None
    if json_ is not None:
        told = {"score_card": card.model_dump(mode="json"), "gate": result.as_dict() if result is not None else None}
        write_json(json_, told)
    if result is not None and junit is not None:
        write_text(junit, result.junit(str(adapter)))
    page = write_beside(adapter, predictions=predictions) if keep else None  # last: what scripts read is written
    if page is not None:
        console.note(f"report: {page}")
    if result is None:
        return
    if not result.passed:
        raise refusal(result)
    console.out.print(result.sentence, markup=False, soft_wrap=True)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _checked(expression: str | None, live: Path | None, junit: Path | None) -> ScoreCard | None:
    """The card of the version in service; what is wrong with the gate's flags is said before the work."""
    from postil.judging.card.file import read_card
    from postil.judging.gate.expression import parse

    if expression is None:
        for flag, given in (("--junit", junit), ("--live", live)):
            if given is not None:
                raise JudgeError(f"{flag} is about the gate; give --gate too, for example --gate default")
        return None
    parse(expression)
    if live is None:
        return None
    card = read_card(live)
    if card is None:
        raise JudgeError(f"{live} holds no score card to compare with; judge it first: postil judge {live}")
    return card


@contextmanager
def _progress() -> Iterator[Watch]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console.err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def watch(event: dict[str, Any]) -> None:
            phase = event["phase"]
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=event["total"])
            bar.update(tasks[phase], completed=event["done"], total=event["total"])

        yield watch


def _print(card: ScoreCard) -> None:
    from postil.judging.gate.margins import bound
    from postil.reporting.card_page import most_of
    from postil.reporting.card_words import sentence

    parts = {"target": card.target} if card.target is not None else {}
    parts |= {f"general.{name}": part for name, part in card.general.items()}
    few = any(part.few_shot for part in parts.values())
    spread = any(measure.z is not None for part in parts.values() for measure in part.measures.values())
    heads = [
        "measure",
        "base",
        *(["few-shot"] if few else []),
        "adapter",
        "difference",
        "verdict",
        "allowed",
        "visible from",
    ]
    table = [[*heads, *(["z"] if spread else [])]]
    for path, part in parts.items():
        for name, measure in part.measures.items():
            shown = path if name == part.main and path != "target" else f"{path}.{name}"
            most, told = most_of(path, part, name), part.told(name)
            table.append([shown, *_cells(measure, part, name, told, few, spread, most)])
        for shown, measure in _worst_slices(path, part):
            most = bound(path.removeprefix("general."), part.main, measure, sliced=True)
            table.append([shown, *_cells(measure, part, "", measure.told, few, spread, most)])
    for row in _aligned(table):
        console.out.print(row, soft_wrap=True)
    for line in [*_lines(card), *card.notes]:
        console.out.print(line, markup=False, soft_wrap=True, style="dim")
    console.out.print(sentence(card), markup=False, soft_wrap=True)


def _aligned(table: list[list[str]]) -> Iterator[Text]:
    """The table's lines, never folded or cut: a narrow terminal breaks them where it must, a pipe gets them whole."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        line = Text(style="bold" if number == 0 else "")
        for cell, width in zip(row, widths, strict=True):
            line.append(cell, _STYLES.get(cell, "")).append(" " * (width - len(cell) + 2))
        line.rstrip()
        yield line


def _cells(m: Comparison, part: Part, name: str, told: str, few: bool, spread: bool, most: str) -> list[str]:
    digits = 1 if m.unit in ("%", "points") else 4
    shot = part.few_shot.get(name)
    return [
        f"{m.base.value:.{digits}f}",
        *([f"{shot.value:.{digits}f}" if shot is not None else ""] if few else []),
        f"{m.adapter.value:.{digits}f}",
        f"{m.difference.value:+.{digits}f} ({m.difference.low:+.{digits}f} to {m.difference.high:+.{digits}f})",
        told,
        most,
        "too few rows" if m.too_few else f"{m.detectable:.{digits}f} {m.unit}",
        *([f"{m.z:+.1f}" if m.z is not None else ""] if spread else []),
    ]


def _worst_slices(path: str, part: Part) -> list[tuple[str, Comparison]]:
    """The main measure of the slices that fare worst."""
    found = [
        (f"{path}.{column}={value}", measures[part.main])
        for column, values in part.slices.items()
        for value, measures in values.items()
    ]
    found.sort(key=lambda one: one[1].difference.value * (1 if one[1].better == "higher" else -1))
    return found[:_SLICES]


def _lines(card: ScoreCard) -> Iterator[str]:
    """What the table does not hold: the sets, the curve, baselines, leakage."""
    from postil.reporting.card_page import baseline_line

    sets = {"target": card.target, **card.general}
    for name, part in sets.items():
        if part is not None and name != "kl":
            tokens = f", {part.data.tokens:,} tokens" if part.data.tokens is not None else ""
            shots = f"; few-shot: the base with {part.shots} examples" if part.shots else ""
            yield f"{name}: {part.data.name}, {part.counted}{tokens}{shots}"
    if card.null_adapters:
        yield f"z: in units of the spread of {card.null_adapters} random adapters of equal norm"
    for point in card.curve:
        values = {"target": point.target, "target nats": point.target_nats, "general nats": point.general_nats}
        told = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
        yield f"scale {point.scale:g}: {told}"
    for name, part in sets.items():
        if part is not None and (line := baseline_line(part)):
            yield f"{name}: {line}"
    if card.leakage is not None:
        found = card.leakage
        told = f"adapter {found.adapter.value:.1f}%, base {found.base.value:.1f}%"
        told += f", adapter on rows it never saw {found.held_out.value:.1f}%" if found.held_out is not None else ""
        rows = f"; rows {', '.join(map(str, found.worst_rows))}" if found.worst_rows else ""
        yield f"leakage ({found.matched_tokens} tokens word for word, {found.rows} training rows): {told}{rows}"
