"""What is trained as one flat float32 buffer: one norm, one AdamW, one checkpoint tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from postil.adapter.bank import ALIGN, Resident
from postil.adapter.divergence import Bare
from postil.training.options import Settled


class Trainable(Protocol):
    """A flat float32 buffer with its gradient twin, and how it meets the model's own tensors."""

    flat: torch.Tensor
    grad: torch.Tensor

    def collect(self) -> None:
        """After a backward pass: see that all gradients stand in `grad`."""

    def publish(self) -> None:
        """After an update: bring the new values to the model."""

    def origin(self) -> Bare:
        """A maker of contexts in which the model's own parameters are as they are now, whatever is trained."""


@dataclass(slots=True)
class AdapterWeights:
    """A resident adapter: its leaves are views into the buffer, so there is nothing to carry."""

    flat: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def of(cls, resident: Resident) -> AdapterWeights:
        """The resident's buffers, gradients on."""
        resident.train()
        assert resident.grad is not None
        return cls(resident.flat, resident.grad)

    def collect(self) -> None:
        """Autograd accumulates into the views."""

    def publish(self) -> None:
        """The leaves are the buffer."""

    def origin(self) -> Bare:
        """The model's own parameters are frozen."""
        return nullcontext


@dataclass(slots=True)
class FullWeights:
    """Every parameter of a model, with float32 masters whatever the model computes in."""

    flat: torch.Tensor
    grad: torch.Tensor
    parameters: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]  # own, master view, gradient view

    @classmethod
    def of(cls, model: PreTrainedModel) -> FullWeights:
        """Masters copied from the model, which becomes trainable (tied tensors once)."""
        own = list(model.parameters())
        sizes = [-(-parameter.numel() // ALIGN) * ALIGN for parameter in own]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=own[0].device)
        grad = torch.zeros_like(flat)
        parameters, offset = [], 0
        for parameter, size in zip(own, sizes, strict=True):
            rows = slice(offset, offset + parameter.numel())
            master = flat[rows].view(parameter.shape)
            master.copy_(parameter.detach())
            parameters.append((parameter, master, grad[rows].view(parameter.shape)))
            parameter.requires_grad_(True)
            offset += size
        return cls(flat, grad, parameters)

    def collect(self) -> None:
        """Add this pass's gradients, in whatever dtype they came, to the float32 sum."""
        for parameter, _, gradient in self.parameters:
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
                parameter.grad = None

    def publish(self) -> None:
        """Round the masters to the model's dtype."""
        with torch.no_grad():
            for parameter, master, _ in self.parameters:
                parameter.copy_(master)

    def origin(self) -> Bare:
        """A copy of the model in its dtype, exchanged for the trained values within a context."""
        other = [parameter.detach().clone() for parameter, _, _ in self.parameters]

        def exchange() -> None:
            for index, (parameter, _, _) in enumerate(self.parameters):
                parameter.data, other[index] = other[index], parameter.data

        @contextmanager
        def bare() -> Iterator[None]:
            exchange()
            try:
                yield
            finally:
                exchange()

        return bare


@dataclass(slots=True)
class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) over one flat buffer."""

    weights: Trainable
    options: Settled
    total_steps: int
    step: int
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def of(cls, weights: Trainable, options: Settled, total_steps: int) -> AdamW:
        """A fresh optimiser: both moments zero."""
        return cls(weights, options, total_steps, 0, torch.zeros_like(weights.flat), torch.zeros_like(weights.flat))

    def clip(self) -> float:
        """Scale the gradient down to the norm `clip`; returns its norm before (not finite: nothing was done)."""
        norm = float(torch.linalg.vector_norm(self.weights.grad))
        if math.isfinite(norm) and norm > self.options.clip:
            self.weights.grad.mul_(self.options.clip / norm)
        return norm

    def update(self) -> float:
        """One AdamW step with the gradient, which is zeroed; returns the learning rate."""
        options, gradient = self.options, self.weights.grad
        self.step += 1
        rate = rate_at(self.step, options, self.total_steps)
        first, second = options.betas
        self.exp_avg.lerp_(gradient, 1 - first)  # m = b1 m + (1-b1) g
        self.exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)  # v = b2 v + (1-b2) g^2
        unbiased = (self.exp_avg_sq / (1 - second**self.step)).sqrt_().add_(options.eps)
        with torch.no_grad():
            if options.weight_decay:
                self.weights.flat.mul_(1 - rate * options.weight_decay)
            self.weights.flat.addcdiv_(self.exp_avg, unbiased, value=-rate / (1 - first**self.step))
        gradient.zero_()
        self.weights.publish()
        return rate


def rate_at(step: int, options: Settled, total_steps: int) -> float:
    """The learning rate of update `step` (from 1): linear warm-up, then cosine or linear to zero, or constant."""
    peak, warmup = options.learning_rate, options.warmup_steps(total_steps)
    if step <= warmup:
        return peak * step / warmup
    if options.schedule == "constant":
        return peak
    left = (total_steps - step + 1) / max(total_steps - warmup, 1)  # 1 after the warm-up, above 0 at the end
    if options.schedule == "linear":
        return peak * left
    return peak * 0.5 * (1 - math.cos(math.pi * left))
