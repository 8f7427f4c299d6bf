"""Files of rows → token datasets and batches. Nothing here trains."""

from molora.data.collate import Collator, padding_id
from molora.data.mask import IGNORED, Encoded, RowEncoder
from molora.data.read import read
from molora.data.rows import Row
from molora.data.tokenized import Counts, Tokenized, tokenize

__all__ = [
    "IGNORED",
    "Collator",
    "Counts",
    "Encoded",
    "Row",
    "RowEncoder",
    "Tokenized",
    "padding_id",
    "read",
    "tokenize",
]
