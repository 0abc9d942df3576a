"""What ``mmdiff bench`` measures: the device, reading shards, a recipe's training step, generation by preset.

Every measurement is repeated until its time is over and gives rates as plain numbers. How they are shown is not here.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdiff.errors import ConfigError, SampleError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data_pipelines.index import ShardIndex
    from mmdiff.batch import Batch
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.commands.run_parts import Made
    from mmdiff.training.throughput import Throughput

__all__ = ["device_rates", "loader_rates", "preset_rates", "training_rates"]

Rates = dict[str, Any]

PRESETS = ("exact", "fast", "turbo")
_COPY_BYTES = 64 << 20
_BLOCK = 1 << 20
_BATCH = 64
_ITEMS = 4
_PROMPTS = ("a red apple", "a yellow star", "a blue car", "a green leaf")


def device_rates(device: str) -> Rates:
    """The most that this device does: matrix products in two dtypes, and copying memory.

    Args:
        device: Where.

    Returns:
        ``device``, ``threads``, ``float32_flops`` and ``bfloat16_flops`` (operations per second), ``copy_bytes``
        (bytes read and written per second).
    """
    import torch

    from mmdiff.training.throughput import peak_flops

    place = torch.device(device)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)

    def copy() -> int:
        target.copy_(source)
        _settle(place)
        return 2 * _COPY_BYTES

    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "threads": torch.get_num_threads(),
        "float32_flops": peak_flops(place, torch.float32),
        "bfloat16_flops": peak_flops(place, torch.bfloat16),
        "copy_bytes": _rate(copy, 0.3),
    }


def loader_rates(shards: Sequence[str], seconds: float) -> Rates:
    """Reading shards in the shuffled order of training, beside the same bytes by nothing but ``pread``.

    Args:
        shards: As `data_pipelines.source.open_shards`; ``raw`` and ``disk`` need local files.
        seconds: Time of each measurement.

    Returns:
        ``samples`` and ``bytes`` of the shards, ``read`` and ``raw`` (samples per second from memory), ``share`` of the
        two, ``disk_bytes`` (per second, after the files were dropped from memory), ``decoded`` (pictures per second).
        What could not be measured is None.

    Raises:
        ShardError: The shards cannot be read.
        ConfigError: They hold no samples.
    """
    from data_pipelines.plan import Plan, SourceTable
    from data_pipelines.reader import Sample, ShardReader
    from data_pipelines.source import open_shards

    indexes = open_shards(list(shards))
    total = sum(len(index) for index in indexes)
    if not total:
        raise ConfigError(f"--shards {' '.join(shards)}: hold no samples")
    plan, reader = Plan(0, [SourceTable.from_shards(indexes)]), ShardReader(indexes)
    order = itertools.cycle([(d.shard, d.sample) for d in map(plan.at, range(min(total, 4096)))])

    def read() -> int:
        found = reader.read_many(list(itertools.islice(order, _BATCH)))
        return sum(isinstance(sample, Sample) for sample in found)

    local = all(Path(index.url).is_file() for index in indexes)
    disk = _disk_rate([index.url for index in indexes], seconds) if local else None
    raw, ours = (_in_turns([_raw(indexes, plan, total), read], seconds)) if local else (None, _rate(read, seconds))
    pictures = _pictures(reader, indexes, 32)
    rates = {"samples": total, "bytes": sum(index.size for index in indexes), "read": ours, "raw": raw}
    share = ours / raw if raw else None
    return {**rates, "share": share, "disk_bytes": disk, "decoded": _decode_rate(pictures, seconds)}


def training_rates(spec: RunConfig, device: str, seconds: float, peak: Callable[[torch.dtype], float]) -> Rates:
    """Training steps of a recipe with its own data, without writing anything.

    Args:
        spec: The recipe.
        device: Where.
        seconds: Time of the measurement, after two steps that are not timed; at least three steps.
        peak: Operations per second of the device in a dtype.

    Returns:
        ``parameters``, ``batch_size``, ``step_seconds`` with waiting, per second ``samples``, ``tokens``, ``images``
        and ``flops``, ``share`` of the peak, ``data_wait`` (a share of the time), ``peak_bytes`` of memory.

    Raises:
        MmdiffError: The recipe cannot be carried out.
    """
    import torch

    from mmdiff.commands.run_parts import build
    from mmdiff.training import optim
    from mmdiff.training.finetune import attach
    from mmdiff.training.randomness import own_randomness
    from mmdiff.training.recompute import compiling, recomputing
    from mmdiff.training.throughput import Throughput

    made, place, train = build(spec, device), torch.device(device), spec.train
    model: nn.Module = made.model
    with ExitStack() as stack:
        stack.enter_context(own_randomness(place))
        if train.lora is not None:
            attach(model, train.lora, train.seed)
        model.to(place).train()
        optim.freeze(model, train.optim)
        half = train.autocast is not None or {p.dtype for p in model.parameters()} == {torch.bfloat16}
        dtype = torch.bfloat16 if half else torch.float32
        throughput = Throughput(place, dtype)
        stack.enter_context(compiling(model, train.compile))
        stack.enter_context(recomputing(model, train.gradient_checkpointing, again=throughput.uncounted))
        stack.callback(made.loader.close)
        rates = _timed_steps(_steps(spec, made, place, throughput), place, seconds)
    flops = (throughput.per_slot or 0.0) * rates.pop("slots")
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "batch_size": spec.data.batch_size,
        **rates,
        "flops": flops,
        "share": flops / peak(dtype) if flops else None,
    }


def preset_rates(model: str, device: str | None, shards: Sequence[str], seconds: float) -> Rates:
    """Seconds per item of what a model can do, under every preset.

    Args:
        model: As `mmdiff.load`.
        device: Where; None = a GPU if there is one.
        shards: Their first pictures are described, if the model can do that.
        seconds: Twice the time of each measurement, of which there are many; at least two calls.

    Returns:
        Capability -> preset -> seconds per item; a sentence where a preset does not fit the model.

    Raises:
        MmdiffError: The model cannot be loaded.
    """
    import mmdiff
    from data_pipelines.reader import ShardReader
    from data_pipelines.source import open_shards
    from mmdiff.images import decode

    loaded: Any = mmdiff.load(model, device=device)
    able = loaded.capabilities
    uses: dict[str, Callable[[str], Any]] = {}
    if "caption" in able:
        indexes = open_shards(list(shards))
        shown = [decode(data) for data in _pictures(ShardReader(indexes), indexes, _ITEMS)]
        uses["caption"] = lambda preset: loaded.vision.caption(shown, preset=preset)
    if "generate_text" in able:
        uses["generate_text"] = lambda preset: loaded.text.generate(list(_PROMPTS), preset=preset)
    if "text_image" in able:
        uses["text_image"] = lambda preset: loaded.images(
            prompts=list(_PROMPTS), seeds=list(range(_ITEMS)), preset=preset
        )
    elif "class_image" in able:
        uses["class_image"] = lambda preset: loaded.images(
            labels=[0] * _ITEMS, seeds=list(range(_ITEMS)), preset=preset
        )
    return {
        name: {preset: _seconds_per_item(use, preset, seconds / 2) for preset in PRESETS} for name, use in uses.items()
    }


def _seconds_per_item(use: Callable[[str], Any], preset: str, seconds: float) -> float | str:
    try:
        use(preset)  # what is made on first use does not count
    except ConfigError as error:
        return str(error)
    return 1 / _rate(lambda: _ITEMS if use(preset) is not None else 0, seconds)


def _steps(spec: RunConfig, made: Made, place: torch.device, throughput: Throughput) -> Iterator[tuple[Batch, float]]:
    """Batches that were trained on, and the seconds spent waiting for each."""
    import torch

    from mmdiff import rng
    from mmdiff.commands.run_parts import scales_of
    from mmdiff.training import optim
    from mmdiff.training.microbatch import split

    train = spec.train
    optimizer = optim.build(made.model, train.optim, scales_of(spec))
    draws, batches = rng.generator(train.seed, "bench"), iter(made.loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        first = throughput.per_slot is None
        for part in split(batch, train.accumulate):
            # Compiled code is opaque to the counter; the first step is not timed.
            stance = torch.compiler.set_stance("force_eager" if first else "default")
            with stance, throughput.counted(part):
                with optim.arithmetic(place, train.autocast):
                    total = made.objective(made.model, part.to(place), draws).total
                if total.requires_grad:
                    (total / train.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _settle(place)
        yield batch, waited


def _timed_steps(steps: Iterator[tuple[Batch, float]], place: torch.device, seconds: float) -> Rates:
    from collections import Counter

    from mmdiff.training.throughput import work_of

    _forget_peak(place)
    for _ in range(2):
        next(steps)
    done: Counter[str] = Counter()
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or done["steps"] < 3:
        batch, waited = next(steps)
        done.update({**work_of(batch), "samples": len(batch), "waited": waited, "steps": 1})
    rates: Rates = {name: done[name] / spent for name in ("samples", "tokens", "images", "slots")}
    return {
        "step_seconds": spent / done["steps"],
        **rates,
        "data_wait": done["waited"] / spent,
        "peak_bytes": _peak_bytes(place),
    }


def _raw(indexes: Sequence[ShardIndex], plan: Any, total: int) -> Callable[[], int]:
    """Batches of the same bytes in the same order, by nothing but pread."""
    files = [os.open(index.url, os.O_RDONLY) for index in indexes]
    places = []
    for draw in map(plan.at, range(min(total, 4096))):
        members = indexes[draw.shard][draw.sample].members.values()
        start, end = min(m.offset for m in members), max(m.offset + m.size for m in members)
        places.append((files[draw.shard], end - start, start))
    order = itertools.cycle(places)
    return lambda: len([os.pread(*place) for place in itertools.islice(order, _BATCH)])


def _disk_rate(files: Sequence[str], seconds: float) -> float | None:
    """Bytes per second from front to back, of files that were dropped from memory; None where that cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return None
    count, spent = 0, 0.0
    for name in files:
        with Path(name).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while spent + time.perf_counter() - began < seconds and (block := file.read(_BLOCK)):
                count += len(block)
            spent += time.perf_counter() - began
    return count / max(spent, 1e-9)


