"""One file per command: the composition layer, the only room that may reach every other one.

The top of each file imports light things only, so that ``mmdiff --help`` is instant.
"""
