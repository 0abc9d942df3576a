"""The training room: a loop that counts in samples, exact resume, schedules, averages and reports.

It receives a built model, an objective, a loader and probes, and knows nothing of recipes or of the command line.
"""
