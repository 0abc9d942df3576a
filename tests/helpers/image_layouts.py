"""Key names and shapes of published image-token models and tokenizers, written down here, not taken from mmdiff."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int) -> Shapes:
    """Weight and bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def emigm_shapes(c: dict[str, Any]) -> Shapes:
    e, d, w = c["encoder_embed_dim"], c["decoder_embed_dim"], c["diffloss_w"]
    n = (c["img_size"] // c["vae_stride"] // c["patch_size"]) ** 2
    token, slots, net = c["vae_embed_dim"] * c["patch_size"] ** 2, n + c["buffer_size"], "diffloss.net"
    out: Shapes = {
        "fake_latent": (1, e),
        "mask_token": (1, 1, d),
        "encoder_pos_embed_learned": (1, slots, e),
        "decoder_pos_embed_learned": (1, slots, d),
        "diffusion_pos_embed_learned": (1, n, d),
        "class_emb.weight": (c["class_num"], e),
        **affine("z_proj", e, token),
        **affine("z_proj_ln", e),
        **affine("encoder_norm", e),
        **affine("decoder_norm", d),
        **affine("decoder_embed", d, e),
        **affine(f"{net}.time_embed.mlp.0", w, 256),
        **affine(f"{net}.time_embed.mlp.2", w, w),
        **affine(f"{net}.cond_embed", w, d),
        **affine(f"{net}.input_proj", w, token),
        **affine(f"{net}.final_layer.linear", 2 * token, w),
        **affine(f"{net}.final_layer.adaLN_modulation.1", 2 * w, w),
    }
    for part, width in (("encoder", e), ("decoder", d)):
        for i in range(c[f"{part}_depth"]):
            block = f"{part}_blocks.{i}"
            out |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
            out |= affine(f"{block}.attn.qkv", 3 * width, width) | affine(f"{block}.attn.proj", width, width)
            out |= affine(f"{block}.mlp.fc1", 4 * width, width) | affine(f"{block}.mlp.fc2", width, 4 * width)
    for i in range(c["diffloss_d"]):
        block = f"{net}.res_blocks.{i}"
        out |= affine(f"{block}.in_ln", w) | affine(f"{block}.adaLN_modulation.1", 3 * w, w)
        out |= affine(f"{block}.mlp.0", w, w) | affine(f"{block}.mlp.2", w, w)
    return out


def maskgit_v1_shapes(c: dict[str, Any]) -> Shapes:
    d, n, f = c["hidden_dim"], c["input_size"] ** 2, c["mlp_dim"]
    entries = c["codebook_size"] + 1 + c["nclass"] + 1
    out: Shapes = {"tok_emb.weight": (entries, d), "pos_emb": (1, n + 1, d), "bias": (n + 1, entries)}
    for name, linears, norms in (("first_layer", (2, 6), (0, 4)), ("last_layer", (2,), (0, 4))):
        for i in linears:
            out |= affine(f"{name}.{i}", d, d)
        for i in norms:
            out |= affine(f"{name}.{i}", d)
    for i in range(c["depth"]):
        layer = f"transformer.layers.{i}"
        out |= affine(f"{layer}.0.norm", d) | affine(f"{layer}.1.norm", d)
        out |= {f"{layer}.0.fn.mha.in_proj_weight": (3 * d, d), f"{layer}.0.fn.mha.in_proj_bias": (3 * d,)}
        out |= affine(f"{layer}.0.fn.mha.out_proj", d, d)
        out |= affine(f"{layer}.1.fn.net.0", f, d) | affine(f"{layer}.1.fn.net.3", d, f)
    return out


def maskgit_v2_shapes(c: dict[str, Any]) -> Shapes:
    d, n, k = c["hidden_dim"], c["input_size"] ** 2, c["codebook_size"]
    f = 256 * math.ceil(int(2 * c["mlp_dim"] / 3) / 256)
    out: Shapes = {
        "cls_emb.weight": (c["nclass"] + 1, d),
        "tok_emb.weight": (k + 1, d),
        "pos_emb.weight": (n, d),
        "reg_tokens.weight": (c["register"], d),
        "head.weight": (k + 1, d),
        "head.bias": (k + 1,),
        **affine("last_norm.norm_final", d),
        **affine("last_norm.mlp.1", 2 * d, d),
    }
    for i in range(c["depth"]):
        layer = f"transformer.layers.{i}"
        out |= affine(f"{layer}.mlp.1", 6 * d, d) | {f"{layer}.ln1.weight": (d,), f"{layer}.ln2.weight": (d,)}
        out |= {f"{layer}.attn.{name}.weight": (d, d) for name in ("wq", "wk", "wv", "wo")}
        out |= {f"{layer}.ff.w1.weight": (f, d), f"{layer}.ff.w2.weight": (d, f), f"{layer}.ff.w3.weight": (f, d)}
    return out


def resnet(name: str, width: int, out: int) -> Shapes:
    shapes = affine(f"{name}.norm1", width) | affine(f"{name}.norm2", out)
    shapes |= affine(f"{name}.conv1", out, width, 3, 3) | affine(f"{name}.conv2", out, out, 3, 3)
    return shapes | (affine(f"{name}.nin_shortcut", out, width, 1, 1) if width != out else {})


def attention(name: str, width: int) -> Shapes:
    shapes = affine(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= affine(f"{name}.{part}", width, width, 1, 1)
    return shapes


def convolutional(c: dict[str, Any], encoded: int, features: int, llamagen: bool) -> Shapes:
    """Two levels, no attention in taming's form at these sizes; LlamaGen attends in the last."""
    base, blocks = c["ch"], c.get("num_res_blocks", 2)
    widths = [base * m for m in c["ch_mult"]]
    middle = ("0", "1", "2") if llamagen else ("block_1", "attn_1", "block_2")
    block, down, up = ("res", "conv_blocks", "conv_blocks") if llamagen else ("block", "down", "up")
    out = affine("encoder.conv_in", base, 3, 3, 3) | affine("decoder.conv_out", 3, base, 3, 3)
    out |= affine("encoder.conv_out", encoded, widths[-1], 3, 3) | affine("decoder.conv_in", widths[-1], features, 3, 3)
    out |= affine("encoder.norm_out", widths[-1]) | affine("decoder.norm_out", base)
    for side in ("encoder", "decoder"):
        out |= resnet(f"{side}.mid.{middle[0]}", widths[-1], widths[-1])
        out |= attention(f"{side}.mid.{middle[1]}", widths[-1])
        out |= resnet(f"{side}.mid.{middle[2]}", widths[-1], widths[-1])
    last = len(widths) - 1
    for i, width in enumerate(widths):
        before, below = ([base, *widths][i], [*widths, widths[-1]][i + 1])
        theirs = last - i if llamagen else i
        for j in range(blocks):
            out |= resnet(f"encoder.{down}.{i}.{block}.{j}", before if j == 0 else width, width)
        for j in range(blocks + 1):
            out |= resnet(f"decoder.{up}.{theirs}.{block}.{j}", below if j == 0 else width, width)
        if llamagen and i == last:
            for j in range(blocks):
                out |= attention(f"encoder.{down}.{i}.attn.{j}", width)
            for j in range(blocks + 1):
                out |= attention(f"decoder.{up}.{theirs}.attn.{j}", width)
        if i < last:
            out |= affine(f"encoder.{down}.{i}.downsample.conv", width, width, 3, 3)
        if i > 0:
            out |= affine(f"decoder.{up}.{theirs}.upsample.conv", width, width, 3, 3)
    return out


def kl16_shapes(c: dict[str, Any]) -> Shapes:
    e = c["embed_dim"]
    ends = affine("quant_conv", 2 * e, 2 * e, 1, 1) | affine("post_quant_conv", e, e, 1, 1)
    return convolutional(c, 2 * e, e, llamagen=False) | ends


def vq_shapes(c: dict[str, Any]) -> Shapes:
    e, z = c.get("embed_dim", 8), c["z_channels"]
    ends = affine("quant_conv", e, z, 1, 1) | affine("post_quant_conv", z, e, 1, 1)
    ends["quantize.embedding.weight"] = (c["n_embed"], e)
    return convolutional(c, z, z, llamagen="embed_dim" not in c) | ends


def dc_ae_shapes(c: dict[str, Any]) -> Shapes:
    """diffusers' own names, from its class."""
    from diffusers import AutoencoderDC

    known = inspect.signature(AutoencoderDC.__init__).parameters
    given = {k: v for k, v in c.items() if k in known}
    return {k: tuple(v.shape) for k, v in AutoencoderDC(**given).state_dict().items()}


def magvit_shapes(c: dict[str, Any]) -> Shapes:
    """Two halves with block counts of their own, and two buffers."""
    e, d = c["encoder"], c["decoder"]
    bits, widths = e["z_channels"], [e["ch"] * m for m in e["ch_mult"]]
    out = affine("encoder.conv_in", e["ch"], 3, 3, 3)
    before = e["ch"]
    for i, width in enumerate(widths):
        for j in range(e["num_res_blocks"][i]):
            out |= resnet(f"encoder.down.{i}.block.{j}", before, width)
            before = width
        if i + 1 < len(widths):
            out |= affine(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    out |= affine("encoder.norm_out", before) | affine("encoder.conv_out", bits, before, 3, 3)
    out |= affine("encoder.quant_conv", bits, bits, 1, 1) | affine("decoder.post_quant_conv", bits, bits, 1, 1)
    top, widths = before, [d["ch"] * m for m in d["ch_mult"]]
    before = widths[-1]
    out |= affine("decoder.conv_in", before, bits, 3, 3)
    for side, width in (("encoder", top), ("decoder", before)):
        for part in ("block_1", "block_2"):
            out |= resnet(f"{side}.mid.{part}", width, width)
        out |= attention(f"{side}.mid.attn_1", width)
    for i in reversed(range(len(widths))):
        for j in range(d["num_res_blocks"][i]):
            out |= resnet(f"decoder.up.{i}.block.{j}", before, widths[i])
            before = widths[i]
        if i:
            out |= affine(f"decoder.up.{i}.upsample.conv", before, before, 3, 3)
    out |= affine("decoder.norm_out", before) | affine("decoder.conv_out", 3, before, 3, 3)
    return out | {"quantize.embedding": (2**bits, bits), "quantize.power_vals": (bits,)}


def amused_shapes(c: dict[str, Any]) -> Shapes:
    """What diffusers' class has at these sizes."""
    from diffusers import VQModel

    names = inspect.signature(VQModel).parameters
    module = VQModel(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items() if k in names})
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


SHAPES: dict[str, Callable[[dict[str, Any]], Shapes]] = {
    "emigm": emigm_shapes,
    "maskgit-v1": maskgit_v1_shapes,
    "maskgit-v2": maskgit_v2_shapes,
    "kl16": kl16_shapes,
    "dc-ae": dc_ae_shapes,
    "taming": vq_shapes,
    "llamagen": vq_shapes,
    "magvit-v2": magvit_shapes,
    "amused-vq": amused_shapes,
}
