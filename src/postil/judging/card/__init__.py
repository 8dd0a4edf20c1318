"""The score card: what it holds, how it is built from measures, where it lies and how a measure in it is named."""
