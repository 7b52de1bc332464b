"""The newcomer's first minutes: a guarded question about a document, measured and checked against PEFT."""
