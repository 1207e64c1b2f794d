"""The memory of a rank's device: that of the DiT and its cache, and the auxiliary memory of text encoder and codec.

The peak is reached at one of three times: while a prompt is encoded, a chunk is denoised, or a chunk is decoded. The
bytes of weights, cache and codec state are exact, those of activations estimates, that of the workspace a guess.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AuxiliaryMemory:
    """The bytes in addition to the DiT and its cache, on the rank that has most of them.

    Args:
        text: the weights of the text encoder.
        codec: the weights of the codec, with those that it derives from them on a CPU.
        codec_state: what the decoder stores between chunks.
        codec_activations: what the decoder needs while it decodes a chunk.
        workspace: what libraries allocate for themselves.
        text_stays: whether the text encoder stays on the device, or is there only while it is used.
        codec_stays: whether the codec stays on the device, or is there only while it is used.
        decodes_concurrently: whether the next chunk is denoised while one is decoded.
        graphs: whether passes run by CUDA graphs, which keep a pass' activations in a pool of their own.
    """

    text: int = 0
    codec: int = 0
    codec_state: int = 0
    codec_activations: int = 0
    workspace: int = 0
    text_stays: bool = False
    codec_stays: bool = True
    decodes_concurrently: bool = False
    graphs: bool = False

    def by_time(self, weights: int, cache: int, activations: int) -> dict[str, int]:
        """Returns the bytes in all at the times "text" (a prompt is encoded), "denoise" and "decode".

        Args:
            weights: the bytes of the DiT's weights.
            cache: the bytes of the KV cache, which exists only after the prompt is encoded.
            activations: the bytes of a pass' activations.
        """
        resident = weights + self.workspace + (self.text if self.text_stays else 0)
        resident += self.codec if self.codec_stays else 0
        # a pass of a kind that has no graph yet runs beside the pool
        streaming = resident + cache + self.codec_state + (activations if self.graphs else 0)
        decoding = (0 if self.codec_stays else self.codec) + self.codec_activations
        return {
            "text": resident + (0 if self.text_stays else self.text),
            "denoise": streaming + activations,
            "decode": streaming + decoding + (activations if self.decodes_concurrently else 0),
        }


NO_AUXILIARY = AuxiliaryMemory()
