"""The parts of alora-serve that every service shares; `import alora_serve` itself loads nothing."""
