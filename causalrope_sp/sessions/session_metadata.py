"""The fields of a saved session as JSON, and back. Whatever a file says, wrong values are refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, fields
from typing import Any, TypeVar

from torch import Tensor

from causalrope_sp.checks import check_choice, check_flag, check_names, check_number, check_text, check_whole, shown
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.config import SamplerConfig, StreamConfig, check_similar, stream_fields
from causalrope_sp.errors import ConfigError, printable
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.policy import heads_of
from causalrope_sp.sessions.saved_parts import (
    CACHE_DTYPES,
    PromptUse,
    ReadLayer,
    SavedBranch,
    SavedCache,
    SavedDecoder,
    SavedTexts,
)
from causalrope_sp.sessions.saved_session import SavedSession
from causalrope_sp.weights.messages import some

T = TypeVar("T")
_PLAIN = (
    *("model_digest", "height", "width", "dtype", "seed", "text_seed", "num_frames", "first_chunk", "shown"),
    *("next_chunk", "next_frame", "negative_prompt", "context_frames", "reuse", "history", "kept_chunks", "library"),
)
_NAMES = {dtype: name for name, dtype in CACHE_DTYPES.items()}
_LATENTS, _CONTROL, _NEGATIVE, _CONDITIONING = _SINGLE = "latents", "control", "negative_embeds", "conditioning"
_EMBEDS, _TEXTS, _DECODER, CACHE = "embeds/", "texts/", "decoder/", "cache/"
_OFFSETS = "offsets/"
_FOLDERS = _EMBEDS, _TEXTS, _DECODER, _OFFSETS


def layer_name(branch: str, layer: int) -> str:
    """Returns the name of the tensor with a layer's keys and values."""
    return f"{CACHE}{branch}/{layer}"


def fields_of(saved: SavedSession) -> dict[str, Any]:
    """Returns the fields of a session, but for tensors, as JSON has them."""
    cache, decoder, texts = saved.cache, saved.decoder, saved.texts
    return {name: getattr(saved, name) for name in _PLAIN} | {
        "stream": stream_fields(saved.stream),
        "sampler": asdict(saved.sampler),
        "prompts": [asdict(use) for use in saved.prompts],
        "loras": list(saved.loras),
        "chunks": [[chunk.index, chunk.start, chunk.frames] for chunk in saved.chunks],
        "shots": list(saved.shots),
        "texts": None if texts is None else {"recache": texts.recache, "recache_sink": texts.recache_sink},
        "cache": None if cache is None else _cache_fields(cache),
        "decoder": None if decoder is None else {"codec": decoder.codec, "frames": decoder.frames},
    }


def tensors_of(saved: SavedSession) -> dict[str, Tensor]:
    """Returns the tensors of a session by their names in a file, but for keys and values."""
    single = {name: getattr(saved, name) for name in _SINGLE}
    texts = () if saved.texts is None else saved.texts.embeds
    state = {} if saved.decoder is None else saved.decoder.state.frames
    return {
        **{name: tensor for name, tensor in single.items() if tensor is not None},
        **{f"{_EMBEDS}{number}": embeds for number, embeds in saved.embeds.items()},
        **{f"{_TEXTS}{number}": embeds for number, embeds in enumerate(texts)},
        **{f"{_DECODER}{name}": frames for name, frames in state.items()},
        **({} if saved.cache is None else {f"{_OFFSETS}{name}": x for name, x in saved.cache.offsets.items()}),
    }


def session_of(given: Mapping[str, Any], tensors: Mapping[str, Tensor], reader: ReadLayer) -> SavedSession:
    """Makes a session of what a file holds.

    Args:
        given: the fields, as `fields_of` returns them.
        tensors: the tensors, as `tensors_of` returns them.
        reader: reads keys and values.

    Raises:
        ConfigError: a field or tensor is missing, unknown, of a wrong kind, or contradicts another one.
    """
    known = {*_PLAIN, "stream", "sampler", "prompts", "loras", "chunks", "shots", "texts", "cache", "decoder"}
    check_names("a saved session", given, known, known)
    if _LATENTS not in tensors:
        raise ConfigError("there are no latents")
    unknown = [name for name in tensors if name not in _SINGLE and not name.startswith(_FOLDERS)]
    if unknown:
        raise ConfigError(f"no saved session has {some(unknown)}")
    decoder, texts, offsets = (
        {n: tensor for n, tensor in tensors.items() if n.startswith(of)} for of in (_DECODER, _TEXTS, _OFFSETS)
    )
    for name, held in (("decoder", decoder), ("texts", texts), ("cache", offsets)):
        if given[name] is None and held:
            raise ConfigError(f"there are tensors {name}/ that no field describes")
    return SavedSession(
        **{name: given[name] for name in _PLAIN},
        stream=config_of(StreamConfig, given["stream"]),
        sampler=config_of(SamplerConfig, given["sampler"]),
        prompts=tuple(_prompt(use) for use in _list("prompts", given["prompts"])),
        embeds={_id(name, _EMBEDS): tensor for name, tensor in tensors.items() if name.startswith(_EMBEDS)},
        texts=None if given["texts"] is None else _texts(given["texts"], texts),
        loras=tuple(_list("LoRAs", given["loras"])),
        negative_embeds=tensors.get(_NEGATIVE),
        conditioning=tensors.get(_CONDITIONING),
        latents=tensors[_LATENTS],
        control=tensors.get(_CONTROL),
        chunks=tuple(_chunk(numbers) for numbers in _list("chunks", given["chunks"])),
        shots=tuple(_list("shots", given["shots"])),
        cache=None if given["cache"] is None else _cache(given["cache"], offsets, reader),
        decoder=None if given["decoder"] is None else _decoder(given["decoder"], decoder),
    )


