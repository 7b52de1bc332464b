"""Trains PEFT adapters on labelled conversations. For an aLoRA, base KV is computed once and kept.

``rows`` reads data, ``recipe`` says what to train, ``definition`` what it answers, ``encoding`` makes tokens,
``prefixes`` keeps base KV, ``adapted`` runs the model, ``loop`` trains, ``checkpoint`` survives a stop, ``saving`` and
``card`` write the result, ``run`` does it all.
"""
