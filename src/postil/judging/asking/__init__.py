"""How models are asked: likelihoods and answers in packs, lm-eval tasks, what a base said before, what they said."""
