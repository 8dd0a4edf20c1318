"""The gate: an expression over a score card, its conditions answered, a version passed or refused."""
