"""A plain transcription of eMIGM's published sampling loop and training step, written from their description.

It is what `benchmarks/image.py` compares with, on the same weights and in the same process. It keeps the costs of the
published code: all tokens are projected before the masked ones are dropped, every condition is computed, the mask is
kept row by row in Python with look-ups on the device, the solver's schedule is made anew in every step with a sort per
look-up, and in training the head runs on unmasked tokens too. tests/benchmarks checks it against the golden data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PublishedSampler", "training_step"]

Draws = dict[str, Callable[..., Tensor]]


class Schedule:
    """Continuous time; every look-up sorts the knots together with the question."""

    def __init__(self, betas: Tensor) -> None:
        log_alphas = 0.5 * torch.log(1 - betas).cumsum(dim=0).float()
        log_sigmas = 0.5 * torch.log(1 - torch.exp(2 * log_alphas))
        ratios = log_alphas - log_sigmas
        drop = torch.searchsorted(torch.flip(ratios, [0]), torch.tensor(-5.1))
        self.log_alphas = (log_alphas[: -int(drop)] if drop > 0 else log_alphas).reshape(1, -1)
        self.total = self.log_alphas.shape[1]
        self.t = torch.linspace(0, 1, self.total + 1)[1:].reshape(1, -1)

    def log_alpha(self, t: Tensor) -> Tensor:
        return lookup(t.reshape(-1, 1), self.t, self.log_alphas).reshape(-1)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self.log_alpha(t)))

    def ratio(self, t: Tensor) -> Tensor:
        value = self.log_alpha(t)
        return value - 0.5 * torch.log(1 - torch.exp(2 * value))

    def time(self, ratio: Tensor) -> Tensor:
        value = -0.5 * torch.logaddexp(torch.zeros(1), -2 * ratio)
        return lookup(value.reshape(-1, 1), torch.flip(self.log_alphas, [1]), torch.flip(self.t, [1])).reshape(-1)


def lookup(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Piecewise linear interpolation, by sorting."""
    n, k = x.shape[0], xp.shape[1]
    everything = torch.cat([x.unsqueeze(2), xp.unsqueeze(0).repeat((n, 1, 1))], dim=2)
    ordered, indices = torch.sort(everything, dim=2)
    place = torch.argmin(indices, dim=2)
    candidates = place - 1
    start = torch.where(torch.eq(place, 0), 1, torch.where(torch.eq(place, k), k - 2, candidates))
    end = torch.where(torch.eq(start, candidates), start + 2, start + 1)
    x0 = torch.gather(ordered, 2, start.unsqueeze(2)).squeeze(2)
    x1 = torch.gather(ordered, 2, end.unsqueeze(2)).squeeze(2)
    first = torch.where(torch.eq(place, 0), 0, torch.where(torch.eq(place, k), k - 2, candidates))
    values = yp.unsqueeze(0).expand(n, -1, -1)
    y0 = torch.gather(values, 2, first.unsqueeze(2)).squeeze(2)
    y1 = torch.gather(values, 2, (first + 1).unsqueeze(2)).squeeze(2)
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def solve(betas: Tensor, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++, singlestep, order 3, with the schedule made anew."""
    s = Schedule(betas)
    outer = steps // 3 + 1
    orders = {
        0: [3] * (outer - 2) + [2, 1],
        1: [3] * (outer - 1) + [1],
        2: [3] * (outer - 1) + [2],
    }[steps % 3]
    first, last = s.ratio(torch.ones(1)), s.ratio(torch.ones(1) / s.total)
    times = s.time(torch.linspace(first.item(), last.item(), len(orders) + 1))

    def clean(y: Tensor, t: Tensor) -> Tensor:
        label = (t - 1 / s.total) * len(betas)
        noise = network(y, label.expand(len(y)))
        return (y - s.sigma(t) * noise) / s.alpha(t)

    for order, a, b in zip(orders, times[:-1, None], times[1:, None], strict=True):
        inner = s.time(torch.linspace(s.ratio(a).item(), s.ratio(b).item(), order + 1))
        ratios = s.ratio(inner)
        r = [(ratios[i] - ratios[0]) / (ratios[-1] - ratios[0]) for i in range(1, order)]
        h = s.ratio(b) - s.ratio(a)
        phi = torch.expm1(-h)
        m0 = clean(x, a)
        y = (s.sigma(b) / s.sigma(a)) * x - s.alpha(b) * phi * m0
        if order == 1:
            x = y
            continue
        t1 = s.time(s.ratio(a) + r[0] * h)
        x1 = (s.sigma(t1) / s.sigma(a)) * x - s.alpha(t1) * torch.expm1(-r[0] * h) * m0
        m1 = clean(x1, t1)
        if order == 2:
            x = y - (0.5 / r[0]) * s.alpha(b) * phi * (m1 - m0)
            continue
        t2 = s.time(s.ratio(a) + r[1] * h)
        phi2 = torch.expm1(-r[1] * h)
        x2 = (
            (s.sigma(t2) / s.sigma(a)) * x
            - s.alpha(t2) * phi2 * m0
            + r[1] / r[0] * s.alpha(t2) * (phi2 / (r[1] * h) + 1) * (m1 - m0)
        )
        m2 = clean(x2, t2)
        x = y + (1 / r[1]) * s.alpha(b) * (phi / h + 1) * (m2 - m0)
    return x


def head(net: Any, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The denoiser of a token, in the published order of operations on the weights of our module."""
    y = net.time_embed(t) + net.cond_embed(z)
    x = net.input_proj(x)
    for layer in net.res_blocks:
        shift, scale, gate = layer.adaLN_modulation(y).chunk(3, dim=-1)
        x = x + gate * layer.mlp(layer.in_ln(x) * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, dim=-1)
    normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return net.final_layer.linear(normed * (1 + scale) + shift)


def block(layer: Any, x: Tensor) -> Tensor:
    """A Transformer block on the weights of our module, with PyTorch's own attention and dropout."""
    attention, mlp, training = layer.attn, layer.mlp, layer.training
    b, n, width = x.shape
    qkv = attention.qkv(layer.norm1(x)).reshape(b, n, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    rate = attention.dropout if training else 0.0
    mixed = functional.scaled_dot_product_attention(*qkv.unbind(0), dropout_p=rate)
    mixed = attention.proj(mixed.transpose(1, 2).reshape(b, n, width))
    x = x + functional.dropout(mixed, attention.proj_drop.p, training)
    hidden = functional.dropout(functional.gelu(mlp.fc1(layer.norm2(x))), mlp.drop.p, training)
    return x + functional.dropout(mlp.fc2(hidden), mlp.drop.p, training)


class PublishedSampler:
    """Samples an `EMIGM` as the published code does.

    Args:
        model: The network, whose encoder sees known tokens only; its modules are used, its methods are not.
        betas: Float64, noise per training step of the head.
        share: Share of the tokens that is masked at a time.
        ramp: Share of the full guidance, by the share of tokens that are known.
    """

    def __init__(
        self,
        model: Any,
        betas: Tensor,
        share: Callable[[Tensor], Tensor] = lambda t: 1 - torch.exp(-5 * t),
        ramp: Callable[[Tensor], Tensor] = torch.ones_like,
    ) -> None:
        self.model, self.betas, self.share, self.ramp = model, betas, share, ramp

    def encode(self, x: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """States of buffer and known tokens."""
        m = self.model
        x = m.z_proj(x)
        b, _, width = x.shape
        front = m.config.buffer
        x = torch.cat([torch.zeros(b, front, width, dtype=x.dtype), x], dim=1)
        mask = torch.cat([torch.zeros(b, front), mask], dim=1)
        x[:, :front] = classes.unsqueeze(1)
        x = x + m.encoder_pos_embed_learned
        x = m.z_proj_ln(x)
        x = x[(1 - mask).nonzero(as_tuple=True)].reshape(b, -1, width)
        for layer in m.encoder_blocks:
            x = block(layer, x)
        return m.encoder_norm(x)

    def decode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Conditions of all tokens."""
        m = self.model
        x = m.decoder_embed(x)
        front = m.config.buffer
        mask = torch.cat([torch.zeros(x.shape[0], front), mask], dim=1)
        vector = m.fake_latent if m.mask_token is None else m.mask_token[0]
        padded = vector.unsqueeze(0).repeat(mask.shape[0], mask.shape[1], 1).to(x.dtype)
        padded[(1 - mask).nonzero(as_tuple=True)] = x.reshape(-1, x.shape[2])
        x = padded + m.decoder_pos_embed_learned
        for layer in m.decoder_blocks:
            x = block(layer, x)
        x = m.decoder_norm(x)[:, front:]
        return x + m.diffusion_pos_embed_learned

    def reveal(self, mask: Tensor, chance: Tensor, last: bool, draws: Draws) -> Tensor:
        """Which tokens are revealed, row by row."""
        b, n = mask.shape
        u = draws["uniform"](n)
        rows = [u]
        for _ in range(1, b):
            draws["permutation"](n)
        for row in range(1, b):
            mine = torch.empty_like(u)
            for value in (0.0, 1.0):
                here = (mask[row] == value).nonzero(as_tuple=True)[0]
                given = u[(mask[0] == value).nonzero(as_tuple=True)[0]]
                mine[here[draws["permutation"](len(here))]] = given
            rows.append(mine)
        chosen = (mask.bool()) & (torch.stack(rows) < chance)
        if last:
            return mask.bool()
        if chosen.sum() == 0 and mask.sum() > 0:
            for row in range(b):
                here = mask[row].nonzero(as_tuple=True)[0]
                chosen[row, here[draws["integer"](len(here)) if len(here) > 1 else 0]] = True
        return chosen

    @torch.no_grad()
    def sample(
        self, labels: Tensor, steps: int, head_steps: int, cfg: float, low: float, high: float, draws: Draws
    ) -> Tensor:
        """Tokens [B, N, C]."""
        m, b = self.model, len(labels)
        n, c = m.config.tokens, m.config.token_channels
        mask, tokens = torch.ones(b, n), torch.zeros(b, n, c)
        times = torch.linspace(1, 1e-5, steps + 1)
        for i in range(steps):
            t, s = times[i], times[i + 1]
            guided = cfg != 1 and bool(s > low) and bool(s <= high)
            classes = m.class_emb(labels)
            known, state = mask, tokens.clone()
            if guided:
                classes = torch.cat([classes, m.fake_latent.repeat(b, 1)])
                known, state = torch.cat([mask, mask]), torch.cat([tokens, tokens])
            z = self.decode(self.encode(state, known, classes), known)
            chance = 1 - self.share(s) / self.share(t)
            chosen = self.reveal(mask, chance, i == steps - 1, draws)
            if chosen.sum() == 0:
                break
            mask = torch.logical_and(mask.bool(), torch.logical_not(chosen)).float()
            scale = 1 + (cfg - 1) * self.ramp(1 - mask[0].mean())
            where = torch.cat([chosen, chosen]) if guided else chosen
            z = z[where.nonzero(as_tuple=True)]
            noise = draws["normal"](int(chosen.sum()), c)

            def network(x: Tensor, label: Tensor, z: Tensor = z, guided: bool = guided, by: Tensor = scale) -> Tensor:
                if not guided:
                    return head(m.head, x, label, z)[:, :c].float()
                out = head(m.head, torch.cat([x, x]), torch.cat([label, label]), z)[:, :c].float()
                conditional, unconditional = out.chunk(2)
                return unconditional + by * (conditional - unconditional)

            tokens[chosen.nonzero(as_tuple=True)] = solve(self.betas, network, noise, head_steps)
        return tokens


def training_step(model: Any, process: Any, tokens: Tensor, labels: Tensor, mask: Tensor, copies: int) -> Tensor:
    """The published loss: the head runs on every token of every copy, unmasked ones count nothing."""
    sampler = PublishedSampler(model, process.betas)
    z = sampler.decode(sampler.encode(tokens, mask.float(), model.class_emb(labels)), mask.float())
    clean = tokens.reshape(-1, tokens.shape[-1]).repeat(copies, 1)
    z = z.reshape(-1, z.shape[-1]).repeat(copies, 1)
    weight = mask.float().reshape(-1).repeat(copies)
    t = torch.randint(0, len(process), (len(clean),))
    noise = torch.randn_like(clean)
    noisy = process.noised(clean, t, noise)
    output = head(model.head, noisy, t.float(), z)
    mse, vb = process.token_losses(output, clean, noisy, t, noise)
    return ((mse + vb) * weight).sum() / weight.sum()
