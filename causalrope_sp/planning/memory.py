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
        image: the weights of the image encoder, if they are on the device while an image is encoded.
        codec: the weights of the codec, with those that it derives from them on a CPU.
        codec_state: what the decoder stores between chunks.
        codec_activations: what the decoder needs while it decodes a chunk.
        workspace: what libraries allocate for themselves.
        text_stays: whether the text encoder stays on the device, or is there only while it is used.
        codec_stays: whether the codec stays on the device, or is there only while it is used.
        decodes_concurrently: whether the next chunk is denoised while one is decoded.
        graphs: whether passes run by CUDA graphs, which keep a pass' activations in a pool of their own.
        other_sessions: what open streams of other sizes keep between two chunks.
    """

    text: int = 0
    image: int = 0
    codec: int = 0
    codec_state: int = 0
    codec_activations: int = 0
    workspace: int = 0
    text_stays: bool = False
    codec_stays: bool = True
    decodes_concurrently: bool = False
    graphs: bool = False
    other_sessions: int = 0

    def by_time(self, weights: int, session: int, activations: int, decoding: int, others: int = 0) -> dict[str, int]:
        """Returns the bytes in all at the times "image" (an image is encoded, where the device does that), "text" (a
        prompt is encoded), "denoise" and "decode".

        Args:
            weights: the bytes of the DiT's weights.
            session: what a session keeps, which exists only after its prompt is encoded.
            activations: the bytes of a pass' activations; a pass of a kind that has no graph yet runs beside the pool.
            decoding: what is kept while a chunk is decoded, beside the decoder's activations.
            others: what further sessions keep, beside `other_sessions`.
        """
        resident = weights + self.workspace + (self.text if self.text_stays else 0)
        resident += (self.codec if self.codec_stays else 0) + self.other_sessions + others
        streaming = resident + session
        decoding += (0 if self.codec_stays else self.codec) + self.codec_activations
        return {
            **({"image": resident + self.image} if self.image else {}),
            "text": resident + (0 if self.text_stays else self.text),
            "denoise": streaming + activations,
            "decode": streaming + decoding + (activations if self.decodes_concurrently else 0),
        }


NO_AUXILIARY = AuxiliaryMemory()
