"""The benchmarks of `minirea eval`: prompts, rules and metrics from published data files."""
