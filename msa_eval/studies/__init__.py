"""Several evaluations put together: batch sizes, ablations, cross-checks, and the paper's tables."""
