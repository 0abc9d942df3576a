"""Networks: one file per family with its Config, its Module and its initialisation.

No reading or writing of files, no command line, no sampling loop.
"""
