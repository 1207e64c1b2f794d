"""The key layout of diffusers' `WanTransformer3DModel`."""

from __future__ import annotations

from causalrope_sp.weights.key_layout import Layout, linear

DIFFUSERS = Layout(
    name="diffusers",
    marker="attn1",
    outer={
        **linear("patch_embedding", "patch_embedding"),
        **linear("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        **linear("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        **linear("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        **linear("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        **linear("time_projection.1", "condition_embedder.time_proj"),
        **linear("head.linear", "proj_out"),
        "head.modulation": ("scale_shift_table",),
    },
    block={
        "modulation": ("scale_shift_table",),
        **linear("self_attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
        **linear("self_attn.out", "attn1.to_out.0"),
        "self_attn.norm_q.weight": ("attn1.norm_q.weight",),
        "self_attn.norm_k.weight": ("attn1.norm_k.weight",),
        **linear("cross_norm", "norm2"),
        **linear("cross_attn.q", "attn2.to_q"),
        **linear("cross_attn.kv", "attn2.to_k", "attn2.to_v"),
        **linear("cross_attn.out", "attn2.to_out.0"),
        "cross_attn.norm_q.weight": ("attn2.norm_q.weight",),
        "cross_attn.norm_k.weight": ("attn2.norm_k.weight",),
        **linear("ffn.up", "ffn.net.0.proj"),
        **linear("ffn.down", "ffn.net.2"),
    },
    image_outer={
        **linear("image_embedding.0", "condition_embedder.image_embedder.norm1"),
        **linear("image_embedding.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        **linear("image_embedding.3", "condition_embedder.image_embedder.ff.net.2"),
        **linear("image_embedding.4", "condition_embedder.image_embedder.norm2"),
    },
    image_block={
        **linear("cross_attn.kv_image", "attn2.add_k_proj", "attn2.add_v_proj"),
        "cross_attn.norm_k_image.weight": ("attn2.norm_added_k.weight",),
    },
    config_names={"num_heads": "num_attention_heads"},
    # `WanTransformer3DModel._keep_in_fp32_modules`, copied because importing diffusers takes seconds; a test compares
    wide_modules=frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}),
)
