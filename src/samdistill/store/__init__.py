"""The feature store: an append-only, indexed and verifiable cache of feature maps. ``spec`` describes the files."""

from .codecs import CODECS, Codec, FeatureError, make_codec, record_bytes
from .reader import FeatureStore, Problem, Record, stored_codec
from .sources import Comparison, SourceTable
from .spec import StoreSpec
from .writer import SYNC_RECORDS, FeatureStoreWriter

__all__ = [
    "CODECS",
    "SYNC_RECORDS",
    "Codec",
    "Comparison",
    "FeatureError",
    "FeatureStore",
    "FeatureStoreWriter",
    "Problem",
    "Record",
    "SourceTable",
    "StoreSpec",
    "make_codec",
    "record_bytes",
    "stored_codec",
]
