"""Text conditioning: the UMT5 encoder, and files of prompt embeddings."""

from causalrope_sp.text.clean import clean_prompt
from causalrope_sp.text.embeds import PromptEmbeds, load_embeds, save_embeds
from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5 import UMT5TextEncoder

__all__ = ["PromptEmbeds", "TextSource", "UMT5TextEncoder", "clean_prompt", "load_embeds", "save_embeds"]
