"""Input files and tokenizers for the tests of `megatron-et prepare`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def byte_level_tokenizer(folder: Path, texts: Sequence[str], **config: Any) -> Path:
    """A Hugging Face tokenizer as Llama 3's: byte-level BPE that puts its bos before a document."""
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers need tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pyarrow_or_skip() -> Any:
    return pytest.importorskip("pyarrow", reason="reading Parquet and .zst needs pyarrow")


def zstd(data: bytes) -> bytes:
    return pyarrow_or_skip().compress(data, codec="zstd", asbytes=True)


def write_parquet(path: Path, columns: Mapping[str, Any], rows_in_a_group: int) -> Path:
    pyarrow_or_skip()
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows_in_a_group)
    return path
