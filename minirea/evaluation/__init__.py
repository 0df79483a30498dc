"""Evaluation: does a model keep its ability far beyond its trained length? `minirea eval`, and `evaluate` in Python."""
