"""The files that people have, each with what happens to it and the tests that show it.

A test is named as its file under tests/, without test_ and .py, and its function without test_; a text in brackets
chooses the cases whose parameters begin with it.
"""

from __future__ import annotations

from typing import NamedTuple


class Situation(NamedTuple):
    """A kind of file, or what is done with one.

    Args:
        file: what the file is.
        happens: what happens to it.
        tests: the tests that show it, as `FILE::FUNCTION` or `FILE::FUNCTION[CASES`.
    """

    file: str
    happens: str
    tests: tuple[str, ...]


_PEFT, _LYCORIS = (
    "weights/adapters::peft_is_merged_as_by_peft",
    "weights/adapters::lycoris_is_merged_as_lycoris_computes",
)

WRONG_IN_SILENCE = (
    Situation(
        "LoRA with alpha_pattern and rank_pattern",
        "the scale of every module is PEFT's",
        ("weights/adapters::patterns_are_peft_s_regular_expressions", f"{_PEFT}[LoRA by patterns"),
    ),
    Situation(
        "LoRA whose header alone says alpha",
        "scaled by it; .alpha tensors and a declared configuration come first",
        ("weights/adapters::alpha_in_the_header_alone", "weights/adapters::the_order_of_what_says_alpha"),
    ),
    Situation(
        "a LoRA's scale",
        "reported by inspect and at loading",
        ("weights/adapters::the_log_at_loading_says_the_scale", "weights/adapters::many_ranks_and_scales_are_spans"),
    ),
    Situation(
        "UMT5 in float16",
        "wo stays in float32, as in transformers, and errs as transformers errs",
        ("text/umt5::float16_keeps_wide", "text/umt5::float16_beyond_its_range_errs"),
    ),
    Situation(
        "a transformer with parameters in float32 and 16 bits",
        "what stays wide is diffusers' list",
        ("weights/mixed_dtypes::what_stays_wide_is", "weights/mixed_dtypes::the_list_is_diffusers"),
    ),
    Situation(
        "a float16 model that overflows",
        "ends with a sentence that names chunk, dtype and the way out, and writes no black video",
        (
            "sampling/finite_chunks::a_float16_model_that_overflows",
            "sampling/finite_chunks::a_pipeline_gives_no_black_video",
            "sampling/finite_chunks::generate_ends_with_the_sentence_and_status_2",
            "sampling/finite_chunks::a_check_is_read_after_the_next_chunk",
        ),
    ),
    Situation("embeddings with NaN", "refused once a prompt", ("pipeline/options::embeddings_that_are_not_finite",)),
    Situation(
        "transformer/ and transformer_2/ with boundary_ratio",
        "both run; each step is made by the model that diffusers takes",
        ("pipeline/two_experts::each_step_is_made_by_the_model_that_diffusers_takes",),
    ),
    Situation(
        "high_noise_model/ and low_noise_model/",
        "both run, with the boundary of Wan's code",
        ("pipeline/two_experts::wans_own_folder_has_the_boundary_of_its_models",),
    ),
    Situation(
        "one of two experts, named itself",
        "read, and the other one is named",
        ("weights/models_beside::an_expert_that_is_named_itself", "weights/models_beside::files_of_experts_are_named"),
    ),
    Situation("PNG of 16 bits in grey", "scaled, 65535 to 255", ("io/pixel_formats::grey_of_16_bits_is_the_same",)),
    Situation(
        "pictures of every mode of Pillow",
        "converted, or refused by name",
        ("io/pixel_formats::every_mode_of_pillow", "io/pixel_formats::numbers_without_a_white_are_refused"),
    ),
    Situation(
        "pictures with alpha or a transparent colour",
        "composited on black",
        ("io/pixel_formats::a_transparent_colour_is_black", "io/pixel_formats::an_animated_picture_with_alpha"),
    ),
    Situation(
        "videos of every pixel format that the scaler has, 8 to 16 bits",
        "converted, or refused by name",
        (
            "io/pixel_formats::every_pixel_format_that_the_scaler_writes",
            "io/pixel_formats::formats_that_are_no_pixels_of_a_screen",
            "io/pixel_formats::pq_video_and_other_rotations_are_refused",
        ),
    ),
    Situation(
        "videos of limited and full range, BT.601, 709 and 2020",
        "converted by their own range and matrix",
        ("io/pixel_formats::range_matrix_and_depth",),
    ),
    Situation("rotation and mirroring in the metadata", "applied", ("io/pixel_formats::rotation_and_mirroring",)),
)

