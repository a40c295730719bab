"""Tables, figures and pages of evaluations and their comparisons, and the promotion rules.

Functions turn values into tables, matplotlib figures or text, and stages write these, except for `save_png` and `write_review`.
Nothing here depends on the config, torch or MLflow.
"""
