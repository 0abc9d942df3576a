"""Several processes: who they are, what they tell each other, and how weights and gradients are spread over them.

`group` exchanges small plain data, `watch` notices a process that died or hangs, `step` wraps a network for data
parallel (DDP) or sharded (FSDP2) training, `rows` gathers rows that losses compare over the whole batch. With one
process everything here is the identity. Nothing here knows recipes, files or schedules.
"""
