"""Bricks: attention, rotary positions, layers. Tensors in, tensors out; no configuration files, no I/O."""
