"""What a rank's device holds at once: the model and its cache, and what stands beside them.

The most is taken at one of three times: while a prompt is encoded, while a chunk is denoised, while it is decoded.
Weights, cache and what a codec keeps between chunks are exact; activations are estimates, the workspace is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AuxiliaryMemory:
    """Bytes beside the DiT, on the rank that has most of them. `codec_state` is what a decoder keeps between chunks,
    `codec_activations` what it needs while it decodes one; `workspace` is what libraries take for themselves.

    `text_stays` and `codec_stays` say whether the weights are there all the time, or only while they are used;
    `decodes_concurrently` whether the next chunk is denoised while one is decoded.
    """

    text: int = 0
    codec: int = 0
    codec_state: int = 0
    codec_activations: int = 0
    workspace: int = 0
    text_stays: bool = False
    codec_stays: bool = True
    decodes_concurrently: bool = False

    def by_time(self, weights: int, cache: int, activations: int) -> dict[str, int]:
        """Bytes in all while a prompt is encoded, a chunk denoised, a chunk decoded, beside a DiT that needs so many.
        The cache is that of a stream, which begins after its prompt."""
        waiting = weights + self.workspace + (self.text if self.text_stays else 0)
        waiting += self.codec if self.codec_stays else 0
        streaming = waiting + cache + self.codec_state
        decoding = (0 if self.codec_stays else self.codec) + self.codec_activations
        return {
            "text": waiting + (0 if self.text_stays else self.text),
            "denoise": streaming + activations,
            "decode": streaming + decoding + (activations if self.decodes_concurrently else 0),
        }


NO_AUXILIARY = AuxiliaryMemory()
