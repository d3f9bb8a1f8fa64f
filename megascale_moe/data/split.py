"""Training and validation documents: which are held out is decided by document, so that no text is in both.

The documents are put in an order that depends on the seed alone; the front of it, up to the wanted share of all tokens,
is held out. Counting tokens rather than documents keeps the share right when lengths differ by orders of magnitude.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megascale_moe.config import require
from megascale_moe.data.corpus import Corpus
from megascale_moe.data.hashing import digest, permutation


@dataclass(frozen=True, eq=False)
class Split:
    """Some documents of a corpus, in ascending order."""

    corpus: Corpus
    name: str  # "training" or "validation"
    documents: NDArray[np.int64]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its EOS included; int64 [documents]."""
        return self.corpus.lengths[self.documents]

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents, EOS tokens included."""
        return int(self.lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A digest of which documents these are."""
        return digest(self.name, self.documents.tobytes())


def split_corpus(corpus: Corpus, validation_fraction: float = 0.02, seed: int = 0) -> tuple[Split, Split]:
    """Return the training and the validation documents.

    Validation gets at least `validation_fraction` of the tokens and at least one document, unless the fraction is 0;
    one document is always left for training.

    Raises:
        ConfigError: the fraction is not in [0, 1), or there is a single document and one should be held out.
    """
    fraction = validation_fraction
    require(0 <= fraction < 1, f"data.validation_fraction = {fraction}: must be at least 0 and below 1")
    order = permutation(corpus.manifest.documents, "held-out documents", seed)
    held_out = 0
    if fraction:
        reached = np.cumsum(corpus.lengths[order])
        held_out = min(int(np.searchsorted(reached, fraction * reached[-1])) + 1, max(1, len(order) - 1))
    require(
        held_out < len(order),
        f"data.path = {corpus.manifest.path!r}: a single document, none can be held out; "
        f"add documents or set data.validation_fraction to 0",
    )
    training, validation = np.sort(order[held_out:]), np.sort(order[:held_out])
    return Split(corpus, "training", training), Split(corpus, "validation", validation)
