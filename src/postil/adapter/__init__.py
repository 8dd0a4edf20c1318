"""Adapters: configuration, the resident bank, attaching, merging, and PEFT's file format."""