def config_of(kind: type[T], given: Any) -> T:
    """Makes a configuration of a JSON object, with the type that each default has; what is missing has its default.

    Raises:
        ConfigError: there is an unknown field, or a value is of another type or refused by the class.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    check_names(kind.__name__, given, known, ())
    return kind(**{name: _typed(f"{kind.__name__}.{name}", value, known[name]) for name, value in given.items()})


def _typed(name: str, value: Any, of: Field[Any]) -> Any:
    """Returns a value of the type of a field's default, or for a default of None of the field's own."""
    default = of.default
    assert default is not MISSING, "every field of these configurations has a default"
    if name == "StreamConfig.similar_frames":
        return None if value is None else check_similar(name, value)
    if name == "StreamConfig.heads":
        return None if value is None else heads_of(value)
    if isinstance(default, tuple):
        return tuple(_number(name, number) for number in _list(name, value))
    if default is None:
        if value is None:
            return None
        return check_whole(name, value, least=0) if of.type == "int | None" else _number(name, value)
    checks: dict[type, Callable[[str, Any], Any]] = {
        bool: check_flag,
        int: lambda n, v: check_whole(n, v, least=0),
        float: _number,
        str: check_text,
    }
    return checks[type(default)](name, value)


def _number(name: str, value: Any) -> Any:
    check_number(name, value)
    return value  # a whole number stays one


def _cache_fields(cache: SavedCache) -> dict[str, Any]:
    sizes = {name: getattr(cache, name) for name in ("layers", "batch", "tokens", "heads", "head_dim")}
    branches = [asdict(branch) for branch in cache.branches]
    return {"branches": branches, "dtype": _NAMES[cache.dtype], "kinds": cache.kinds, **sizes}


def _cache(given: Any, tensors: Mapping[str, Tensor], reader: ReadLayer) -> SavedCache:
    names = ("branches", "layers", "batch", "tokens", "heads", "head_dim", "dtype", "kinds")
    check_names("the cache", given, names, names)
    branches = tuple(branch_of(branch) for branch in _list("the cache's branches", given["branches"]))
    dtype = CACHE_DTYPES[check_choice("the cache's dtype", given["dtype"], CACHE_DTYPES)]
    offsets = {name.removeprefix(_OFFSETS): x for name, x in tensors.items()}
    kinds = _numbers("the kinds of the cache's heads", given["kinds"])
    given = {**given, "branches": branches, "dtype": dtype, "kinds": kinds}
    return SavedCache(**given, offsets=offsets, reader=reader)


def branch_of(given: Any) -> SavedBranch:
    """Makes what the cache of a branch holds of a JSON object.

    Raises:
        ConfigError: a field is missing, unknown or wrong.
    """
    names = ("name", "frames", "oldest", "kept_shot", "pending", "seen")
    check_names("a branch of the cache", given, names, names)
    lists = {n: tuple(_list(f"the cache's {n}", given[n])) for n in ("frames", "pending") if given[n] is not None}
    seen = _numbers("the frames that heads hold", given["seen"])
    return SavedBranch(**{**given, **lists, "seen": seen})


def _numbers(name: str, given: Any) -> tuple[tuple[int, ...], ...]:
    """Makes whole numbers of lists of a list."""
    return tuple(tuple(check_whole(name, number, 0) for number in _list(name, own)) for own in _list(name, given))


def _texts(given: Any, embeds: dict[str, Tensor]) -> SavedTexts:
    names = ("recache", "recache_sink")
    check_names("the texts", given, names, names)
    numbered = {_id(name, _TEXTS): tensor for name, tensor in embeds.items()}
    if sorted(numbered) != list(range(len(numbered))):
        raise ConfigError(f"texts must be numbered from 0 on, not {shown(sorted(numbered))}")
    return SavedTexts(tuple(numbered[number] for number in range(len(numbered))), **given)


def _decoder(given: Any, frames: dict[str, Tensor]) -> SavedDecoder:
    names = ("codec", "frames")
    check_names("the decoder", given, names, names)
    state = ConvState({name.removeprefix(_DECODER): tensor for name, tensor in frames.items()})
    return SavedDecoder(given["codec"], given["frames"], state)


def _prompt(given: Any) -> PromptUse:
    names = ("first_chunk", "prompt", "id")
    check_names("a prompt", given, names, names)
    return PromptUse(**given)


def _chunk(given: Any) -> Chunk:
    numbers = [check_whole("a number of a kept chunk", number, 0) for number in _list("a kept chunk", given)]
    if len(numbers) != 3:
        raise ConfigError(f"a kept chunk must have 3 numbers, not {len(numbers)}")
    return Chunk(*numbers)


def _id(name: str, folder: str) -> int:
    number = name.removeprefix(folder)
    if not (number.isascii() and number.isdigit() and len(number) <= 16 and number == str(int(number))):
        raise ConfigError(f"{printable(name)} is not the name of embeddings")
    return int(number)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{name} must be a list, not {shown(value)}")
    return value
