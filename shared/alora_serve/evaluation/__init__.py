"""Judges adapters by what a server answers. Torch-free.

``items`` is what was asked and said, ``scores`` are the figures of one item list, ``bootstrap`` says how sure they are,
``asking`` puts rows to a server, ``run`` a whole test set, ``report`` sums up and compares.
"""
