"""Hugging Face tokenizers: ids and eod of Megatron's HuggingFaceTokenizer; what is refused."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_et.cli import main
from megatron_et.data.dataset import write_dataset
from megatron_et.data.encoders import read_tokenizer, token_type
from megatron_et.data.reading import PrepareError
from tests.unit.data.prepare_files import byte_level_tokenizer, write_jsonl

TEXTS = ["def f(x):\n    return 'ä €  🙂'\r\n\n", "  two  blanks ", "<|eos|> in the text", "x" * 3000]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("hf") / "tokenizer", TEXTS * 5, **CONFIG)


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def alter(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a tokenizer with other settings in its tokenizer.json."""
    target.mkdir()
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (target / "tokenizer.json").write_text(json.dumps(model | changes), encoding="utf-8")
    (target / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return target


def test_ids_are_the_tokenizers_with_its_special_tokens_and_the_eod(folder: Path, tmp_path: Path) -> None:
    import tokenizers

    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert all(ids[0] == BOS for ids in expected)
    assert EOS in expected[2]
    write_dataset([source], tmp_path / "folder", folder)
    assert documents(tmp_path / "folder") == [[*ids, EOS] for ids in expected]
    write_dataset([source], tmp_path / "file", folder / "tokenizer.json", workers=2)
    assert (tmp_path / "file.bin").read_bytes() == (tmp_path / "folder.bin").read_bytes()
    write_dataset([source], tmp_path / "no_eod", folder, append_eod=False)
    assert documents(tmp_path / "no_eod") == expected
    arguments = ["--tokenizer-model", str(folder), "--tokenizer-hf-no-include-special-tokens"]
    assert main(["prepare", "--input", str(source), "--output", str(tmp_path / "bare"), *arguments]) == 0
    assert documents(tmp_path / "bare") == [[*ids[1:], EOS] for ids in expected]


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="Megatron's HuggingFaceTokenizer needs transformers")
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    "config",
    [CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "<|eos|>"}],
    ids=["eos", "sep instead"],
)
def test_ids_and_eod_are_megatrons(tmp_path: Path, config: dict[str, str], include: bool) -> None:
    if importlib.util.find_spec("megatron.core.tokenizers.utils") is None:
        pytest.skip("this Megatron-Core is older than its tokenizers")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    folder = byte_level_tokenizer(tmp_path / "tokenizer", TEXTS * 5, **config)
    arguments = argparse.Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        tokenizer_special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=not include,
        trust_remote_code=False,
        metadata_path=None,
        pad_vocab_size=False,
    )
    megatron = build_tokenizer(arguments)
    ours = read_tokenizer(folder, special_tokens=include).encoder()
    assert ours.vocab_size == megatron.vocab_size
    assert ours.eod == megatron.eod
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert np.frombuffer(ids, token_type(ours.vocab_size)).tolist() == megatron.tokenize(text)


def test_stored_truncation_and_padding_are_not_applied(folder: Path, tmp_path: Path) -> None:
    shortening = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 5_000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    altered = alter(folder, tmp_path / "altered", truncation=shortening, padding=padding)
    plain, same = (read_tokenizer(path).encoder().encode(TEXTS) for path in (folder, altered))
    assert plain == same


def test_a_tokenizer_without_eos_needs_no_append_eod(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "tokenizer.json"
    bare.parent.mkdir()
    bare.write_text((folder / "tokenizer.json").read_text())
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(PrepareError, match=r"no eos_token in its tokenizer_config\.json"):
        write_dataset([source], tmp_path / "data", bare)
    write_dataset([source], tmp_path / "data", bare, append_eod=False)
    (bare.parent / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eos|>"}}')
    write_dataset([source], tmp_path / "data", bare)
    assert all(ids[-1] == EOS for ids in documents(tmp_path / "data"))


def test_ids_too_large_for_their_type_are_refused(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"][last] = 70_000
    with pytest.raises(PrepareError, match=r"\d{3} tokens but ids up to 70,000"):
        read_tokenizer(alter(folder, tmp_path / "gap", model=model) / "tokenizer.json").encoder()


@pytest.mark.parametrize("size", [1, 65_499, 65_500, 1_000_000])
@pytest.mark.smoke
def test_token_type_is_megatrons(size: int) -> None:
    assert token_type(size) is DType.optimal_dtype(size)


def test_errors_name_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrepareError, match=r"tokenizer\.json does not exist: slow tokenizers .* hub"):
        read_tokenizer(tmp_path / "empty")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PrepareError, match=r"other\.json is not a tokenizer of the package tokenizers"):
        read_tokenizer(tmp_path / "other.json")
    broken = alter(folder, tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text("[]")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else 1)
    with pytest.raises(PrepareError, match=r"tokenizer_config\.json is no JSON object"):
        read_tokenizer(broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PrepareError, match="needs the package tokenizers: pip install tokenizers"):
        read_tokenizer(folder)
    with pytest.raises(PrepareError, match=r"is for Hugging Face tokenizers, and .* is none"):
        read_tokenizer(tmp_path / "a.model", special_tokens=False)
