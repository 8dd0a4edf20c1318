"""Opens bases: loads them from anywhere, freezes them, and knows them by their fingerprint."""

from postil.base.cache import bases_directory, cache_directory
from postil.base.catalog import Entry, entries, fetch, list_entries
from postil.base.fingerprint import Fingerprint, directory_source, live_digest
from postil.base.load import Base, base_from_model, device_of, freeze, load_base
from postil.base.nf4_linear import Nf4Linear, logical_parameters, nf4_layers
from postil.base.show import show
from postil.base.structure import decoder_layers

__all__ = [
    "Base",
    "Entry",
    "Fingerprint",
    "Nf4Linear",
    "base_from_model",
    "bases_directory",
    "cache_directory",
    "decoder_layers",
    "device_of",
    "directory_source",
    "entries",
    "fetch",
    "freeze",
    "list_entries",
    "live_digest",
    "load_base",
    "logical_parameters",
    "nf4_layers",
    "show",
]
