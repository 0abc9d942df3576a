"""MMaDA's sequence layouts, masking and joint loss: fixture ``mmada_prompts``.

Every entry of the fixture has a rule in `RULES`; one without a rule fails.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.batch import IGNORE
from mmdiff.diffusion import bounds, masking, objectives
from mmdiff.text.mmada import Row, Scripts, SpecialIds
from tests.helpers.golden import rule

NAME = "mmada_prompts"

RULES = {
    r"image\.(input_ids|labels)": "exact",
    r"(t2i|t2i_gen|t2i_uncond|lm|lm_chat|mmu|r2i)\.(input_ids|labels|attention_mask|prompt_mask)": "exact",
    r"(lm|lm_chat|mmu)\.(noisy|answer_length)": "exact",
    r"image\.mask_prob|(lm|lm_chat|mmu)\.p_mask": "close",
    r"loss\.(t2i|lm|mmu|r2i|lm_no_answer_length|grad)": "weighted",
}
INPUTS = (
    r"chat_ids|text_ids|image_ids|image\.(u_t|u_order)|t2i\.u_drop|(mmu|lm|lm_chat)\.(u_t|u_mask)"
    r"|loss\.(logits|input_ids|labels|(p_mask|answer)_(lm|mmu|r2i))"
)
TREE = {
    "tokenizer", "reserved", "mask_id", "codebook_size", "image_tokens", "max_text_len", "cond_dropout_prob",
    "lm_max_seq_len", "ignore_id", "loss",
}  # fmt: skip
TOLERANCES = {"close": 2e-4, "weighted": 1e-3}


@pytest.fixture(scope="module")
def ours(tree: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scripts = Scripts(special(tree), tree["max_text_len"])
    return {**images(tree, inputs), **rows(scripts, tree, inputs, outputs), **joint(tree, inputs)}


def special(tree: dict[str, Any]) -> SpecialIds:
    t, r = tree["tokenizer"], tree["reserved"]
    named = {n: r[f"<|{n}|>"] for n in ("soi", "eoi", "t2i", "mmu", "r2i")}
    return SpecialIds(bos=t["bos"], eos=t["eos"], end_header=t["end_header"], ipad=r["[iPAD]"], **named)


def lists(padded: Tensor) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in padded.tolist()]


def images(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    share = masking.masked_share(inputs["image.u_t"]).clamp_min(0)
    masked = masking.permuted_mask(share, inputs["image.u_order"].argsort(1))
    return {
        "image.mask_prob": share,
        "image.input_ids": inputs["image_ids"].masked_fill(masked, tree["mask_id"]),
        "image.labels": inputs["image_ids"].masked_fill(~masked, tree["ignore_id"]),
    }


def rows(scripts: Scripts, tree: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All layouts; how many rows a layout has is told by the expected result."""
    texts, chats = lists(inputs["text_ids"]), lists(inputs["chat_ids"])
    noised, codes = images(tree, inputs), inputs["image_ids"].tolist()
    blank = [tree["mask_id"]] * tree["image_tokens"]
    drop, length = (inputs["t2i.u_drop"] < tree["cond_dropout_prob"]).tolist(), tree["lm_max_seq_len"]
    ids, labels = noised["image.input_ids"].tolist(), noised["image.labels"].tolist()
    made: dict[str, list[Row]] = {
        "t2i": [scripts.text_to_image(t, i, y, drop=d) for t, i, y, d in zip(texts, ids, labels, drop, strict=True)],
        "t2i_gen": [scripts.text_to_image(t, blank) for t in texts],
        "t2i_uncond": [scripts.text_to_image([], blank)] * len(outputs["t2i_uncond.input_ids"]),
        "lm": [scripts.plain(t, length) for t in texts],
        "lm_chat": [scripts.chat(t, length) for t in chats],
        "mmu": [scripts.understanding(i, t) for i, t in zip(codes, chats, strict=False)],
        "r2i": [scripts.reasoning_to_image(t, i) for i, t in zip(codes, chats, strict=False)],
    }
    out: dict[str, Tensor] = {}
    for name, laid in made.items():
        out[f"{name}.input_ids"] = torch.tensor([r.ids for r in laid], dtype=torch.int32)
        out[f"{name}.labels"] = torch.tensor([r.labels for r in laid], dtype=torch.int32)
        out[f"{name}.attention_mask"] = torch.tensor([r.valid for r in laid]).int()
        given = torch.tensor([r.prompt for r in laid])
        out[f"{name}.prompt_mask"] = given.float() if name == "r2i" else given.int()
        if f"{name}.u_t" in inputs:
            p = masking.mask_probability(inputs[f"{name}.u_t"])
            masked = masking.independent_mask(p, inputs[f"{name}.u_mask"], ~given)
            out[f"{name}.noisy"] = out[f"{name}.input_ids"].masked_fill(masked, tree["mask_id"])
            out[f"{name}.p_mask"] = p
            out[f"{name}.answer_length"] = (~given).sum(1).clamp_min(1).int()
    return {k: v for k, v in out.items() if k in outputs}


