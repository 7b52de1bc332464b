"""The newcomer's first minute: one conversation with a base model and adapters, measured and checked against PEFT."""
