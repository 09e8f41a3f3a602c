"""Evaluation: a benchmark's questions, a model's answers, the scores, and what it would score without looking."""
