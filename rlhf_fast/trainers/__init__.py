"""One file per algorithm, one loop for all: see ``trainer.py``."""
