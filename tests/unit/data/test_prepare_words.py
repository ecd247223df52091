"""BPE by words: the ids of the whole text, or not used."""

import io
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_et.data import words as module
from megatron_et.data.byte_level import _LLAMA_3, words_of
from megatron_et.data.encoders import HuggingFaceEncoder
from megatron_et.data.reading import PrepareError
from megatron_et.data.words import WordCache, word_cache
from tests.unit.data.prepare_files import byte_level_tokenizer

pytestmark = pytest.mark.megatron_free

CORPUS = [
    "def f(x):\n\treturn self.name[0:12] if x else None  # it's a 'test', really",
    "  Über die Grenze: straße, naïve café; Привет, мир! 你好世界 and the end.   ",
    "The quick brown fox doesn't jump over 123,456.78 lazy dogs...  \r\n\r\n    ----",
    "for (int i = 0; i < 10; ++i) { a[i] += b->c; }\n\n\n<table> <tr>x</tr></table>",
] * 30
ALPHABET = "ab eTé÷ß яп你界.,'(){}<>_-09\n\t\r \u2581\u00a0🙂\x00\u0301"
TEXTS = st.one_of(
    st.text(ALPHABET, min_size=1, max_size=80),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.lists(st.sampled_from([*" ".join(CORPUS).split(), " ", "  ", "\n", "<table>", "x y"]), min_size=1).map(
        "".join
    ),
)


def train(**settings: Any) -> bytes:
    model = io.BytesIO()
    # What the project's own tokenizers have (tokenizer.py), unless the case says otherwise.
    plain = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        minloglevel=2,
        **(plain | settings),
    )
    return model.getvalue()


def whole(model: bytes, text: str) -> bytes:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return array("H", processor.encode_as_ids(text)).tobytes()


USED = {
    "ours": {"split_digits": True, "allow_whitespace_only_pieces": True},
    "as Llama 2": {"add_dummy_prefix": True, "split_digits": True},
    "scripts mixed": {"split_by_unicode_script": False},
    "scripts mixed, numbers too": {"split_by_unicode_script": False, "split_by_number": False},
    "own symbols": {"user_defined_symbols": ["<table>", "▁▁", "'s", "\n\n"], "add_dummy_prefix": True},
}


@pytest.fixture(scope="module", params=USED)
def model(request: pytest.FixtureRequest) -> bytes:
    return train(**USED[request.param])


@settings(max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_are_those_of_the_whole_text(model: bytes, texts: list[str]) -> None:
    cache = word_cache(model, "H")
    assert cache is not None
    for text in [*texts, *texts]:  # the second time from the cache
        assert cache.encode(text) == whole(model, text)


@pytest.mark.parametrize("slice_chars", [1, 7, 100, 5_000, 1 << 20])
def test_ids_of_long_texts(model: bytes, monkeypatch: pytest.MonkeyPatch, slice_chars: int) -> None:
    monkeypatch.setattr(module, "_SLICE_CHARS", slice_chars)
    cache = word_cache(model, "H")
    assert cache is not None
    text = "\n".join(CORPUS) + "ab" * 5_000 + " " * 5_000
    assert cache.encode(text) == whole(model, text)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["x y"]},
        {"user_defined_symbols": ["x▁y"]},
    ],
    ids=str,
)
def test_not_used_where_words_do_not_decide(settings: dict[str, Any]) -> None:
    assert word_cache(train(**settings), "H") is None


def test_the_cut_is_as_fine_as_the_vocabulary_allows() -> None:
    def words(text: str, **settings: Any) -> list[str]:
        cache = word_cache(train(**settings), "H")
        assert cache is not None
        seen: list[str] = []
        lookup: Callable[[str], bytes] = cache.__getitem__
        cache.__getitem__ = lambda word: (seen.append(word), lookup(word))[1]  # type: ignore[method-assign]
        cache._by_words(text)
        return seen

    assert words("it's  a\n\tжизнь.") == ["it", "'", "s", "  a", "\n\t", "жизнь", "."]
    assert words("it's  a\n\tжизнь.", user_defined_symbols=["'s"]) == ["it's", "  a\n\tжизнь."]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WORDS", 10)
    model = train()
    cache = word_cache(model, "H")
    assert cache is not None
    for i in range(100):
        text = f"w{chr(97 + i % 26)}{chr(97 + i // 26)} " + "long" * 20
        assert cache.encode(text) == whole(model, text)
        assert len(cache) <= 10
    assert not any(len(word) > module._MAX_CHARS for word in cache)


