"""Reading and writing: checkpoints, published layouts, the hub.

Nothing that is read here runs code; `mmdiff.io.checkpoint` is the only file that opens a pickle, and only its tensors.
"""
