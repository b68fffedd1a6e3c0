"""One file per algorithm, one loop for all: ``trainer.py`` is what a run is made of, ``loop.py`` its steps."""
