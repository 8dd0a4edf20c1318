"""postil train: a recipe or a few flags in, an adapter in PEFT's format out."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.words import Code

if TYPE_CHECKING:
    from postil.training import Job, Outcome, Recipe


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; flags below override it.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Model directory, known base, hub name, GGUF.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Training rows: JSONL, Parquet or a hub name.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's directory.")] = None,
    valid: Annotated[str | None, typer.Option(help="Held-out rows (else a seeded 5%).")] = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora (lora on a 4-bit base) or full.")] = None,
    quant: Annotated[str | None, typer.Option(help="nf4: hold the base in 4 bits.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="The peak.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    guard: Annotated[
        float | None, typer.Option(help="Keep a state at most this far above the base in general nats per token.")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help='Rows {"text"} or {"prompt"} of what must stay good (else the shipped ones).')
    ] = None,
    from_adapter: Annotated[str | None, typer.Option(help="Continue from an adapter's values.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key, e.g. lora.r=16.")] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Put bad lines into DATA.bad.jsonl and go on.")
    ] = False,
    trust_remote_code: Code = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
) -> None:
    """Train an adapter beside a frozen base (or, with --method full, the whole base).

    A run that was stopped or killed goes on when the same command is given again. With --guard, general prose and
    chat are measured at every validation and the best state that leaves both whole is kept.
    Example: postil train --base smollm2-135m-instruct --data train.jsonl --out runs/support
    """
    from postil.settings import with_settings
    from postil.training import Recipe, read_recipe

    values: dict[str, Any] = read_recipe(recipe) if recipe is not None else {}
    flags = {"base": base, "data": data, "valid": valid, "from_adapter": from_adapter, "out": out and str(out),
             "trust_remote_code": trust_remote_code or None, "quant": quant,
             "general": general}  # fmt: skip
    values |= {key: value for key, value in flags.items() if value is not None}
    inner = {"method": method, "learning_rate": learning_rate, "epochs": epochs, "guard": guard}
    _override(values, "training", {key: value for key, value in inner.items() if value is not None})
    _override(values, "rows", {"skip_bad_lines": True} if skip_bad_lines else {})
    values.setdefault("out", f"runs/{Path(str(values.get('data', 'run'))).name.split('.')[0]}")
    plan = Recipe.parse(with_settings(values, set_ or []))
    job = _prepared(plan)
    _tell(job)
    if dry_run:
        console.note(f"about {job.seconds() / 60:.1f} minutes on this machine; nothing was trained")
        return
    outcome = _with_progress(job)
    _finish(job, outcome)


def _prepared(plan: Recipe) -> Job:
    """The job, with a line where the base is asked for its own answers first."""
    from rich.progress import Progress

    from postil.training import prepare

    with Progress(console=console.err, transient=True) as bar:
        task = bar.add_task("the base answers the general chat prompts, once", visible=False)
        return prepare(plan, lambda done, total: bar.update(task, completed=done, total=total, visible=True))


def _override(values: dict[str, Any], group: str, flags: dict[str, Any]) -> None:
    """Flags over a group of a recipe's keys; what is no group there is left for the recipe's own check."""
    here = values.get(group) or {}
    values[group] = here | flags if isinstance(here, dict) else here


def _tell(job: Job) -> None:
    options = job.options
    for dataset in (job.dataset, job.held_out):
        for line in dataset.report.lines() if dataset is not None else []:
            console.note(line)
    for line in job.general_lines():
        console.note(line)
    for line in getattr(job.model, "notes", []):
        console.warn(line)
    if options.method != "full":
        for line in job.model.coverage("default").lines():
            console.note(line)
    for line in job.why:
        console.note(line)
    steps = options.total_steps(len(job.training))
    warmup = options.warmup_steps(steps)
    length = f"{options.steps} steps" if options.steps else f"{options.epochs} epoch(s)"
    held_out = f"{len(job.valid)} held out"
    if job.valid:
        held_out += f" ({options.valid_rows} of them measured every {options.valid_every} step(s))"
    console.note(
        f"{options.method}: learning rate {options.learning_rate:g}, {options.schedule}, warm-up over {warmup} of "
        f"{steps} steps, batch of {options.batch_size} rows, {length}; {len(job.training)} rows learned, "
        f"{held_out}; base in {'nf4 and ' * job.base.quantised}{job.base.dtype} on {job.base.device}"
    )
    if steps < 2 * warmup:
        console.warn(
            f"{warmup} of the run's {steps} steps are warm-up, while the rate still rises; "
            "train longer (--epochs), or make it a share: --set training.warmup=0.05"
        )


def _with_progress(job: Job) -> Outcome:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console.err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def watch(event: dict[str, Any]) -> None:
            rate = event["tokens"] / max(event["seconds"], 1e-9)
            text = f"loss {event['loss']:.3f}  {rate:,.0f} tokens/s"
            bar.update(task, total=event["total_steps"], completed=event["step"], description=text)
            measured = [f"held-out loss {event['valid_loss']:.4f}"] if "valid_loss" in event else []
            if "general_rise" in event:
                measured += [
                    f"{name} {event[rise]:+.4f} nats, KL {event[kl]:.4f}"
                    for name, rise, kl in (
                        ("general", "prose_rise" if "prose_rise" in event else "general_rise", "general_kl"),
                        ("chat", "chat_rise", "chat_kl"),
                    )
                    if rise in event
                ]
            if measured:
                bar.console.print(f"step {event['step']}: {', '.join(measured)}", style="dim")

        return job.run(watch, tell=lambda line: bar.console.print(f"note: {line}", style="yellow", markup=False))


def _finish(job: Job, outcome: Outcome) -> None:
    out = Path(job.recipe.out)
    if outcome.stopped:
        console.warn(f"stopped at step {outcome.steps} of {outcome.total_steps} and saved; go on with:")
        console.err.print(f"  postil train {shlex.quote(str(out / 'recipe.yaml'))}", markup=False, soft_wrap=True)
        raise typer.Exit(130)
    held = (
        "" if outcome.valid_loss is None else f", held-out loss {outcome.valid_loss:.4f} at step {outcome.best_step}"
    )
    done = "finished before" if math.isnan(outcome.loss) else f"last loss {outcome.loss:.4f}"
    console.note(f"{outcome.steps} steps, {done}{held}")
    console.out.print(str(out / ("model" if job.recipe.training.method == "full" else "adapter")), soft_wrap=True)
