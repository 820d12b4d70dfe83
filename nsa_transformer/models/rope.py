"""Rotary position embedding (arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071) beyond the trained length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.kernels.rotary import rotate

# YaRN's defaults for Llama-like models: dimensions that turn more often than BETA_FAST over the trained length keep their
# frequency, those that turn less often than BETA_SLOW are interpolated, a ramp lies between.
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rotation:
    """cos and sin, float32 `[T, D / 2]`, of T positions."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x `[T, heads, D]` rotated, contiguous, in x's dtype; the first half of D pairs with the second, as in Llama."""
        return rotate(x, self.cos, self.sin)


@dataclass(frozen=True)
class RotaryEmbedding:
    """Frequencies for heads of width `dim`; `original_length` None, or not below `max_length`: no stretching."""

    dim: int
    theta: float = 500000.0
    max_length: int = 32768
    original_length: int | None = None

    @property
    def factor(self) -> float:
        return 1.0 if self.original_length is None else max(1.0, self.max_length / self.original_length)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, float32 `[dim / 2]`."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        frequency = self.theta**-exponent
        if self.factor == 1.0:
            return frequency
        assert self.original_length is not None
        turns = frequency * self.original_length / (2 * math.pi)
        keep = ((turns - BETA_SLOW) / (BETA_FAST - BETA_SLOW)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / self.factor)

    def rotation(self, positions: Tensor) -> Rotation:
        """For integer positions `[T]`. YaRN's temperature, 0.1 ln(factor) + 1, is part of both cos and sin."""
        angle = positions.float()[:, None] * self.frequencies(positions.device)
        temperature = 0.1 * math.log(self.factor) + 1.0
        return Rotation(angle.cos() * temperature, angle.sin() * temperature)
