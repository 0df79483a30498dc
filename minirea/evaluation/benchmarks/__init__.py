"""LongBench, L-Eval and InfiniteBench on their published data files, which the user brings."""
