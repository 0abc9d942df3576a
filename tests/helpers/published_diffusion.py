"""Small DiT, SD3 and Muddit checkpoints: key names and fields written down here, not taken from mmdiff."""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]

DIT: dict[str, Any] = {
    "input_size": 6,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 5,
    "learn_sigma": True,
    "base_hidden_size": 12,
    "output_mult": 1.0,
}

SD3: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 4,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}

DIFFUSERS_DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 6,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 5,
    "norm_type": "ada_norm_zero",
}

SD3_SINGLE: dict[str, Any] = {
    "_class_name": "MMDiTX",
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 4,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}

MUDDIT: dict[str, Any] = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "axes_dims_rope": [2, 2, 4],
    "vocab_size": 10,
    "codebook_size": 8,
    "tokenizer_vocab_size": 7,
    "downsample": True,
    "upsample": True,
}


def linear(name: str, fan_out: int, *fan_in: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (fan_out, *fan_in)}
    return weight | ({f"{name}.bias": (fan_out,)} if bias else {})


def dit_shapes(c: dict[str, Any]) -> Shapes:
    d, p, side = c["hidden_size"], c["patch_size"], c["input_size"] // c["patch_size"]
    channels = c["in_channels"] * (2 if c["learn_sigma"] else 1)
    out: Shapes = {"pos_embed": (1, side**2, d), "y_embedder.embedding_table.weight": (c["num_classes"] + 1, d)}
    out |= linear("x_embedder.proj", d, c["in_channels"], p, p)
    out |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    for i in range(c["depth"]):
        out |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        out |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        out |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    out |= linear("final_layer.linear", p * p * channels, d)
    return out | linear("final_layer.adaLN_modulation.1", 2 * d, d)


def embedder_shapes(d: int, pooled: int, context: int) -> Shapes:
    embed = "time_text_embed"
    out = linear(f"{embed}.timestep_embedder.linear_1", d, 256) | linear(f"{embed}.timestep_embedder.linear_2", d, d)
    out |= linear(f"{embed}.text_embedder.linear_1", d, pooled) | linear(f"{embed}.text_embedder.linear_2", d, d)
    return out | linear("context_embedder", d, context)


def joint_shapes(top: str, d: int, head: int, *, norm: bool, dual: bool, last: bool) -> Shapes:
    out = linear(f"{top}.norm1.linear", (9 if dual else 6) * d, d)
    out |= linear(f"{top}.norm1_context.linear", (2 if last else 6) * d, d)
    ways = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    for name in ways if last else [*ways, "to_add_out"]:
        out |= linear(f"{top}.attn.{name}", d, d)
    for name in ("to_q", "to_k", "to_v", "to_out.0") if dual else ():
        out |= linear(f"{top}.attn2.{name}", d, d)
    norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
    for name in [*norms, *(["attn2.norm_q", "attn2.norm_k"] if dual else [])] if norm else []:
        out |= linear(f"{top}.{name}", head, bias=False)
    for name in ("ff",) if last else ("ff", "ff_context"):
        out |= linear(f"{top}.{name}.net.0.proj", 4 * d, d) | linear(f"{top}.{name}.net.2", d, 4 * d)
    return out


def sd3_shapes(c: dict[str, Any]) -> Shapes:
    head, p, n = c["attention_head_dim"], c["patch_size"], c["num_layers"]
    d = head * c["num_attention_heads"]
    out: Shapes = {"pos_embed.pos_embed": (1, c["pos_embed_max_size"] ** 2, d)}
    out |= linear("pos_embed.proj", d, c["in_channels"], p, p)
    out |= embedder_shapes(d, c["pooled_projection_dim"], c["joint_attention_dim"])
    for i in range(n):
        dual, norm = i in c["dual_attention_layers"], c["qk_norm"] is not None
        out |= joint_shapes(f"transformer_blocks.{i}", d, head, norm=norm, dual=dual, last=i == n - 1)
    return out | linear("norm_out.linear", 2 * d, d) | linear("proj_out", p * p * c["out_channels"], d)


