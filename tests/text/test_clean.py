"""Prompts are cleaned as Wan cleans them."""

from __future__ import annotations

import html
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalrope_sp import PromptError
from causalrope_sp.text import clean_prompt


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\t dog \r\n\n runs  ", "a dog runs"),
        ("", ""),
        ("cats, dogs; 'and' (more) ~ 100%!", "cats, dogs; 'and' (more) ~ 100%!"),
    ],
)
def test_plain_prompts_are_cleaned_without_ftfy(prompt: str, cleaned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["a “dog”", "&amp;", "a\x00b", "\ud800"])
def test_what_ftfy_might_change_is_refused_without_it(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(PromptError, match="needs ftfy: pip install ftfy") as caught:
        clean_prompt(prompt)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("salt &amp;amp; pepper&nbsp;&#33;", "salt & pepper !"),
        ("&lt;b&gt;bold&lt;/b&gt; a<b", "<b>bold</b> a<b"),
        ("the cafÃ© â€œsignâ€\x9d", 'the café "sign"'),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("ﬁn ＷＩＤＥ", "fin WIDE"),
        ("half a pair: \ud83d", "half a pair: \ufffd"),
        ("a\x00b\u3000 c", "ab c"),
        ("红色的圆形", "红色的圆形"),
    ],
)
def test_broken_text_is_repaired(prompt: str, cleaned: str) -> None:
    pytest.importorskip("ftfy", reason="ftfy is not installed")
    assert clean_prompt(prompt) == cleaned


@given(st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("&;#<>amp“é\u3000"))))
def test_any_prompt_is_cleaned_as_wan_cleans_it(prompt: str) -> None:
    ftfy = pytest.importorskip("ftfy", reason="ftfy is not installed")
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    assert clean_prompt(prompt) == re.sub(r"\s+", " ", unescaped.strip()).strip()
