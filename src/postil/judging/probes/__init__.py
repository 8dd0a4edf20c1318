"""Experiments beside the measures: null adapters, the λ curve, verbatim leakage, trivial baselines."""
