"""The key layout of Wan's own code, which Self-Forcing's checkpoints have too."""

from __future__ import annotations

from causalrope_sp.weights.key_layout import Layout, linear

WAN = Layout(
    name="wan",
    marker="self_attn",
    outer={
        **linear("patch_embedding", "patch_embedding"),
        **linear("text_embedding.0", "text_embedding.0"),
        **linear("text_embedding.2", "text_embedding.2"),
        **linear("time_embedding.0", "time_embedding.0"),
        **linear("time_embedding.2", "time_embedding.2"),
        **linear("time_projection.1", "time_projection.1"),
        **linear("head.linear", "head.head"),
        "head.modulation": ("head.modulation",),
    },
    block={
        "modulation": ("modulation",),
        **linear("self_attn.qkv", "self_attn.q", "self_attn.k", "self_attn.v"),
        **linear("self_attn.out", "self_attn.o"),
        "self_attn.norm_q.weight": ("self_attn.norm_q.weight",),
        "self_attn.norm_k.weight": ("self_attn.norm_k.weight",),
        **linear("cross_norm", "norm3"),
        **linear("cross_attn.q", "cross_attn.q"),
        **linear("cross_attn.kv", "cross_attn.k", "cross_attn.v"),
        **linear("cross_attn.out", "cross_attn.o"),
        "cross_attn.norm_q.weight": ("cross_attn.norm_q.weight",),
        "cross_attn.norm_k.weight": ("cross_attn.norm_k.weight",),
        **linear("ffn.up", "ffn.0"),
        **linear("ffn.down", "ffn.2"),
    },
    image_outer={
        **linear("image_embedding.0", "img_emb.proj.0"),
        **linear("image_embedding.1", "img_emb.proj.1"),
        **linear("image_embedding.3", "img_emb.proj.3"),
        **linear("image_embedding.4", "img_emb.proj.4"),
    },
    image_block={
        **linear("cross_attn.kv_image", "cross_attn.k_img", "cross_attn.v_img"),
        "cross_attn.norm_k_image.weight": ("cross_attn.norm_k_img.weight",),
    },
    config_names={"in_channels": "in_dim"},
)
