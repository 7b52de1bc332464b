"""`alora-serve chat`: a conversation with the base model, and adapters asked about it as it goes.

``conversation``, ``commands``, ``events`` and ``state`` are the core: no input, no output. ``run``, ``calls``,
``keyboard`` and the views are the shell around it.
"""
