"""Files of rows → token datasets and batches. Nothing here trains."""

from molora.data.collate import Collator, padding_id
from molora.data.mask import IGNORED, Encoded, RowEncoder
from molora.data.packing import PackingRates, pack, packing_rates, per_sequence
from molora.data.read import read
from molora.data.rows import Row
from molora.data.tokenized import Counts, Tokenized, tokenize

__all__ = [
    "IGNORED",
    "Collator",
    "Counts",
    "Encoded",
    "PackingRates",
    "Row",
    "RowEncoder",
    "Tokenized",
    "pack",
    "packing_rates",
    "padding_id",
    "per_sequence",
    "read",
    "tokenize",
]
