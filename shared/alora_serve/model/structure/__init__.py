"""Answers bound to a form: JSON schemas, regular expressions, grammars and choices, compiled by llguidance."""
