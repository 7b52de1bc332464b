"""Adapters: reading PEFT directories, where each turns on, their weights, and which of them are in memory."""
