"""A recipe: everything that decides a run, in one validated file; and the run that it describes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field
from safetensors import SafetensorError

from postil.adapter import AdaptedModel, Adapter, LoraConfig, attach
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, load_base
from postil.base.quiet import quiet
from postil.base.stored import read_tensor, stored_tensors
from postil.data import DataOptions, Dataset, Sample, load_data, split_valid
from postil.errors import PostilError, RecipeError
from postil.files import atomic_directory, write_json
from postil.settings import Settings
from postil.training.card import card_of
from postil.training.defaults import settled
from postil.training.directory import check_foreign, keep_recipe, only_trainer, read_yaml
from postil.training.general import check_general, split_general
from postil.training.loop import Outcome, Watcher, check_form, refuse_untouched, run, seconds_per_run
from postil.training.options import Settled, TrainOptions
from postil.training.validation import tokens_of


class Recipe(Settings):
    """What `postil train` runs. Keys: base, data, out, valid (or valid_share, a seeded share held out), dtype,
    device, quant (nf4: the base in 4 bits, which training.method qlora implies), trust_remote_code (let the base's
    directory run its own code), from_adapter (continue from an adapter's values), general (rows of text that
    training.guard, kl_weight and general_share read; half of the documents are watched), lora, rows (how the data
    is read), training."""

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
    general: str | None = None
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig.parse({}))
    rows: DataOptions = Field(default_factory=DataOptions)
    training: TrainOptions = Field(default_factory=lambda: TrainOptions.parse({}))


def with_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A recipe's mapping with `training.learning_rate=2e-4` and the like set; values are read as YAML."""
    out: dict[str, Any] = copy.deepcopy(values)
    for setting in settings:
        key, mark, text = setting.partition("=")
        if not mark or not key:
            raise RecipeError(f"--set {setting}: write key=value, for example --set training.learning_rate=2e-4")
        place = out
        *parents, last = key.split(".")
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"--set {setting}: {parent} is a value, not a group of keys")
            place = inner
        try:
            place[last] = _number(read_yaml(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting}: {text!r} is no YAML value: {' '.join(str(error).split())}") from None
    return out


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


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
    general: Dataset | None = None  # documents, a sample each

    def run(self, watch: Watcher | None = None, tell: Callable[[str], None] = lambda _: None) -> Outcome:
        """Train, then write the adapter (or the model) into the run directory; see training.loop.run."""
        return _run(self, watch, tell)

    def seconds(self) -> float:
        """About how long `run` will take on this machine, from one step's gradients."""
        return seconds_per_run(self.model, self.training, "default", self.options, self._documents())

    def general_lines(self) -> list[str]:
        """What is done with the general text, in sentences; none where there is none."""
        return split_general(self._documents(), self.options, self.base).lines(self.options) if self.general else []

    def _documents(self) -> list[Sample]:
        return self.general.samples if self.general is not None else []


def prepare(recipe: Recipe) -> Job:
    """Load everything that a recipe names. Raises RecipeError for keys that exclude each other, and what the
    loaders raise."""
    plain = recipe.lora == LoraConfig()
    if recipe.from_adapter is not None and not plain:
        raise RecipeError("from_adapter brings the adapter's own configuration; leave the lora keys out")
    if recipe.training.method == "full" and (recipe.from_adapter is not None or not plain):
        raise RecipeError("training.method full trains every weight; leave lora and from_adapter out")
    if recipe.training.method == "full" and recipe.quant is not None:
        raise RecipeError("training.method full changes every weight, and 4-bit weights cannot be: leave quant out")
    check_general(recipe.training, recipe.general is not None)
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
    general = None
    if recipe.general is not None:  # whole documents, whatever the context: they are cut into windows later
        options = DataOptions(format="text", skip_bad_lines=recipe.rows.skip_bad_lines)
        general = load_data(recipe.general, base.tokenizer, options)
    watched = 0
    if general is not None:
        watched = tokens_of(split_general(general.samples, recipe.training, base).watched)
    now, why = settled(recipe.training, training, valid, watched)
    model = attach(base)
    if recipe.training.method != "full":
        source: LoraConfig | Adapter = recipe.lora
        if recipe.from_adapter is not None:
            source = load_adapter(recipe.from_adapter)
        attach(model, source, seed=recipe.training.seed)
    recipe = recipe.model_copy(update={"training": now})
    return Job(recipe, now, why, base, model, list(training), list(valid), dataset, held_out, general)


def _run(job: Job, watch: Watcher | None, tell: Callable[[str], None]) -> Outcome:
    recipe, out = job.recipe, Path(job.recipe.out)
    fields = recipe.model_dump(mode="json")
    check_foreign(out)
    with only_trainer(out):
        keep_recipe(out, fields, partial(_normal, job))
        outcome = run(
            job.model, job.training, job.valid, general=job._documents(), out=out, name="default",
            options=job.options, watch=watch, tell=tell,
        )  # fmt: skip
        if outcome.stopped:
            return outcome
        refuse_untouched(outcome)
        again = outcome.begun == outcome.steps  # there was nothing left to do: what is written, stays, card and all
        if recipe.training.method == "full":
            if not (again and _holds_model(out / "model", job.base)):
                _save_model(job, out / "model")
            return outcome
        adapter = job.model.export("default")
        if not (again and _holds_adapter(out / "adapter", adapter)):
            adapter.card |= card_of(
                fields, outcome, job.dataset, samples=len(job.training), held_out=job.held_out,
                held_out_samples=len(job.valid), general=job.general,
            )  # fmt: skip
            save_adapter(adapter, out / "adapter")
    return outcome


def _normal(job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with every key, what it leaves to the data chosen from the job's."""
    other: Recipe = Recipe.parse(values)
    watched = split_general(job._documents(), other.training, job.base).watched if job.general is not None else ()
    now, _ = settled(other.training, job.training, job.valid, tokens_of(watched))
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


def _save_model(job: Job, directory: Path) -> None:
    """A fully fine-tuned model as a Hugging Face directory."""
    with atomic_directory(directory, marker="postil.json", carry=True) as temporary, quiet():
        try:
            job.base.model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{error}") from error  # its way to say that the disk is full
        write_json(temporary / "postil.json", {"recipe": job.recipe.model_dump(mode="json"), "method": "full"})
        if job.base.tokenizer is not None:
            job.base.tokenizer.save_pretrained(temporary)
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for the owner alone
