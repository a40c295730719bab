"""Pictures of every preprocessing step, augmentation and quality check, and the two pages that show them: make gallery.

The pages and pictures in docs/ come from the package's own code and from phantoms, so that they show what the code does.
"""
