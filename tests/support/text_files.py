"""Small UMT5 encoders and tokenizers in exactly the layouts that are published."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

WIDTH, HEADS, HEAD, GATED, LAYERS = 24, 3, 10, 40, 2  # heads × head is not the width, as nothing says it must be
BUCKETS = 32
SENTENCES = (
    "A red circle slides right over the hills, and a dog & its owner walk slowly in the golden light.",
    "the quick brown fox jumps over the lazy dog; 'slow' camera, 4k!",
    "une fille blonde à la fenêtre, “très” belle — naïve café, ﬁn",
    "红色的圆形向右滑动",
)

# Wan's names of what transformers calls otherwise, as Wan's own code declares its modules. Order matters.
TO_WAN = (
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.relative_attention_bias.", "pos_embedding.embedding."),
    ("layer.0.SelfAttention.", "attn."),
    ("layer.0.layer_norm.", "norm1."),
    ("layer.1.layer_norm.", "norm2."),
    ("layer.1.DenseReluDense.wi_0.", "ffn.gate.0."),
    ("layer.1.DenseReluDense.wi_1.", "ffn.fc1."),
    ("layer.1.DenseReluDense.wo.", "ffn.fc2."),
)


@functools.cache  # two trainings on the same text differ
def train_tokenizer() -> Tokenizer:
    """Unigram pieces as google/umt5's are: <pad>, </s>, <s>, <unk>, an end after every text, a normaliser."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_encoder(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=train_tokenizer().get_vocab_size() + 3,  # Wan's table has more rows than its tokenizer has tokens
        d_model=width,
        d_kv=HEAD,
        d_ff=GATED,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=BUCKETS,
    )
    torch.manual_seed(0)
    model = UMT5EncoderModel(config)
    for parameter in model.parameters():  # norms too, which otherwise hide a swap behind ones
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def wan_state(model: UMT5EncoderModel) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        for transformers, wan in TO_WAN:
            name = name.replace(transformers, wan)
        state[name] = tensor.clone()
    return state


def save_diffusers(folder: Path, model: UMT5EncoderModel, shard: str = "1GB") -> Path:
    """text_encoder/ and tokenizer/, as in a diffusers folder."""
    model.save_pretrained(folder / "text_encoder", max_shard_size=shard)
    save_tokenizer(folder / "tokenizer")
    return folder


def save_wan(folder: Path, model: UMT5EncoderModel) -> Path:
    """Wan's own folder: the .pth beside the transformer and the VAE, whose config.json says nothing of the text."""
    save_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(wan_state(model), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 12, "num_layers": 30, "dim": 1536, "eps": 1e-6}))
    return folder
