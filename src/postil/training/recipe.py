"""A recipe: everything that decides a run, in one validated file; and the run that it describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from safetensors import SafetensorError

from postil.adapter import AdaptedModel, Adapter, LoraConfig, attach
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, load_base
from postil.base.quiet import quiet
from postil.base.stored import read_tensor, stored_tensors
from postil.data import DataOptions, Dataset, Sample, load_data, split_valid
from postil.data.shipped import SHIPPED
from postil.errors import PostilError, RecipeError
from postil.files import atomic_directory, write_json
from postil.settings import Settings
from postil.training.card import card_of, digests_of, earlier_rows, rows_seen
from postil.training.defaults import settled
from postil.training.directory import check_foreign, keep_recipe, only_trainer
from postil.training.documents import general_documents
from postil.training.general import Documents, split_general, wants_general
from postil.training.loop import Outcome, Watcher, check_form, refuse_untouched, run, seconds_per_run
from postil.training.options import Settled, TrainOptions


class Recipe(Settings):
    """What `postil train` runs. Keys: base, data, out, valid (or valid_share, a seeded share held out), dtype,
    device, quant (nf4: the base in 4 bits, which training.method qlora implies), trust_remote_code (let the base's
    directory run its own code), from_adapter (continue from an adapter's values), general (rows of text
    or chat prompts, in one file or several, that training.guard, kl_weight and general_share read, half of them to
    watch; null is what ships with postil), lora, rows (how the data is read), training."""

    where: ClassVar[str] = "recipe"

    base: str
    data: str
    out: str
    valid: str | None = None
    valid_share: float = Field(default=0.05, ge=0, lt=1)
    dtype: str = "auto"
    device: str = "auto"
    quant: Literal["nf4"] | None = None
    trust_remote_code: bool = False
    from_adapter: str | None = None
    general: str | list[str] | None = None
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig.parse({}))
    rows: DataOptions = Field(default_factory=DataOptions)
    training: TrainOptions = Field(default_factory=lambda: TrainOptions.parse({}))


@dataclass(slots=True)
class Job:
    """A recipe with its base, adapter and data loaded, ready to run.

    options: its training with all that was chosen from the data, and `why`, for the user.
    """

    recipe: Recipe
    options: Settled
    why: tuple[str, ...]
    base: Base
    model: AdaptedModel
    training: list[Sample]
    valid: list[Sample]
    dataset: Dataset
    held_out: Dataset | None = None  # where the recipe names a file of its own
    general: Documents = field(default_factory=Documents)
    earlier: Mapping[str, Any] | None = None  # rows that the adapter it goes on from has seen

    def run(self, watch: Watcher | None = None, tell: Callable[[str], None] = lambda _: None) -> Outcome:
        """Train, then write the adapter (or the model) into the run directory; see training.loop.run."""
        return _run(self, watch, tell)

    def seconds(self) -> float:
        """About how long `run` will take on this machine, from one step's gradients."""
        return seconds_per_run(self.model, self.training, "default", self.options, self.general)

    def general_lines(self) -> list[str]:
        """What is done with the general rows, in sentences; none where there are none."""
        if not len(self.general):
            return []
        return split_general(self.general, self.options, self.base).lines(self.options)

    def _card(self, outcome: Outcome) -> dict[str, Any]:
        """What is told of the training beside the weights."""
        trained = digests_of(self.dataset, self.training)
        held_out = digests_of(self.held_out or self.dataset, self.valid)
        return card_of(
            self.recipe.model_dump(mode="json"), outcome, self.dataset, samples=len(self.training),
            held_out=self.held_out, held_out_samples=len(self.valid), general=self.general,
            seen=rows_seen(trained, held_out, digests_of(self.general), self.earlier),
        )  # fmt: skip


