"""Training: recipes, the loop, the optimiser on one flat buffer, checkpoints that resume to the same bytes."""

from postil.training.directory import read_recipe
from postil.training.loop import Outcome, train
from postil.training.options import TrainOptions
from postil.training.recipe import Job, Recipe, prepare

__all__ = ["Job", "Outcome", "Recipe", "TrainOptions", "prepare", "read_recipe", "train"]
