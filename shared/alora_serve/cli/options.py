"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_PORT: Final = 50051
DEFAULT_ADDRESS: Final = f"127.0.0.1:{DEFAULT_PORT}"
ADDRESS_VARIABLE: Final = "ALORA_ADDRESS"
API_KEY_VARIABLE: Final = "ALORA_API_KEY"
"""A key is no flag: every user of a machine can read those."""
TLS_CA_FILE_VARIABLE: Final = "ALORA_CLIENT_TLS_CA_FILE"
TLS_CERT_FILE_VARIABLE: Final = "ALORA_CLIENT_TLS_CERT_FILE"
TLS_KEY_FILE_VARIABLE: Final = "ALORA_CLIENT_TLS_KEY_FILE"
TLS_SERVER_NAME_VARIABLE: Final = "ALORA_CLIENT_TLS_SERVER_NAME"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Address = Annotated[
    str, typer.Option(envvar=ADDRESS_VARIABLE, metavar="HOST:PORT", help="Where the router's gRPC API is.")
]
Timeout = Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this long.")]

Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Directory, Hugging Face hub id, or demo (SmolLM2-135M-Instruct, the default)."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="auto (default: what the processor is fast at), float32 or bfloat16."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="torch threads of each process; 0 (default) is OMP_NUM_THREADS or, where that is unset, one a core.",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="lmdb: (default: LMDB in /dev/shm, or the cache directory), lmdb:///dir, redis://host:port/0 or "
        "unix:///path.sock.",
    ),
]
AdapterRoots = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapters",
        exists=True,
        file_okay=False,
        metavar="DIR",
        help="Directory whose subdirectories are PEFT adapters; repeat for more. In a checkout: examples/intrinsics.",
    ),
]

Messages = Annotated[
    list[str] | None,
    typer.Option("--message", "-m", metavar="TEXT", help="A turn of the user; repeat to alternate user, assistant."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system's turn, before all others.")]
ConversationFile = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="Conversation as JSON; - is standard input."),
]
HandleFile = Annotated[
    Path | None,
    typer.Option("--handle", metavar="FILE", help="Go on from a handle that prefill --save or generate --save wrote."),
]
SaveHandle = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Write the handle here, to go on with --handle.")
]

Parameters = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="What an instruction names; repeat for more."),
]

MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most tokens to generate; unset: 256, or what the context leaves."),
]
Temperature = Annotated[float, typer.Option(metavar="X", help="0 is greedy.")]
TopP = Annotated[float, typer.Option(metavar="X", help="Nucleus mass in (0, 1].")]
TopK = Annotated[int, typer.Option(min=0, metavar="N", help="Keep the N most likely tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(metavar="X", help="Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(metavar="X", help="As in transformers; 1 is off.")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the random numbers; unset, one is drawn.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeat for more.")]

JsonSchemaOption = Annotated[
    str | None,
    typer.Option("--json-schema", metavar="FILE|TEXT", help="The answer is JSON of this schema, a file or its text."),
]
RegexOption = Annotated[str | None, typer.Option("--regex", metavar="PATTERN", help="The answer matches this, whole.")]
ChoiceOption = Annotated[
    list[str] | None, typer.Option("--choice", metavar="TEXT", help="The answer is this; repeat for alternatives.")
]
GrammarOption = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE|TEXT", help="The answer is of this grammar, a file or its text."),
]
TopLogprobs = Annotated[
    int, typer.Option(min=0, max=20, metavar="N", help="Also tell the N most likely tokens in each token's place.")
]
Samples = Annotated[
    int, typer.Option("--samples", "-n", min=1, max=64, metavar="N", help="So many answers, in one call.")
]
