"""Tables, figures and pages of evaluations and their comparisons, and the promotion rules.

Functions turn values into tables, matplotlib figures or text. Reading and writing files belongs to the stages; nothing here
depends on the config, torch or MLflow.
"""
