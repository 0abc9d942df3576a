"""Gaussian diffusion of one small vector: the process of the per-token heads of MAR and eMIGM.

Tables are float64; what touches tensors is cast to float32, as published. The process predicts noise and learns its
variance between two bounds. The network is a callable; the fast solver is in `mmdiff.diffusion.solver`.

Source: IDDPM (arXiv 2102.09672); published code of MAR (arXiv 2406.11838) and eMIGM (arXiv 2503.07197).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["Process", "cosine_betas", "kept_steps"]

_BIN = 1 / 255
"""Half the width of a bin of the discretised likelihood: latents are treated as 8-bit images in [-1, 1]."""


def cosine_betas(steps: int = 1000) -> Float[Tensor, "S"]:
    """Noise per step of the cosine schedule, float64.

    Source: IDDPM (arXiv 2102.09672), equation 17.
    """

    def kept(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    values = [min(1 - kept((i + 1) / steps) / kept(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(values, dtype=torch.float64)


def kept_steps(total: int, count: int) -> list[int]:
    """The training steps that ``count`` sampling steps visit: evenly spaced, first and last included.

    >>> kept_steps(1000, 5)
    [0, 250, 500, 749, 999]

    Raises:
        ConfigError: Not between 1 and ``total``.

    Source: published code of IDDPM (the accumulated float is rounded half to even).
    """
    if not 1 <= count <= total:
        raise ConfigError(f"{count} diffusion steps of the head; between 1 and {total} are possible")
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    out, at = [], 0.0
    for _ in range(count):
        out.append(round(at))
        at += stride
    return out


@dataclass(frozen=True, kw_only=True)
class Process:
    """The forward process and its posterior, one entry per step.

    Attributes:
        steps: Int64 [S]; the training step each entry stands for: the number the network is given.
        betas: Float64 [S]; noise added per step.
        alphas_cumprod: Float64 [S]; share of the signal's power that is left.
    """

    steps: Int[Tensor, "S"]
    betas: Float[Tensor, "S"]
    alphas_cumprod: Float[Tensor, "S"]

    @classmethod
    def cosine(cls, steps: int = 1000) -> Process:
        """The process of the published heads."""
        betas = cosine_betas(steps)
        return cls(steps=torch.arange(steps), betas=betas, alphas_cumprod=(1 - betas).cumprod(0))

    def respaced(self, count: int) -> Process:
        """The same process seen at ``count`` of its steps.

        Raises:
            ConfigError: ``count`` is out of range.
        """
        kept = torch.tensor(kept_steps(len(self.betas), count))
        signal = self.alphas_cumprod[kept]
        betas = 1 - signal / _shifted(signal)
        # The product of the new steps, not the old numbers: what published code uses, different in the last digits.
        return Process(steps=self.steps[kept], betas=betas, alphas_cumprod=(1 - betas).cumprod(0))

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def posterior_variance(self) -> Float[Tensor, "S"]:
        """Variance of x_{t-1} given x_t and x_0."""
        return self.betas * (1 - _shifted(self.alphas_cumprod)) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> Float[Tensor, "S"]:
        """Its logarithm; the first entry, which would be minus infinity, is replaced by the second."""
        variance = self.posterior_variance
        return torch.cat((variance[1:2] if len(self) > 1 else variance[:1].clamp_min(1e-20), variance[1:])).log()

    @property
    def posterior_mean_coef1(self) -> Float[Tensor, "S"]:
        """Weight of x_0 in the posterior mean."""
        return self.betas * _shifted(self.alphas_cumprod).sqrt() / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> Float[Tensor, "S"]:
        """Weight of x_t in the posterior mean."""
        return (1 - _shifted(self.alphas_cumprod)) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    @property
    def sqrt_recip_alphas_cumprod(self) -> Float[Tensor, "S"]:
        """Weight of x_t in the estimate of x_0."""
        return (1 / self.alphas_cumprod).sqrt()

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> Float[Tensor, "S"]:
        """Weight of the noise, to be subtracted, in the estimate of x_0."""
        return (1 / self.alphas_cumprod - 1).sqrt()

    def noised(
        self, clean: Float[Tensor, "M C"], t: Int[Tensor, "M"], noise: Float[Tensor, "M C"]
    ) -> Float[Tensor, "M C"]:
        """sqrt(alpha_t) clean + sqrt(1 - alpha_t) noise; ``t`` counts entries from 0."""
        signal = self.alphas_cumprod
        return _at(signal.sqrt(), t, clean) * clean + _at((1 - signal).sqrt(), t, clean) * noise

    def token_losses(
        self,
        output: Float[Tensor, "M O"],
        clean: Float[Tensor, "M C"],
        noisy: Float[Tensor, "M C"],
        t: Int[Tensor, "M"],
        noise: Float[Tensor, "M C"],
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
        """Loss of every token: (mean squared error of the noise, variational term in bits).

        The variational term trains the variance only: it sees a detached noise estimate, and is not scaled down.

        Args:
            output: The network's: noise, then position of the log-variance between its bounds, in about [-1, 1].
            clean: x_0.
            noisy: x_t.
            t: Int64, entries of the process.
            noise: The noise in x_t.

        Source: IDDPM (arXiv 2102.09672), hybrid loss as in MAR's published code (the terms are added unscaled).
        """
        output, clean, noisy, noise = output.float(), clean.float(), noisy.float(), noise.float()
        estimate, position = output.chunk(2, dim=1)
        mse = (noise - estimate).square().mean(1)
        mean, log_variance = self._reverse(noisy, t, estimate.detach(), position)
        true_mean = _at(self.posterior_mean_coef1, t, clean) * clean + _at(self.posterior_mean_coef2, t, clean) * noisy
        true_log_variance = _at(self.posterior_log_variance_clipped, t, clean)
        kl = _normal_kl(true_mean, true_log_variance, mean, log_variance).mean(1)
        nll = -_discrete_log_likelihood(clean, mean, 0.5 * log_variance).mean(1)
        return mse, torch.where(t == 0, nll, kl) / math.log(2.0)

    def previous(
        self,
        noisy: Float[Tensor, "M C"],
        step: int,
        estimate: Float[Tensor, "M C"],
        position: Float[Tensor, "M C"],
        noise: Float[Tensor, "M C"],
    ) -> Float[Tensor, "M C"]:
        """One ancestral step from entry ``step`` to the one before; entry 0 gives the mean.

        Args:
            noisy: x at entry ``step``.
            step: Entry of this process.
            estimate: Estimated noise.
            position: Position of the log-variance between its bounds.
            noise: Standard normal, already multiplied by the temperature.
        """
        t = torch.full((len(noisy),), step, device=noisy.device)
        mean, log_variance = self._reverse(noisy, t, estimate.float(), position.float())
        return mean + (0.5 * log_variance).exp() * noise if step else mean

    def _reverse(self, noisy: Tensor, t: Tensor, estimate: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the learnt reverse step."""
        share = (position + 1) / 2
        high, low = _at(self.betas.log(), t, noisy), _at(self.posterior_log_variance_clipped, t, noisy)
        clean = (
            _at(self.sqrt_recip_alphas_cumprod, t, noisy) * noisy
            - _at(self.sqrt_recipm1_alphas_cumprod, t, noisy) * estimate
        )
        mean = _at(self.posterior_mean_coef1, t, noisy) * clean + _at(self.posterior_mean_coef2, t, noisy) * noisy
        return mean, share * high + (1 - share) * low


def _shifted(signal: Tensor) -> Tensor:
    """The entry before each entry; 1 before the first."""
    return torch.cat((signal.new_ones(1), signal[:-1]))


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a float64 table as float32 [M, 1]."""
    return table.to(like.device)[t].float()[:, None]


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two normal distributions, nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (-1 + log_variance2 - log_variance1 + ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the published likelihood uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discrete_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, nats, of the bin of width 2/255 around x; the outermost bins reach to infinity."""
    scale = (-log_scale).exp()
    below = _normal_cdf(scale * (x - mean - _BIN))
    above = _normal_cdf(scale * (x - mean + _BIN))
    inside = (above - below).clamp_min(1e-12).log()
    last = (1 - below).clamp_min(1e-12).log()
    return torch.where(x < -0.999, above.clamp_min(1e-12).log(), torch.where(x > 0.999, last, inside))
