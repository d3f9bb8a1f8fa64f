"""Tokenizers: trained ones are deterministic and lossless, loaded ones know how documents end."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megascale_moe.config import ConfigError
from megascale_moe.data import load_tokenizer, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "def sub(a, b):\n    return a - b\n"] * 5


def write_word_level(folder: Path, *tokens: str) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_training_is_deterministic_and_keeps_within_the_vocabulary() -> None:
    first, second = train_tokenizer(TEXTS, 270), train_tokenizer(TEXTS, 270)
    assert first.digest == second.digest
    assert first.vocab == 270
    assert first.eos == 0
    assert train_tokenizer(TEXTS, 271).digest != first.digest


def test_any_text_survives_the_way_there_and_back() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    text = " naïve\t\u4f60\U0001f600\n\n  <|endoftext|> x"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids  # a document cannot spell its own end
    assert tokenizer.decode([tokenizer.eos]) == "<|endoftext|>"


def test_ids_that_the_tokenizer_lacks_decode_to_nothing() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    (ids,) = tokenizer.encode(["def"])
    assert tokenizer.decode([*ids, 5000]) == "def"


def test_saved_tokenizer_is_the_same_when_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").digest == tokenizer.digest
    assert load_tokenizer(tmp_path).encode(TEXTS) == tokenizer.encode(TEXTS)


def test_truncation_and_padding_of_a_file_are_turned_off(tmp_path: Path) -> None:
    file = write_word_level(tmp_path, "?", "</s>", "a", "b")
    assert load_tokenizer(file).encode(["a b a b"]) == [[2, 3, 2, 3]]


@pytest.mark.parametrize("written", ["b", {"content": "b", "special": True}])
def test_end_token_is_the_configured_one_before_a_usual_one(written: object, tmp_path: Path) -> None:
    file = write_word_level(tmp_path, "?", "</s>", "a", "b")
    assert load_tokenizer(file).eos == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    assert load_tokenizer(file).eos == 3
    assert load_tokenizer(file, eos=2).eos == 2


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer = '.*/none.json': no such file; expected a tokenizer.json"):
        load_tokenizer(tmp_path / "none.json")


def test_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json: not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no end-of-document token; name one as eos_token"):
        load_tokenizer(write_word_level(tmp_path, "?", "a"))


def test_broken_tokenizer_config(tmp_path: Path) -> None:
    file = write_word_level(tmp_path, "?", "a")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: cannot be read as a JSON object"):
        load_tokenizer(file)


def test_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab = 256: too small .* at least 257"):
        train_tokenizer(TEXTS, 256)
