"""The folding planner's parts; `moe.planner` is its face.

model · job · hardware ──► places (links, rows) ──► costs (one operation) ──► layers ──► step · memory ──► search
                                                               published rows ──► calibrate ──► hardware
"""
