#!/usr/bin/env bash
# Library    diffusers 0.42.1 (PyramidAttentionBroadcastConfig with WanPipeline), torch 2.13.0.
#
# Expected   Reusing cross-attention between denoising steps makes a guided video a little less exact. WanPipeline runs
#            its conditional and its unconditional pass one after the other and marks them with
#            transformer.cache_context("cond") and ("uncond"), so each reuses what it computed itself.
#
# Seen       The hook has one store and one counter an attention layer, knows nothing of contexts, and counts calls
#            of the model, not steps. With a range of 2 every second call is the unconditional one, and it is given
#            the conditional output of the same step. Both predictions are then equal to the bit: guidance does
#            nothing, the negative prompt does nothing, and the result is, to the bit, that of guidance_scale=1
#            without any cache. Both passes are still run and paid for. A range of 3, which is not even, crosses the
#            branches as well, and guidance is not lost but wrong. No warning. Pipelines that put both branches into
#            one batch (CogVideoX, which the documentation shows) are not concerned, and FirstBlockCache with the same
#            pipeline keeps the branches apart.
#
# Output, 2026-11-28:
#   no cache: guidance 5 against 1, largest difference of latents 0.93
#   FirstBlockCache, threshold 0: guidance 5 as without a cache: True
#   PAB, range 2: guidance 5 as guidance 1 without a cache: True
#   PAB, range 2: another negative prompt, the same latents: True
#   PAB, range 3: guidance 5 nearer to guidance 1 than to guidance 5: True
#   as seen on 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 \
    numpy==2.4.6 ftfy==6.3.1

cat > "$work/run.py" <<'PYTHON'
import torch
from diffusers import (
    AutoencoderKLWan,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

# A Wan model with all its parts, only small, and with random weights: how passes are cached does not depend on them.
torch.manual_seed(0)
transformer = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
    freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
).eval()
vae = AutoencoderKLWan(
    base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
)
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
pipe.set_progress_bar_config(disable=True)
prompt, negative, other_negative = torch.randn(3, 1, 12, 32).unbind()


def latents(guidance, cache=None, negative=negative):
    if cache is not None:
        transformer.enable_cache(cache)
    made = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=guidance, height=32, width=32,
        num_frames=9, num_inference_steps=10, generator=torch.Generator().manual_seed(1), output_type="latent",
    ).frames
    if cache is not None:
        transformer.disable_cache()
    return made


def pab(skip_range):
    return PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=skip_range,
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def apart(a, b):
    return (a - b).abs().max().item()


plain, unguided = latents(5.0), latents(1.0)
print(f"no cache: guidance 5 against 1, largest difference of latents {apart(plain, unguided):.2f}")

first_block_kept = torch.equal(latents(5.0, FirstBlockCacheConfig(threshold=0.0)), plain)
print("FirstBlockCache, threshold 0: guidance 5 as without a cache:", first_block_kept)

two = latents(5.0, pab(2))
erased = torch.equal(two, unguided)
print("PAB, range 2: guidance 5 as guidance 1 without a cache:", erased)

deaf = torch.equal(latents(5.0, pab(2), negative=other_negative), two)
print("PAB, range 2: another negative prompt, the same latents:", deaf)

three = latents(5.0, pab(3))
wrong = apart(three, unguided) < apart(three, plain)
print("PAB, range 3: guidance 5 nearer to guidance 1 than to guidance 5:", wrong)

# Without a cache guidance and the negative prompt do matter here.
matters = apart(plain, unguided) > 0.1 and apart(plain, latents(5.0, negative=other_negative)) > 0.01
if not (matters and first_block_kept and erased and deaf and wrong):
    raise SystemExit("no longer as seen on 2026-11-28")
print("as seen on 2026-11-28")
PYTHON
"$work/venv/bin/python" -W ignore "$work/run.py"
