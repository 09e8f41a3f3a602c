"""Training: recipes, what is frozen and what learns, the loop, resume, evaluation, reports, the demo."""
