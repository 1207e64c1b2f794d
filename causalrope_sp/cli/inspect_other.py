"""What `causalrope-sp inspect` says of this library's files that are no models."""

from __future__ import annotations

from pathlib import Path

from causalrope_sp.errors import CheckpointError, escaped_line, printable


def other_file(path: str) -> str | None:
    """Describes a saved session, prompt embeddings, a compressed video, a policy or a VIN in one sentence, without a
    model.

    Args:
        path: the file.

    Returns:
        The sentence; None for every other file, folder or name.

    Raises:
        CheckpointError: a saved session, embeddings or the settings of a VIN are damaged.
        ConfigError: a file of windows of heads, or a policy of reuse, has wrong fields.
        InputError: the header of a compressed video is damaged.
    """
    file = Path(path)
    try:
        if not file.is_file():
            return None
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError:
        return None  # whoever reads it as a model says why
    if start.startswith(b"CVC"):
        return _compressed(file)
    if start.lstrip().startswith((b"{", b"[")):
        return _policy(file)
    return _of_safetensors(file) if start[8:] == b"{" else None


def _compressed(file: Path) -> str:
    from causalrope_sp.compression.bitstream import LARGEST_HEADER, Header

    with file.open("rb") as stream:
        header, _ = Header.read(stream.read(LARGEST_HEADER + 16))
    return (
        f"a video of {header.height}×{header.width} pixels at {header.fps:g} fps that `causalrope-sp compress` coded "
        f'with the model whose digest begins with {printable(header.model)}, under the prompt "'
        f'{escaped_line(header.prompt)}"; `causalrope-sp decompress` decodes it'
    )


def _policy(file: Path) -> str | None:
    from causalrope_sp.heads.policy import heads_of
    from causalrope_sp.heads.policy_file import forcing_kv_heads
    from causalrope_sp.io.json_files import read_value
    from causalrope_sp.reuse.policy_file import find_policy

    try:
        fields = read_value(file)
    except ValueError:
        return None
    named = isinstance(fields, dict)
    if named and "windows" in fields:
        heads, shortened = heads_of(fields), "with a window or rows of their own"
    elif not named or "layers" in fields:
        try:
            heads, shortened = forcing_kv_heads(fields, static=1), "static, in the form of Forcing-KV"
        except ValueError:
            return None
    else:
        return f"a policy of reuse, for `--reuse`: {len(find_policy(file).rules)} rules" if "rules" in fields else None
    return (
        f"windows of heads, for `--heads`: {len(heads.windows)} layers of {len(heads.windows[0])} heads, "
        f"{heads.shortened} of them {shortened}"
    )


def _of_safetensors(file: Path) -> str | None:
    from causalrope_sp.sessions import read_session
    from causalrope_sp.sessions.session_file import FORMAT
    from causalrope_sp.text.embeds import load_embeds
    from causalrope_sp.vin.vin_weights import LAYOUT, OLD_LAYOUT
    from causalrope_sp.weights.tensor_files import WeightFiles

    try:
        files = WeightFiles(file)
    except CheckpointError:
        return None
    if [*files.tensors] == ["prompt_embeds"]:
        found = load_embeds(file)
        by = f" by {escaped_line(found.encoder)}" if found.encoder else ""
        what = f'of the prompt "{escaped_line(found.prompt)}"' if found.prompt else "of a prompt"
        return f"embeddings {what}{by}, {found.length} tokens of {found.embeds.shape[2]} numbers, for `--text-embeds`"
    if files.metadata.get("layout") in (LAYOUT, OLD_LAYOUT):
        return _vin(file)
    if files.metadata.get("format") != FORMAT:
        return None
    saved = read_session(file)
    prompt = saved.prompts[-1].prompt
    said = "given embeddings" if prompt is None else f'the prompt "{escaped_line(prompt)}"'
    loras = escaped_line(", ".join(saved.loras)) or "no LoRA"
    cache = "with" if saved.cache is not None else "without"
    return (
        f"a session of {saved.height}×{saved.width} pixels that was saved after {saved.shown} chunks under {said}, "
        f"{cache} keys and values, of the model with the digest {saved.model_digest}, with {loras}; `pipe.resume` goes "
        "on with it"
    )


def _vin(file: Path) -> str:
    from causalrope_sp.vin.vin_weights import read_vin_settings

    config, chunks = read_vin_settings(file)
    guidance = f", guided at a scale of {chunks.global_guidance_scale:g}" if chunks.global_guidance_scale != 1 else ""
    return (
        f"a Video Interface Network of {config.global_tokens} global tokens of width {config.dim}, for parallel chunks "
        f'of {chunks.chunk_frames} latent frames{guidance}; a model configuration names it as `"vin"`'
    )
