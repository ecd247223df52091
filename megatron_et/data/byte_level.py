"""Where the text of a byte-level BPE tokenizer of Hugging Face can be cut, for words.py.

Such a tokenizer first splits a text by a regular expression and then merges within each part: a cut between
two parts changes nothing. In every expression known here a blank before a letter begins a part of its own:

- the letters take one character before them along, and no other rule that may hold a blank can get it: runs
  of white space leave their last character to what follows (`\\s+(?!\\S)`), or end with a line break;
- nothing looks back, and what looks ahead asks only whether white space follows, which is so before the cut
  and at the end of a text alike.

So a text may be cut before any blank that an ASCII letter follows. Left to the tokenizer itself are other
expressions, normalisers other than NFC (which leaves a blank alone and never joins it with what stands
before), tokenizers that merge by chance (dropout), and added tokens that take blanks around them.
"""

import json
import re
from typing import Any

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_KNOWN = {_LLAMA_3, _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")}  # the second is Qwen 2's and 3's
_CUT = re.compile(" [A-Za-z]")
_WORD = re.compile(" ?[^ ]*(?: (?![A-Za-z])[^ ]*)*")


def words_of(tokenizer: str) -> re.Pattern[str] | None:
    """What finds the words of a tokenizer.json's texts; None if it is not known where to cut them."""
    settings: dict[str, Any] = json.loads(tokenizer)
    model = settings["model"]
    mergers = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in mergers):
        return None
    if settings["normalizer"] not in (None, {"type": "NFC"}) or not _splits_as_known(
        settings["pre_tokenizer"]
    ):
        return None
    for token in settings["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or _CUT.search(token["content"]):
            return None
    return _WORD


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