def test_wrong_ids_do_not_pass_for_long() -> None:
    model = train()
    cache = word_cache(model, "H")
    assert isinstance(cache, WordCache)
    cache.encode("the fox")  # the first text is checked
    cache[" dogs"] = b"\x01\x00"
    cache.encode(" dogs")
    cache.encode(" " * (module._CHECK_EVERY - len(" dogs")))
    with pytest.raises(PrepareError, match="by words differ from those of the whole"):
        cache.encode(" dogs")


def test_wide_ids() -> None:
    model = train()
    cache = word_cache(model, "i")
    assert cache is not None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert list(array("i", cache.encode(CORPUS[0]))) == processor.encode_as_ids(CORPUS[0])


# Hugging Face


def byte_level(folder: Path, pre_tokenizer: Any = None, normalizer: Any = None, **model: Any) -> str:
    """A tokenizer.json that splits and normalises as asked."""
    path = byte_level_tokenizer(folder / "tokenizer", CORPUS) / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"] |= model
    settings["normalizer"] = normalizer
    settings["pre_tokenizer"] = pre_tokenizer or settings["pre_tokenizer"]
    return json.dumps(settings)


def split_by(regex: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


SPLITS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "Llama 3": {"pre_tokenizer": split_by(_LLAMA_3)},
    "Qwen": {
        "pre_tokenizer": split_by(_LLAMA_3.replace("{1,3}", "")),
        "normalizer": {"type": "NFC"},
    },
}


@pytest.fixture(scope="module", params=SPLITS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_level(tmp_path_factory.mktemp("hf"), **SPLITS[request.param])


@pytest.mark.parametrize("special_tokens", [True, False])
@settings(max_examples=100)
@given(texts=st.lists(st.one_of(TEXTS, st.text("ab \n\t\r'.1\u3000\u0301<|eos>", max_size=30)), min_size=1))
def test_hugging_face_ids_are_those_of_the_whole_text(
    tokenizer: str, texts: list[str], special_tokens: bool
) -> None:
    import tokenizers

    encoder = HuggingFaceEncoder(tokenizer, "<|eos|>", special_tokens)
    assert encoder.words is not None
    reference = tokenizers.Tokenizer.from_str(tokenizer)
    expected = [reference.encode(text, add_special_tokens=special_tokens).ids for text in texts]
    for _ in range(2):  # the second time from the cache
        assert [list(array("H", ids)) for ids in encoder.encode(texts)] == expected


@pytest.mark.parametrize("slice_chars", [1, 7, 100, 5_000])
def test_hugging_face_ids_of_long_texts(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, slice_chars: int
) -> None:
    monkeypatch.setattr(module, "_SLICE_CHARS", slice_chars)
    encoder = HuggingFaceEncoder(tokenizer, None, True)
    text = "\n".join(CORPUS) + "ab" * 2_000 + " " * 2_000
    by_words = encoder.encode([text])
    encoder.words = None
    assert by_words == encoder.encode([text])


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": split_by(r"\s+")},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_hugging_face_words_are_not_used_for(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert words_of(byte_level(tmp_path, **changes)) is None


@pytest.mark.parametrize("change", [{"rstrip": True}, {"lstrip": True}, {"single_word": True}], ids=str)
def test_hugging_face_texts_with_added_tokens_are_not_cut(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = json.loads(byte_level(tmp_path))
    settings["added_tokens"][1] |= change
    encoder = HuggingFaceEncoder(json.dumps(settings), None, True)
    assert encoder.words is not None
    texts = ["one <|eos|> two", "x<|eos|>y <|bos|>", "none"]
    by_words = encoder.encode(texts)
    assert set(encoder.words) == {"none", ""}
    encoder.words = None
    assert by_words == encoder.encode(texts)


def test_hugging_face_added_tokens_of_the_normalised_text_are_left_to_the_tokenizer(tmp_path: Path) -> None:
    settings = json.loads(byte_level(tmp_path, normalizer={"type": "NFC"}))
    assert words_of(json.dumps(settings)) is not None
    settings["added_tokens"][1]["normalized"] = True
    assert words_of(json.dumps(settings)) is None


def test_hugging_face_words(tmp_path: Path) -> None:
    words = words_of(byte_level(tmp_path))
    assert words is not None
    found = words.word.findall("it's foo(bar1, 22)\n    return x1  été's abc'")
    assert [word for word in found if word] == [
        "it's", " foo", "(bar1", ", 22", ")\n   ", " return", " x1", "  été's", " abc'"
    ]  # fmt: skip
