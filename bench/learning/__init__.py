"""Does each trainer learn what it should, and as well as TRL's on the same task, data, start and settings?

``python -m bench.learning`` trains every cell of :mod:`.cells` (task, trainer, variant, library, seed) on models of 0.1 million
parameters, and judges all of them alike on held-out prompts while they learn.
"""
