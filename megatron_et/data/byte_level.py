"""Where the text of a byte-level BPE tokenizer of Hugging Face can be cut, for words.py.

Such a tokenizer first splits a text by a regular expression and then merges within each part: a cut between
two parts changes nothing. The expressions known here never look back, and look ahead only for whether white
space goes on (`\\s+(?!\\S)`). None of them has a rule by which

- letters or digits are followed by something else in the same part (an apostrophe may be followed by
  letters), so there is a cut behind a run of ASCII letters and digits before any other ASCII character but an
  apostrophe;
- a blank goes with the white space before it when a letter comes next (the letter takes it), so there is a
  cut before a blank and an ASCII letter; white space before it is split as at the end of a text.

Left to the tokenizer itself are texts that hold an added token, other expressions, normalisers other than NFC
(which changes no ASCII character before another one, and joins none with what stands before it), and
tokenizers that merge by chance (dropout).
"""

import json
import re
from typing import Any, NamedTuple

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_KNOWN = {_LLAMA_3, _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")}  # the second is Qwen 2's and 3's
# What a cut may be before, behind letters and digits: ASCII but letters, digits, apostrophe.
_AFTER = r"\x00-&(-/:-@\[-`{-\x7f"
_SIGNS = "[^A-Za-z0-9 ]*(?: (?![A-Za-z])[^A-Za-z0-9 ]*)*"
_WORD = re.compile(
    f" ?[A-Za-z]+(?![^{_AFTER}])"  # the usual word, for speed: the next line would find it too
    f"| ?{_SIGNS}(?:[A-Za-z0-9]+(?=[^{_AFTER}A-Za-z0-9]){_SIGNS})*(?:[A-Za-z0-9]+)?"
)


class Words(NamedTuple):
    """How a tokenizer's texts are cut."""

    word: re.Pattern[str]
    added: re.Pattern[str] | None
    """What a text that is not cut holds."""


def words_of(tokenizer: str) -> Words | None:
    """How to cut the texts of a tokenizer.json; None if that is not known."""
    settings: dict[str, Any] = json.loads(tokenizer)
    model, normalizer, added = (settings[name] for name in ("model", "normalizer", "added_tokens"))
    mergers = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in mergers):
        return None
    if normalizer not in (None, {"type": "NFC"}) or not _splits_as_known(settings["pre_tokenizer"]):
        return None
    if normalizer is not None and any(token["normalized"] for token in added):
        return None  # it is looked for in the text as it is
    contents = [re.escape(token["content"]) for token in added]
    return Words(_WORD, re.compile("|".join(contents)) if contents else None)


def _splits_as_known(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True  # GPT-2's expression
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex in _KNOWN
    return False
