"""Pages for people: report.html with its tables and gallery, the model card, review.html; in templates/ their Jinja2 templates.

A page is rendered from values to text, which the stages write; review.html is written together with its folder of corrections.
"""
