"""The demo: three teams, three notes, one base: trained, judged, published by policy, answering in one batch."""

from postil.demo.run import Demo, run_demo

__all__ = ["Demo", "run_demo"]