ADAPTERS = (
    Situation(
        "differences of modulations, as LightX2V writes them",
        "added, of blocks and head",
        ("weights/adapters::modulations_of_lightx2v",),
    ),
    Situation(
        "LoRA with the prefix of each trainer, over either layout",
        "merged",
        ("weights/adapters::every_prefix_over_either_layout", "weights/lora::every_spelling"),
    ),
    Situation(
        "LoRA of kohya's trainers and of ComfyUI",
        "merged as diffusers converts and merges it",
        ("weights/adapters::other_trainers_files_as_diffusers",),
    ),
    Situation(
        "LoRA as diffusers saves it", "merged as diffusers does", ("weights/adapters::what_diffusers_saves_with",)
    ),
    Situation("LoRA of PEFT, with and without rank stabilization", "as PEFT", (f"{_PEFT}[LoRA]", f"{_PEFT}[rsLoRA]")),
    Situation("DoRA of PEFT", "merged as PEFT merges it", (f"{_PEFT}[DoRA",)),
    Situation("LoHa of PEFT", "merged as PEFT merges it", (f"{_PEFT}[LoHa",)),
    Situation("LoKr of PEFT", "merged as PEFT merges it", (f"{_PEFT}[LoKr",)),
    Situation("LoCon and DoRA of LyCORIS", "merged as LyCORIS computes", (f"{_LYCORIS}[locon",)),
    Situation("LoHa of LyCORIS", "merged as LyCORIS computes", (f"{_LYCORIS}[loha",)),
    Situation("LoKr of LyCORIS", "merged as LyCORIS computes", (f"{_LYCORIS}[lokr",)),
    Situation("differences and norms of LyCORIS", "added", ("weights/adapters::lycoris_differences_and_norms",)),
    Situation(
        "a file with any one key of an adapter",
        "taken for an adapter by inspect",
        ("weights/adapters::any_adapter_key_makes_a_file_an_adapter",),
    ),
    Situation(
        "LoRA by --lora FILE:WEIGHT, recipe and from_pretrained",
        "merged with its weight",
        ("pipeline/options::the_weight_of_a_lora_is_given_everywhere",),
    ),
    Situation(
        "LoRA while a stream is open",
        "from the next chunk on; the bits return",
        (
            "pipeline/live_adapters::the_next_chunk_is_that_of_a_pipeline_loaded_with_the_lora",
            "pipeline/live_adapters::weights_move_chunk_by_chunk_and_the_bits_return",
        ),
    ),
    Situation(
        "image-to-video LoRA on a text-to-video model",
        "refused by name; on request its other keys are merged",
        ("weights/lora::an_image_to_video_lora_is_merged",),
    ),
)

STORED = (
    Situation(
        "all-in-one files, and a lone codec under a prefix",
        "each loader takes its own network",
        ("weights/networks::each_network_of_an_all_in_one_file", "weights/networks::a_codec_under_a_prefix"),
    ),
    Situation(
        "bytes that are no weight",
        "passed by, and listed by inspect",
        ("weights/stored_formats::what_is_no_weight_is_passed_by_and_listed",),
    ),
    Situation(
        "fp8 of ComfyUI with scales",
        "dequantized as ComfyUI does",
        ("weights/stored_formats::scaled_fp8", "weights/stored_formats::fp8_with_comfyui_s_notes"),
    ),
    Situation("plain casts to e4m3 and e5m2", "widened", ("weights/stored_formats::plain_casts_to_fp8",)),
    Situation("fp8 with --weights fp8", "kept as it is", ("weights/stored_formats::fp8_stays_fp8",)),
    *(
        Situation(f"GGUF, {kind}", "dequantized by the package gguf", (f"weights/stored_formats::gguf[{kind}]",))
        for kind in ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16")
    ),
    Situation(
        "GGUF whose patch embedding has five axes",
        "its shape comes from the metadata",
        ("weights/stored_formats::gguf_with_five_axes", "weights/stored_formats::diffusers_computes_the_same_from"),
    ),
    Situation(
        "UMT5 in fp8 and GGUF",
        "read; a tokenizer inside is passed by",
        ("weights/stored_formats::umt5_in_gguf", "weights/stored_formats::umt5_in_scaled_fp8"),
    ),
    Situation(
        "memory of loading",
        "at most 1.2 times the loaded model, GGUF and fp8 too",
        ("weights/load_memory::peak_memory_is_that_of_the_model",),
    ),
    Situation(
        "formats of other libraries (nvfp4, GPTQ, nunchaku, ...)",
        "refused by name",
        (
            "weights/quantized_formats::what_a_library_has_quantized",
            "weights/quantized_formats::other_writers_are_named",
        ),
    ),
)