def joint(tree: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    options, logits = tree["loss"], inputs["loss.logits"].clone().requires_grad_()
    ids, labels = inputs["loss.input_ids"].long(), inputs["loss.labels"].long()
    parts = ("t2i", "lm", "mmu", "r2i")
    sizes = [options[f"batch_{n}"] for n in parts]
    pieces = dict(zip(parts, zip(logits.split(sizes), ids.split(sizes), labels.split(sizes), strict=True), strict=True))
    first = options["max_seq_length"] + 1
    image, learnt = pieces["t2i"][0][:, first:], pieces["t2i"][2][:, first:]
    entropy = objectives.cross_entropy(image[learnt != IGNORE], learnt[learnt != IGNORE])
    losses = {"t2i": objectives.mean_of(entropy)}
    extra = torch.zeros(())
    for name in parts[1:]:
        rows, given, targets = pieces[name]
        masked = given == options["mask_id"]
        p, lengths = inputs[f"loss.p_mask_{name}"], inputs[f"loss.answer_{name}"]
        entropy = torch.zeros(given.shape)
        entropy[masked] = objectives.cross_entropy(rows[masked], targets[masked])
        losses[name] = bounds.masked_sum(entropy, masked, 1 / p / lengths).mean()
        if name == "lm":
            extra = bounds.masked_sum(entropy, masked, 1 / p).sum() / masked.numel()
    torch.stack([options["coeffs"][n] * v for n, v in losses.items()]).sum().backward()
    out = {f"loss.{n}": v.detach() for n, v in losses.items()}
    return out | {"loss.lm_no_answer_length": extra.detach(), "loss.grad": logits.grad}


def test_output_follows_its_rule(output, ours, outputs):
    kind, mine, expected = rule(RULES, output), ours[output], outputs[output]
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    if kind == "exact":
        assert torch.equal(mine, expected)
    else:
        scale = float(expected.abs().max()) if output.endswith("grad") else max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(mine, expected, atol=TOLERANCES[kind] * scale, rtol=0)


def test_every_input_and_option_is_used(inputs, tree):
    assert not [n for n in inputs if not re.fullmatch(INPUTS, n)]
    assert set(tree) == TREE
    assert set(tree["loss"]["coeffs"]) == {"t2i", "lm", "mmu", "r2i"}
    assert tree["ignore_id"] == IGNORE


def test_codes_lie_behind_the_tokenizer(tree, inputs):
    codes = inputs["image_ids"] - tree["tokenizer"]["length"]
    assert bool((codes >= 0).all())
    assert bool((codes < tree["codebook_size"]).all())


def test_published_ids_are_the_defaults():
    """A sibling set may have others; these are the ones of the checkpoints."""
    s = SpecialIds()
    assert (s.bos, s.eos, s.soi, s.eoi, s.t2i, s.mmu, s.ipad, s.r2i, s.end_header) == (
        126080, 126081, 126084, 126085, 126088, 126089, 126093, 126094, 126347
    )  # fmt: skip
