"""``mmdiff eval fid|vqa|caption``: the measures of `eval` on files and folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.errors import ConfigError

__all__ = ["app", "caption", "evaluate", "fid", "vqa"]

app = typer.Typer(help="Measure: distances between sets of images, answers, captions.", no_args_is_help=True)

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_OUT = Annotated[Path | None, typer.Option("--out", help="Also write the result as JSON to this file.")]
MEASURES = ("fid", "vqa", "caption")


@app.command()
def fid(
    a: Annotated[str, typer.Argument(help="Judged images: folder, .npz, shards; or statistics .npz.")],
    b: Annotated[str, typer.Argument(help="Reference images, in the same forms.")],
    features: Annotated[
        str, typer.Option(help="Feature network: inception, efficientnet-lite0, or scorer:PATH.")
    ] = "inception",
    num: Annotated[int | None, typer.Option(min=2, help="Exactly this many images of each set.")] = None,
    floor: Annotated[bool, typer.Option("--floor", help="Also measure real against real.")] = False,
    protocol: Annotated[str, typer.Option(help="How KID is estimated: full, or torch-fidelity.")] = "full",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass of the network.")] = 64,
    device: Annotated[str, typer.Option(help="Where the network runs.")] = "cpu",
    sha256: Annotated[str | None, typer.Option(help="Hash that a statistics file B must have.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images and of the floor's split.")] = 0,
    as_json: _JSON = False,
    out: _OUT = None,
) -> None:
    """FID and KID of two sets of images."""
    result = evaluate(
        "fid",
        a,
        b,
        features=features,
        num=num,
        floor=floor,
        protocol=protocol,
        batch_size=batch_size,
        device=device,
        sha256=sha256,
        seed=seed,
    )
    lines = [f"{result.name}  {result.fid:.2f}   ({result.features} features, {result.n_a} against {result.n_b})"]
    if result.kid_mean is not None:
        spread = f" ± {1000 * result.kid_std:.3f}" if result.kid_std is not None else ""
        lines.append(f"KID x 1000  {1000 * result.kid_mean:.3f}{spread}")
    if result.floor is not None:
        lines.append(
            f"real against real at {result.floor_n}: FID {result.floor:.2f}, KID x 1000 {1000 * result.floor_kid:.3f}"
        )
    _finish(result, lines, as_json, out)


@app.command()
def vqa(
    predictions: Annotated[Path, typer.Argument(help="JSON or JSON lines: question_id, answer.")],
    references: Annotated[Path, typer.Argument(help="JSON or JSON lines: question_id, answer, kind; or VQAv2.")],
    protocol: Annotated[str, typer.Option(help="exact, vqav2 or vqav2-normalised.")] = "exact",
    as_json: _JSON = False,
    out: _OUT = None,
) -> None:
    """Accuracy of short answers, per kind, beside the commonest answer."""
    result = evaluate("vqa", predictions, references, protocol=protocol)
    lines = [f"{'kind':24} {'n':>6} {'accuracy':>9} {'macro':>7} {'commonest answer':>17}"]
    for k in result.kinds:
        lines.append(f"{k.kind[:24]:24} {k.n:6} {k.accuracy:9.1%} {k.macro_accuracy:7.1%} {k.commonest_accuracy:17.1%}")
    lines.append(
        f"{'all':24} {result.n:6} {result.accuracy:9.1%} {result.macro_accuracy:7.1%} {result.commonest_accuracy:17.1%}"
    )
    _finish(result, lines, as_json, out)


@app.command()
def caption(
    predictions: Annotated[Path, typer.Argument(help="JSON or JSON lines: image_id, caption.")],
    references: Annotated[Path, typer.Argument(help="JSON or JSON lines: image_id, caption(s); or COCO.")],
    protocol: Annotated[str, typer.Option(help="simple or tokenised.")] = "simple",
    as_json: _JSON = False,
    out: _OUT = None,
) -> None:
    """BLEU, ROUGE-L, CIDEr-D and named attributes of captions."""
    result = evaluate("caption", predictions, references, protocol=protocol)
    lines = [f"exact    {result.exact:.1%} of {result.n}"]
    lines += [f"BLEU-{n}   {value:.3f}" for n, value in enumerate(result.bleu, 1)]
    lines += [f"ROUGE-L  {result.rouge_l:.3f}", f"CIDEr-D  {result.cider:.3f}"]
    lines += [
        f"{a.name:8} {a.accuracy:.1%} of {a.n} (macro {a.macro_accuracy:.1%}, commonest {a.commonest_accuracy:.1%})"
        for a in result.attributes
    ]
    _finish(result, lines, as_json, out)


def evaluate(name: str, *inputs: Any, **options: Any) -> Any:
    """What ``mmdiff eval NAME`` does, from Python.

    Args:
        name: ``fid``, ``vqa`` or ``caption``.
        *inputs: The two things to compare: paths as on the command line; ``fid`` also takes uint8 arrays [N, H, W, 3],
            ``vqa`` and ``caption`` also take what their ``score`` takes.
        **options: As the options of the command, such as ``features="inception"`` or ``protocol="vqav2"``.

    Returns:
        The measure's frozen dataclass: ``FidResult``, ``VqaResult`` or ``CaptionResult``.

    Raises:
        ConfigError: Unknown name, or inputs that cannot be scored.
    """
    if name not in MEASURES:
        raise ConfigError(f"measure {name!r}; known: {', '.join(MEASURES)}")
    if len(inputs) != 2:
        raise ConfigError(f"{name} compares two things, got {len(inputs)}")
    first, second = inputs
    if name == "fid":
        from eval.fid import compare

        return compare(first, second, **options)
    if name == "vqa":
        from eval import vqa as vqa_measure
        from eval.files import read_records

        given = read_records(first) if _is_path(first) else first
        truth = read_records(second, "annotations") if _is_path(second) else second
        return vqa_measure.score(given, truth, **options)
    from eval import caption as caption_measure

    if _is_path(first):
        return caption_measure.score_files(first, second, **options)
    return caption_measure.score(first, second, **options)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, Path))


def _finish(result: Any, lines: list[str], as_json: bool, out: Path | None) -> None:
    text = json.dumps(dataclasses.asdict(result), indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else "\n".join(lines))
