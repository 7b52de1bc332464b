"""The base model and its tokenizer: loading, attention, sampling, chat template."""