def diffusers_dit_shapes(c: dict[str, Any]) -> Shapes:
    d, p = c["attention_head_dim"] * c["num_attention_heads"], c["patch_size"]
    out = linear("pos_embed.proj", d, c["in_channels"], p, p)
    for i in range(c["num_layers"]):
        top = f"transformer_blocks.{i}"
        embed = f"{top}.norm1.emb"
        out |= linear(f"{embed}.timestep_embedder.linear_1", d, 256) | linear(
            f"{embed}.timestep_embedder.linear_2", d, d
        )
        out[f"{embed}.class_embedder.embedding_table.weight"] = (c["num_embeds_ada_norm"] + 1, d)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            out |= linear(f"{top}.attn1.{name}", d, d)
        out |= linear(f"{top}.norm1.linear", 6 * d, d)
        out |= linear(f"{top}.ff.net.0.proj", 4 * d, d) | linear(f"{top}.ff.net.2", d, 4 * d)
    return out | linear("proj_out_1", 2 * d, d) | linear("proj_out_2", p * p * c["out_channels"], d)


def sd3_single_shapes(c: dict[str, Any]) -> Shapes:
    head, p, n = c["attention_head_dim"], c["patch_size"], c["num_layers"]
    d = head * c["num_attention_heads"]
    top = "model.diffusion_model"
    out: Shapes = {f"{top}.pos_embed": (1, c["pos_embed_max_size"] ** 2, d)}
    out |= linear(f"{top}.x_embedder.proj", d, c["in_channels"], p, p)
    for name, size in (("t_embedder", 256), ("y_embedder", c["pooled_projection_dim"])):
        out |= linear(f"{top}.{name}.mlp.0", d, size) | linear(f"{top}.{name}.mlp.2", d, d)
    out |= linear(f"{top}.context_embedder", d, c["joint_attention_dim"])
    for i in range(n):
        for stream in ("x_block", "context_block"):
            block, last = f"{top}.joint_blocks.{i}.{stream}", i == n - 1 and stream == "context_block"
            dual = i in c["dual_attention_layers"] and stream == "x_block"
            out |= linear(f"{block}.adaLN_modulation.1", (2 if last else 9 if dual else 6) * d, d)
            for attention in ("attn", "attn2") if dual else ("attn",):
                out |= linear(f"{block}.{attention}.qkv", 3 * d, d)
                out |= {} if last else linear(f"{block}.{attention}.proj", d, d)
                for norm in ("ln_q", "ln_k"):
                    out |= linear(f"{block}.{attention}.{norm}", head, bias=False)
            if not last:
                out |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
    out |= linear(f"{top}.final_layer.adaLN_modulation.1", 2 * d, d)
    return out | linear(f"{top}.final_layer.linear", p * p * c["out_channels"], d)


def muddit_shapes(c: dict[str, Any]) -> Shapes:
    head = c["attention_head_dim"]
    d = head * c["num_attention_heads"]
    out: Shapes = {"embed.embeddings.weight": (c["vocab_size"], d)}
    for name in ("embed.layer_norm", "project_to_hidden_norm", "project_from_hidden_norm", "mlm_layer.layer_norm"):
        out |= linear(name, d, bias=False)
    out |= linear("encoder_proj_layer_norm", d, bias=False)
    for name in ("embed.conv", "mlm_layer.conv1"):
        out |= linear(name, d, d, 1, 1, bias=False)
    out |= linear("mlm_layer.conv2", c["codebook_size"], d, 1, 1, bias=False)
    for name, conv in (("downsample", "down_block"), ("upsample", "up_block")):
        if c[name]:
            out |= linear(f"{conv}.{name}.norm", d, bias=False) | linear(f"{conv}.{name}.conv", d, d, 2, 2, bias=False)
    out |= linear("project_to_hidden", d, d, bias=False) | linear("project_from_hidden", d, d, bias=False)
    out |= linear("cond_embed.linear_1", d, c["pooled_projection_dim"] + 1280, bias=False)
    out |= linear("cond_embed.linear_2", d, d, bias=False)
    out |= embedder_shapes(d, d, c["joint_attention_dim"])
    for i in range(c["num_layers"]):
        out |= joint_shapes(f"transformer_blocks.{i}", d, head, norm=True, dual=False, last=False)
    for i in range(c["num_single_layers"]):
        top = f"single_transformer_blocks.{i}"
        out |= linear(f"{top}.norm.linear", 3 * d, d) | linear(f"{top}.proj_mlp", 4 * d, d)
        out |= linear(f"{top}.proj_out", d, 5 * d)
        for name in ("to_q", "to_k", "to_v"):
            out |= linear(f"{top}.attn.{name}", d, d)
        out |= linear(f"{top}.attn.norm_q", head, bias=False) | linear(f"{top}.attn.norm_k", head, bias=False)
    return out | linear("text_decoder.1", c["tokenizer_vocab_size"], d, bias=False)
