"""Executors of a plan: the anchor region of all groups, then their stripes.

name         runs on                        stripes
torch        any device                     rows gathered once a group, a flash operator, merge by log-sum-exp
triton       NVIDIA GPUs, the interpreter   one kernel that loads scattered rows itself and resumes from the anchor's state
flashinfer   NVIDIA GPUs                    FlashInfer's block-sparse kernel with blocks of one column
"""
