"""A schedule as data: what it is given (`problem`, `shape`), its steps, the plan, the plan as operations and as text."""
