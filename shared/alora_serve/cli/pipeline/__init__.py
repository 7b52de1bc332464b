"""Pipelines of intrinsics inside one conversation: each step asked through the server, and what it cost.

The pipelines themselves are scripts under ``examples/``.
"""