NEWER = (
    Situation(
        "Wan 2.2 TI2V-5B in diffusers' layout",
        "the video is diffusers' own",
        ("pipeline/ti2v::text_to_video_is_diffusers_own",),
    ),
    Situation(
        "Wan 2.2 TI2V-5B in Wan's own folder",
        "the same video",
        ("pipeline/ti2v::wans_own_folder_makes_the_same_video",),
    ),
    Situation(
        "Wan2.2_VAE.pth",
        "diffusers' AutoencoderKLWan",
        ("codec/codec_weights::wan_2_2s_file_is_the_vae_that_diffusers_has",),
    ),
    Situation(
        "AutoencoderKLWan with patches and shortcuts",
        "streams both ways; the cut changes no bit",
        ("codec/codec::no_chunking_changes_a_bit[residual", "codec/wan_vae_model::patches_are_diffusers_own"),
    ),
    Situation("taew2_2", "read in its own shape", ("codec/taehv::a_file_is_read_in_the_shape_it_has",)),
    Situation("lighttae", "with latents before normalization", ("codec/taehv::light_files_have_latents",)),
    Situation(
        "a first frame for TI2V",
        "at timestep 0 within the first chunk, as in diffusers",
        ("pipeline/ti2v::an_image_is_the_first_frame_at_timestep_0_as_in_diffusers",),
    ),
    Situation(
        "plan and presets for stride 16",
        "take stride and rate from the VAE",
        ("planning/plan::wan_2_2s_strides_are_those_of_its_vae", "planning/plan::the_rate_is_that_of_the_codecs"),
    ),
    Situation(
        "LongLive-2.0-5B, Causal-Forcing++ in 1 and 2 steps",
        "presets with the published figures",
        ("weights/presets::published_figures", "weights/presets::a_path_speaks_for_a_preset"),
    ),
    Situation(
        "image-to-video by 36 channels",
        "the video is diffusers' own",
        ("pipeline/image_to_video::a_video_from_an_image_is_diffusers_own",),
    ),
    Situation(
        "image tokens (img_emb, k_img, v_img)",
        "computed as diffusers does",
        ("pipeline/image_to_video::image_tokens_are_diffusers_own", "weights/image_tokens::a_forward_is_diffusers_own"),
    ),
    Situation(
        "Wan's own file of the CLIP encoder",
        "computes what transformers computes",
        ("pipeline/image_to_video::wans_own_clip_file", "pipeline/image_to_video::a_folder_with_wans_clip_file"),
    ),
    Situation(
        "LoRAs for two experts",
        "each goes to its own, as in diffusers",
        ("pipeline/two_experts::each_has_loras_of_its_own", "pipeline/two_experts::which_of_the_two_a_lora_is_of"),
    ),
    Situation(
        "two experts in plan and preflight",
        "both are counted",
        ("pipeline/two_experts::both_are_counted_before_they_are_loaded",),
    ),
    Situation(
        "camera, action, pose, audio and control blocks",
        "refused; the message names what is missing",
        ("weights/other_families::what_a_checkpoint_needs_is_named",),
    ),
    Situation(
        "sessions, embeddings, coded videos, pictures and videos",
        "inspect says what they are",
        ("cli/inspect_and_verify::inspect_says_what_other", "cli/inspect_and_verify::inspect_names_a_picture"),
    ),
)

SECTIONS = {
    "what was wrong in silence": WRONG_IN_SILENCE,
    "adapters": ADAPTERS,
    "how weights are stored": STORED,
    "newer families": NEWER,
}
