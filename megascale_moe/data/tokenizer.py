"""Text to token ids and back: any `tokenizer.json`, or a byte-level BPE trained on the corpus itself.

Training one makes a run on an unknown folder of text a single command, and lets the vocabulary fit a small model.

Documents are encoded as ordinary text: a document that spells a special token (HTML's "<s>", say) does not get its id,
so the end-of-document id in the token stream really is the end of a document.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megascale_moe.config import ConfigError
from megascale_moe.data.hashing import digest

# Ranks are forked, and the thread pool inside `tokenizers` does not survive a fork: it would hang, or warn and turn
# itself off. `prepare` uses threads of its own, which end before anything forks. A setting of the user's wins.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""The smallest vocabulary of a byte-level BPE: the 256 bytes and the end of a document."""

_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the id it ends documents with."""

    backend: tokenizers.Tokenizer
    eos: int

    @cached_property
    def vocab(self) -> int:
        """One more than the largest id: the rows that a model's embedding must have."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """A hash of everything that decides which ids a text becomes."""
        return digest(self.backend.to_str(), str(self.eos))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any end-of-document or other special token."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens spelled out; ids that the tokenizer lacks are left out.

        A model's vocabulary may be larger than the tokenizer's, so a sampled id may have no text.
        """
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write the tokenizer in the format of Hugging Face's `tokenizer.json`."""
        self.backend.save(str(path))


def load_tokenizer(path: str | Path, eos: int | None = None) -> Tokenizer:
    """Load a `tokenizer.json`, or the one in a folder.

    The end-of-document token is `eos`, else what a `tokenizer_config.json` beside the file names, else a usual one.

    Raises:
        ConfigError: no such file, not a tokenizer, or no end-of-document token in it.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer = {str(path)!r}: no such file; expected a tokenizer.json, or empty to train one"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the bindings raise bare Exception
        raise ConfigError(f"{file}: not a Hugging Face tokenizer.json ({error})") from error
    # A file may ask for cut or padded encodings: right for a classifier, lost or invented text here.
    backend.no_truncation()
    backend.no_padding()
    return _ordinary(backend, _find_eos(backend, file) if eos is None else eos)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab` tokens; the same texts give the same tokenizer.

    Raises:
        ConfigError: `vocab` is too small to hold all bytes.
    """
    if vocab < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"model.vocab = {vocab}: too small to train a byte-level tokenizer; at least {SMALLEST_VOCABULARY}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _ordinary(backend, eos=0)  # special tokens take the first ids


def _ordinary(backend: tokenizers.Tokenizer, eos: int) -> Tokenizer:
    backend.encode_special_tokens = True
    return Tokenizer(backend, eos)


def _find_eos(backend: tokenizers.Tokenizer, file: Path) -> int:
    settings = file.with_name("tokenizer_config.json")
    try:
        token = json.loads(settings.read_text()).get("eos_token") if settings.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{settings}: cannot be read as a JSON object ({error})") from error
    name = token.get("content") if isinstance(token, dict) else token  # an object holds it with its settings
    for end in (*([name] if isinstance(name, str) else []), *_END_TOKENS):
        eos = backend.token_to_id(end)
        if eos is not None:
            return eos
    raise ConfigError(
        f"{file}: no end-of-document token; name one as eos_token in a tokenizer_config.json beside it, "
        f"or add one of {', '.join(_END_TOKENS)}"
    )
