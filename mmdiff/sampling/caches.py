"""Cache policies: which slots a pass recomputes, and which keep their stored keys and values.

A policy is a value without state; what a run remembers is the `Store` that the policy opens. ``cache=None`` computes
everything in every pass and is exact. On a network with full attention all policies here are approximate: stored slots
were computed on an older canvas. ``watch`` measures by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.nn.store import FeatureStore, LogitStore, Store
from mmdiff.sampling.ledger import Row

__all__ = ["Cache", "DllmCache", "Dual", "MaxLogit", "Prefix"]


@runtime_checkable
class Cache(Protocol):
    """Says what is recomputed.

    Attributes:
        watch: Measure the drift in every n-th pass (a further full pass each, not counted in the trace); 0 = never.
    """

    @property
    def watch(self) -> int:
        """As above."""
        ...

    def open(self, layers: int, valid: Bool[Tensor, "B T"], start: int) -> Store:
        """Memory for a run over rows whose real slots are ``valid``, of which the first ``start`` are the prompt."""
        ...

    def full(self, row: Row) -> bool:
        """Whether the row's next pass takes all slots through the network. Rows that agree share a pass."""
        ...

    def slots(self, numbers: Int[Tensor, "B T"], current: Int[Tensor, "#B 1"]) -> Bool[Tensor, "B T"]:
        """Slots that go through the network in the other passes, from block numbers and the current block."""
        ...

    def prepare(self, store: Store, row: Row) -> None:
        """Called before each pass, with one of the rows that share it."""
        ...


@dataclass(frozen=True)
class _KeyValues:
    """Keys and values of some slots stay as the last full pass of the block left them.

    Attributes:
        refresh: A full pass at the start of each block and then after every ``refresh`` passes; None: only at the
            start. 1 computes everything always.
        watch: As in `Cache`.
    """

    refresh: int | None = None
    watch: int = 0

    def __post_init__(self) -> None:
        if self.refresh is not None and self.refresh < 1:
            raise ConfigError(f"refresh {self.refresh}; it must be at least 1, or None for once per block")

    def open(self, layers: int, valid: Bool[Tensor, "B T"], start: int) -> Store:
        """Keys and values of every layer."""
        return Store(layers, *valid.shape)

    def full(self, row: Row) -> bool:
        """At the start of a block, and when it is time to refresh."""
        return row.step == 0 or (self.refresh is not None and row.step % self.refresh == 0)

    def prepare(self, store: Store, row: Row) -> None:
        """Nothing: a pass overwrites what it computes."""


@dataclass(frozen=True)
class Prefix(_KeyValues):
    """Everything left of the current block is stored; the block and all later slots are recomputed.

    Source: Fast-dLLM (arXiv 2505.22618), prefix cache; ``refresh`` is the interval of LLaDA-V's published integration.
    """

    def slots(self, numbers: Int[Tensor, "B T"], current: Int[Tensor, "#B 1"]) -> Bool[Tensor, "B T"]:
        """From the start of the current block on."""
        return numbers >= current


@dataclass(frozen=True)
class Dual(_KeyValues):
    """Everything outside the current block is stored; only the block is recomputed.

    Source: Fast-dLLM (arXiv 2505.22618), dual cache.
    """

    def slots(self, numbers: Int[Tensor, "B T"], current: Int[Tensor, "#B 1"]) -> Bool[Tensor, "B T"]:
        """The current block."""
        return numbers == current


@dataclass(frozen=True)
class DllmCache:
    """Layer outputs are stored; prompt and answer are refreshed at intervals, the answer's most changed slots always.

    Attributes:
        prompt_interval: The prompt is refreshed in every n-th pass.
        answer_interval: So is the answer.
        transfer_ratio: Share of the answer that is refreshed in the other passes.
        first_layer: Refresh the first layer in every pass (published hook for LLaDA; LLaDA-V's copy does not).
        all_values: Keep the values computed for the comparison (published hook for LLaDA; LLaDA-V's copy does not).
        watch: As in `Cache`.

    Source: dLLM-Cache (arXiv 2506.06295).
    """

    prompt_interval: int = 25
    answer_interval: int = 7
    transfer_ratio: float = 0.25
    first_layer: bool = True
    all_values: bool = True
    watch: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_interval, self.answer_interval) < 1 or not 0 <= self.transfer_ratio <= 1:
            raise ConfigError(
                f"prompt_interval {self.prompt_interval} and answer_interval {self.answer_interval} must be at least "
                f"1, transfer_ratio {self.transfer_ratio} in [0, 1]"
            )

    def open(self, layers: int, valid: Bool[Tensor, "B T"], start: int) -> FeatureStore:
        """Keys, values and outputs of every layer."""
        return FeatureStore(
            layers,
            valid,
            start=start,
            ratio=self.transfer_ratio,
            first_layer=self.first_layer,
            all_values=self.all_values,
        )

    def full(self, row: Row) -> bool:
        """Always: the layers themselves leave slots out."""
        return True

    def slots(self, numbers: Int[Tensor, "B T"], current: Int[Tensor, "#B 1"]) -> Bool[Tensor, "B T"]:
        """All."""
        return numbers == numbers

    def prepare(self, store: Store, row: Row) -> None:
        """Tell the store what is refreshed; all rows have done the same number of passes."""
        assert isinstance(store, FeatureStore)
        store.plan(row.passes % self.prompt_interval == 0, row.passes % self.answer_interval == 0)


@dataclass(frozen=True)
class MaxLogit:
    """Keys, values and logits are stored; slots whose largest logit was small are computed again in every pass.

    Where the network is sure, its logits of an older pass are taken. Each branch of guidance has its own memory.

    Attributes:
        passes: Passes of the run.
        keep: Share of the slots that is not computed again.
        refresh: Passes between those that compute everything.
        warmup: Share of the passes, at the start, that all compute everything.
        watch: As in `Cache`.

    Source: Lumina-DiMOO (arXiv 2510.06308), published max-logit cache.
    """

    passes: int
    keep: float = 0.9
    refresh: int = 5
    warmup: float = 0.3
    watch: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1 or self.refresh < 1 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"keep {self.keep} and warmup {self.warmup} must be in [0, 1], refresh {self.refresh} at least 1"
            )

    def open(self, layers: int, valid: Bool[Tensor, "B T"], start: int) -> LogitStore:
        """Keys and values of every layer, and logits."""
        return LogitStore(layers, valid, share=1 - self.keep)

    def full(self, row: Row) -> bool:
        """In the warm-up, and at intervals after it."""
        warm = int(self.warmup * self.passes)
        return row.passes <= warm or (row.passes - warm) % self.refresh == 0

    def slots(self, numbers: Int[Tensor, "B T"], current: Int[Tensor, "#B 1"]) -> Bool[Tensor, "B T"]:
        """None are known beforehand: the memory chooses."""
        return numbers != numbers

    def prepare(self, store: Store, row: Row) -> None:
        """Nothing: the memory chooses by what it holds."""
