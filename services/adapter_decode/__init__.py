"""A decode worker: generates with base weights and any adapter on prefilled conversations."""
