"""Saved sessions: what an open stream is, in a file from which it goes on."""

from causalrope_sp.sessions.fit import check_fits
from causalrope_sp.sessions.saved_parts import PromptUse, SavedBranch, SavedCache, SavedDecoder, SavedTexts
from causalrope_sp.sessions.saved_session import SavedSession
from causalrope_sp.sessions.session_file import read_session, write_session

__all__ = [
    "PromptUse",
    "SavedBranch",
    "SavedCache",
    "SavedDecoder",
    "SavedSession",
    "SavedTexts",
    "check_fits",
    "read_session",
    "write_session",
]
