"""What every other folder may use: errors, atomic files, progress bars, signals, random streams, tables.

Nothing here knows of images, networks, settings or tracking, and nothing heavy is imported.
"""
