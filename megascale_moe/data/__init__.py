"""The data pipeline: from text to batches. Read in this order:

    sources     which files `data.path` means          (readers: how each kind is read)
    tokenizer   text to ids and back
    preparation documents to token shards in a cache   (corpus: the files, written and opened)
    split       training and held-out documents
    packing     documents to rows, by arithmetic on lengths
    loader      which rows a rank sees when            (batch: what it gets)

    folder = prepare("stdlib", vocab=8192)             # on one rank of a node; on several, one works and others wait
    corpus = open_corpus(folder, vocab=8192)           # on every rank
    training, validation = split_corpus(corpus)
    loader = Loader(training, global_batch=32, sequence_length=1024, dp_rank=rank, dp_size=ranks)
    step = loader.next_step()
    for batch in micro_batches(step.rows, micro_batch=4):
        ...                                            # loss sum / step.target_count

Everything takes plain arguments; errors that a user can cause are `ConfigError`s of one line.
"""

from megascale_moe.data.batch import IGNORE, Batch, TokenRow, micro_batches
from megascale_moe.data.corpus import Corpus, open_corpus
from megascale_moe.data.loader import HeldOutRows, Loader
from megascale_moe.data.packing import Packing
from megascale_moe.data.preparation import prepare
from megascale_moe.data.sources import find_source
from megascale_moe.data.split import Split, split_corpus
from megascale_moe.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "HeldOutRows",
    "Loader",
    "Packing",
    "Split",
    "TokenRow",
    "Tokenizer",
    "find_source",
    "load_tokenizer",
    "micro_batches",
    "open_corpus",
    "prepare",
    "split_corpus",
    "train_tokenizer",
]
