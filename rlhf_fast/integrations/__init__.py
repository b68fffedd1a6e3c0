"""The kernels inside other people's trainers. Each module imports its host only when it is asked to change it."""
