"""Planning: memory and storage arithmetic, before anything is run."""