def prepare(recipe: Recipe, answered: Callable[[int, int], None] = lambda done, total: None) -> Job:
    """Load everything that a recipe names. answered: told how many of the base's own answers to general chat prompts
    are there, of how many. Raises RecipeError for keys that exclude each other, and what the loaders raise."""
    plain = recipe.lora == LoraConfig()
    if recipe.from_adapter is not None and not plain:
        raise RecipeError("from_adapter brings the adapter's own configuration; leave the lora keys out")
    if recipe.training.method == "full" and (recipe.from_adapter is not None or not plain):
        raise RecipeError("training.method full trains every weight; leave lora and from_adapter out")
    if recipe.training.method == "full" and recipe.quant is not None:
        raise RecipeError("training.method full changes every weight, and 4-bit weights cannot be: leave quant out")
    base = load_base(
        recipe.base,
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        quant="nf4" if recipe.training.method == "qlora" else recipe.quant,
    )
    check_form(base, recipe.training)
    dataset = load_data(recipe.data, base, recipe.rows, side_directory=None)
    held_out = load_data(recipe.valid, base, recipe.rows) if recipe.valid is not None else None
    if held_out is not None:
        training, valid = dataset.samples, held_out.samples
    else:
        training, valid = split_valid(dataset.samples, recipe.valid_share, recipe.training.seed)
    model, earlier = attach(base), None
    general = Documents()
    if recipe.general is not None or (wants_general(recipe.training) and base.tokenizer is not None):
        general = general_documents(
            model, recipe.general or SHIPPED, skip_bad_lines=recipe.rows.skip_bad_lines, done=answered
        )
    if recipe.training.method != "full":
        source: LoraConfig | Adapter = recipe.lora
        if recipe.from_adapter is not None:
            source = load_adapter(recipe.from_adapter)
        attach(model, source, seed=recipe.training.seed)
        earlier = earlier_rows(model.resident("default"))
    now, why = _settled(recipe, base, training, valid, general)
    recipe = recipe.model_copy(update={"training": now})
    return Job(recipe, now, why, base, model, list(training), list(valid), dataset, held_out, general, earlier)


def _settled(
    recipe: Recipe, base: Base, training: list[Sample], valid: list[Sample], general: Documents
) -> tuple[Settled, tuple[str, ...]]:
    beside = split_general(general, recipe.training, base) if len(general) else None
    return settled(recipe.training, training, valid, beside)


def _run(job: Job, watch: Watcher | None, tell: Callable[[str], None]) -> Outcome:
    recipe, out = job.recipe, Path(job.recipe.out)
    fields = recipe.model_dump(mode="json")
    check_foreign(out)
    with only_trainer(out):
        keep_recipe(out, fields, partial(_normal, job))
        outcome = run(
            job.model, job.training, job.valid, general=job.general, out=out, name="default",
            options=job.options, watch=watch, tell=tell,
        )  # fmt: skip
        if outcome.stopped:
            return outcome
        refuse_untouched(outcome)
        again = outcome.begun == outcome.steps  # there was nothing left to do: what is written, stays, card and all
        if recipe.training.method == "full":
            if not (again and _holds_model(out / "model", job.base)):
                _save_model(job, out / "model", job._card(outcome))
            return outcome
        adapter = job.model.export("default")
        if not (again and _holds_adapter(out / "adapter", adapter)):
            adapter.card |= job._card(outcome)
            save_adapter(adapter, out / "adapter")
    return outcome


def _normal(job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with every key, what it leaves to the data chosen from the job's."""
    other: Recipe = Recipe.parse(values)
    now, _ = _settled(other, job.base, job.training, job.valid, job.general)
    return other.model_copy(update={"training": now}).model_dump(mode="json")


def _holds_adapter(directory: Path, adapter: Adapter) -> bool:
    """Whether a directory holds this adapter's values."""
    try:
        there = load_adapter(directory).tensors
    except PostilError:
        return False
    return there.keys() == adapter.tensors.keys() and all(
        there[key].equal(tensor) for key, tensor in adapter.tensors.items()
    )


def _holds_model(directory: Path, base: Base) -> bool:
    """Whether a directory holds this model's values, tensor by tensor."""
    own = dict(base.model.named_parameters(remove_duplicate=False))
    try:
        found = {tensor.name: tensor for tensor in stored_tensors(directory)}
        aliases = {name: value.data_ptr() for name, value in own.items()}
        if {value for name, value in aliases.items() if name in found} != set(aliases.values()):
            return False
        return (directory / "postil.json").is_file() and all(
            read_tensor(tensor).equal(own[name].detach().cpu()) for name, tensor in found.items() if name in own
        )
    except (PostilError, OSError, SafetensorError):
        return False


def _save_model(job: Job, directory: Path, card: dict[str, Any]) -> None:
    """A fully fine-tuned model as a Hugging Face directory; card: what is told of its training."""
    with atomic_directory(directory, marker="postil.json", carry=True) as temporary, quiet():
        try:
            job.base.model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{error}") from error  # its way to say that the disk is full
        write_json(temporary / "postil.json", {**card, "method": "full"})
        if job.base.tokenizer is not None:
            job.base.tokenizer.save_pretrained(temporary)
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for the owner alone