def _pictures(reader: Any, indexes: Sequence[ShardIndex], count: int) -> list[bytes]:
    """The first encoded pictures of shards."""
    found: list[bytes] = []
    places = ((n, sample) for n, index in enumerate(indexes) for sample in range(len(index)))
    for place in itertools.islice(places, 4 * count):
        try:
            found.append(reader.read(*place).image())
        except SampleError:
            continue  # a sample without a picture, or a damaged one
        if len(found) == count:
            break
    return found


def _decode_rate(pictures: Sequence[bytes], seconds: float) -> float | None:
    from mmdiff.images import decode, to_pixels

    if not pictures:
        return None

    def run() -> int:
        return len([to_pixels(image, min(image.size)) for image in map(decode, pictures)])

    return _rate(run, seconds)


def _in_turns(actions: Sequence[Callable[[], int]], seconds: float) -> list[float]:
    """Items per second of several actions, a stretch of each in turn, so that other programs disturb all alike."""
    for action in actions:
        action()
    best, rounds = [0.0] * len(actions), 5
    for _ in range(rounds):
        best = [max(b, _rate(action, seconds / rounds)) for b, action in zip(best, actions, strict=True)]
    return best


def _rate(action: Callable[[], int], seconds: float) -> float:
    """Items per second; at least two calls."""
    done, calls, began = 0, 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or calls < 2:
        done += action()
        calls += 1
    return done / max(spent, 1e-9)


def _settle(place: torch.device) -> None:
    import torch

    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def _forget_peak(place: torch.device) -> None:
    import torch

    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5", "ascii")


def _peak_bytes(place: torch.device) -> int:
    """Most memory since `_forget_peak`: of the GPU, or of the whole process."""
    import resource
    import sys

    import torch

    if place.type == "cuda":
        return int(torch.cuda.max_memory_allocated(place))
    status = Path("/proc/self/status")
    for line in status.read_text("ascii").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
