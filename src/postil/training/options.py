"""TrainOptions: how a run is trained, with the field's defaults per method."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from postil.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
CHOSEN = ("learning_rate", "epochs", "batch_size", "warmup", "valid_every", "valid_rows", "patience", "kl_weight")
MOST_WARMUP = 20  # steps of a warm-up that is given as a share


class TrainOptions(Settings):
    """How to train. Unknown keys and impossible values raise RecipeError.

    A step takes batch_size rows, in at least `accumulation` packs of at most pack_tokens tokens; its loss is
    divided by the step's target tokens, so the split changes nothing. method qlora: LoRA beside a 4-bit base. steps
    overrides epochs. warmup: a share of the run's steps (below 1; at most 20 of them), or so many steps (from 1 on).
    valid_rows: held-out rows that are measured every valid_every steps. patience: validations without gain before an
    early stop (0: never). checkpoint_every: steps (auto: about ten times a run).

    What is null, or "auto", is chosen from the data (training.defaults): rate, epochs, batch, warm-up and patience
    from the number of rows and of the tokens that are learned, the validations so that they take about a tenth of
    the run. What is given stays.

    The rest needs general rows beside the data, prose and chat, some to watch and the others to hold to. kl_weight:
    each step adds this times the mean KL(base||adapted) per token over kl_rows general rows of each kind (auto: 1
    where an adapter is trained and there are general rows, which a recipe's run has by default; 0: not held). guard:
    the largest rise of their nats per token over the base; the best state within it is kept (None: not asked).
    watch_windows: of 512 tokens, measured at every validation. general_share: so many general rows, as a share of
    batch_size, are learned among each step's own. general_tokens: of a general row of prose in a step.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    where: ClassVar[str] = "training"

    method: Literal["lora", "qlora", "full"] = "lora"
    learning_rate: float | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    accumulation: int = Field(default=1, ge=1)
    pack_tokens: int = Field(default=4096, ge=16)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int | float | None = Field(default=None, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    gradient_checkpointing: bool = False
    valid_every: int | None = Field(default=None, ge=1)
    valid_rows: int | None = Field(default=None, ge=0)
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    patience: int | None = Field(default=None, ge=0)
    guard: float | None = Field(default=None, ge=0)
    watch_windows: int = Field(default=8, ge=1)
    kl_weight: float | None = Field(default=None, ge=0)
    kl_rows: int = Field(default=2, ge=1)
    general_share: float = Field(default=0.0, ge=0, le=1)
    general_tokens: int = Field(default=64, ge=2)
    seed: int = Field(default=0, ge=0)

    @field_validator(*CHOSEN, "checkpoint_every", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, warmup: float | None) -> float | None:
        if warmup is None or warmup < 1:
            return warmup
        if warmup != int(warmup):
            raise ValueError("a share of the steps below 1, or a whole number of steps")
        return int(warmup)


class Settled(TrainOptions):
    """TrainOptions in which every number is known that the data decide: what a run is made of."""

    learning_rate: float = Field(gt=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    warmup: int | float = Field(ge=0)
    valid_every: int = Field(ge=1)
    valid_rows: int = Field(ge=0)
    patience: int = Field(ge=0)
    kl_weight: float = Field(ge=0)

    def total_steps(self, rows: int) -> int:
        """The updates of a run over so many rows."""
        return self.steps or self.epochs * math.ceil(rows / self.batch_size)

    def warmup_steps(self, total: int) -> int:
        """How many of a run's `total` steps the rate rises, never all; of a share, less than half."""
        if self.warmup < 1:
            return min(math.ceil(self.warmup * total), MOST_WARMUP, max(total - 1, 0) // 2)
        return min(int(self.warmup), max(total - 1, 0))
