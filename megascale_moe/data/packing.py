"""Documents to rows of equal length, without padding: where every row lies follows from the documents' lengths.

The documents of an epoch, shuffled, form one stream. Row r takes its tokens [r*s, (r+1)*s) and reads one further:

    stream    a a a E b b b b b E c c E d ...        E ends a document
    row 0     a a a E b b      targets  a a E - b b
    row 1     b b b E c c      targets  b b E - c E

The overlap of one token gives the last position its target, so no target inside a document is lost; the next
document's first token is never a target (-). A document that goes on in the next row is a new segment there: it does
not see the part before. The last row is filled with EOS tokens that have no targets, so an epoch is every token once.

Rows are drawn in a shuffled order too: documents longer than a row would otherwise put their parts into one batch.

Nothing but lengths is needed to place all rows and to count their targets, so an epoch costs a sort and a sum, and each
rank knows the targets of all ranks without asking them.
"""

import numpy as np
from numpy.typing import NDArray

from megascale_moe.data.batch import IGNORE, TokenRow
from megascale_moe.data.hashing import permutation
from megascale_moe.data.split import Split


class Packing:
    """All rows of one epoch; a pure function of the documents, the sequence length, the seed and the epoch."""

    def __init__(self, split: Split, sequence_length: int, seed: int, epoch: int) -> None:
        self.sequence_length = sequence_length
        self.rows = -(-split.tokens // sequence_length)
        self._corpus = split.corpus
        order = permutation(len(split.documents), "documents", seed, epoch)
        self._documents = split.documents[order]
        self._starts = np.concatenate([[0], np.cumsum(split.lengths[order])]).astype(np.int64)
        self._row_order = permutation(self.rows, "rows", seed, epoch)

    def row(self, index: int) -> TokenRow:
        """Read the row drawn as number `index` of the epoch."""
        return self._cut(int(self._row_order[index]))

    def blank(self) -> TokenRow:
        """Return a row without targets, to even out the number of rows between ranks."""
        return self._cut(self.rows)

    def target_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the targets of each of these rows, int64 [rows], from lengths alone."""
        begin = self._row_order[indices] * self.sequence_length
        end = np.minimum(begin + self.sequence_length, self._starts[-1])
        # Each document's last token is a position without target: as many as documents end in (begin, end].
        documents_ended = np.searchsorted(self._starts, [begin, end], side="right")
        counts: NDArray[np.int64] = end - begin - (documents_ended[1] - documents_ended[0])
        return counts

    def _cut(self, place: int) -> TokenRow:
        """Cut row `place` out of the stream; past its end there are only EOS tokens."""
        begin = place * self.sequence_length
        end = begin + self.sequence_length
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="right"))  # the first document after the row's targets
        stream = self._read(first, min(last, len(self._documents)), begin, end + 1)
        targets = stream[1:].copy()
        ends = self._starts[first + 1 : last] - begin
        targets[ends - 1] = IGNORE
        targets[max(int(self._starts[-1]) - begin, 0) :] = IGNORE
        starts = np.concatenate([[0], ends[ends < self.sequence_length]]).astype(np.int64)
        return TokenRow(stream[:-1], targets, starts)

    def _read(self, first: int, last: int, begin: int, end: int) -> NDArray[np.int64]:
        """Return tokens [begin, end) of the stream, which lie in documents [first, last) as far as there are any."""
        stream = np.full(end - begin, self._corpus.manifest.eos, dtype=np.int64)
        for index in range(first, last):
            start, stop = int(self._starts[index]), int(self._starts[index + 1])
            low, high = max(start, begin), min(stop, end)
            stream[low - begin : high - begin] = self._corpus.read(self._documents[index], low - start, high - start)
        return stream
